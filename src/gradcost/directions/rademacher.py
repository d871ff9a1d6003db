"""Independent signs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gradcost import noise, philox
from gradcost.directions.direction import Directions, independent
from gradcost.key import Key
from gradcost.objective import Leaf
from gradcost.value import value


@value
class Rademacher(Directions):
    """z in {-1, +1}^d, each sign with probability one half: the least variance of all independent entries.

    Spall 1992, section III (SPSA's symmetric Bernoulli perturbation).
    """

    unbiased = True

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return independent(key, probes)

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        return noise.add(philox.Signs(), seeds, scales, leaf.start, base, in_place)
