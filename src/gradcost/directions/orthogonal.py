"""Directions that are orthogonal to each other."""

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
    """Rows of the Hartley matrix with random column signs: element i of row k is sign_i cas(2 pi k i / d).

    cas = cos + sin. Each row has norm sqrt(d). Rows are sampled without replacement within an estimate. The signs are
    the same for d probes; then new signs are drawn.

    Law: E[z z'] = I. For n <= d probes the estimate g of the gradient grad has E|g|^2 = (d/n) |grad|^2, as for
    `Coordinates`. d probes give the exact gradient, up to the rounding of z to float32. Each direction perturbs
    nearly every weight; no element is above sqrt(2) in absolute value.

    Seed: the lowest max(1, ceil(log2 d)) bits are k. The other bits determine the signs.

    Source: Choromanski, Rowland, Sindhwani, Turner, Weller, "Structured evolution with compact architectures for
    scalable policy optimization", arXiv 1804.02395 (2018): rows of Hadamard matrices with random signs. Hadamard
    matrices have sizes that are powers of two; Hartley matrices have any size.
    """

    unbiased, symmetric, elementwise = True, True, True

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        basis = Hartley(dimension)
        rows = enumerate(sample_without_replacement(key, probes, dimension))
        return tuple(basis.seed(key.fold("basis", number // dimension).seed, row) for number, row in rows)

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        return add_noise(Hartley(leaf.dimension), seeds, scales, leaf.start, base, in_place)
