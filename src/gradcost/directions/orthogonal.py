"""Directions at right angles to each other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gradcost.core.key import Key
from gradcost.core.objective import Leaf
from gradcost.core.value import value
from gradcost.directions.direction import Directions
from gradcost.noise.add import add_noise
from gradcost.noise.hartley import Hartley
from gradcost.noise.permutation import sample_without_replacement


@value
class Orthogonal(Directions):
    """The z of one estimate are distinct members of an orthogonal basis, of length sqrt(d) each: n = d probes give
    the exact gradient, to the rounding of z to float32. More than d begin another basis.

    z_k = sign_i cas(2 pi k i / d): a row of the Hartley matrix with the columns' signs drawn at random, once a basis;
    the k are dealt without replacement. Law: E[z z'] = I, and E|g|^2 = (d/n) |grad|^2 for n <= d, as for
    `Coordinates`; but here every direction moves nearly every weight. No entry is above sqrt(2) in size.

    A seed holds both k (its lowest bits, as many as the dimension needs) and the name of the signs (the others).

    Source: Choromanski, Rowland, Sindhwani, Turner, Weller, "Structured evolution with compact architectures for
    scalable policy optimization", arXiv 1804.02395 (2018): orthogonal exploration by rows of Hadamard matrices with
    random signs. Those have sizes that are powers of two; a Hartley matrix has any.
    """

    unbiased = True

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        basis = Hartley(dimension)
        rows = enumerate(sample_without_replacement(key, probes, dimension))
        return tuple(basis.seed(key.fold("basis", number // dimension).seed, row) for number, row in rows)

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        return add_noise(Hartley(leaf.dimension), seeds, scales, leaf.start, base, in_place)
