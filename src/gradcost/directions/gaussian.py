"""Independent normal entries."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gradcost import noise, philox
from gradcost.directions.direction import Directions, independent
from gradcost.key import Key
from gradcost.objective import Leaf
from gradcost.value import value


@value
class Gaussian(Directions):
    """z ~ N(0, I). Baydin et al. 2022, definition 1; Malladi et al. 2023 (MeZO), definition 1."""

    unbiased = True

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return independent(key, probes)

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        return noise.add(philox.Normals(), seeds, scales, leaf.start, base, in_place)
