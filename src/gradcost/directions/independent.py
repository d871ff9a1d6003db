"""Directions with independent entries: normal numbers or signs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gradcost.core.key import Key
from gradcost.core.objective import Leaf
from gradcost.core.value import value
from gradcost.directions.direction import Directions, independent
from gradcost.noise import philox
from gradcost.noise.add import add_noise, noise

_NORMALS, _SIGNS = philox.Normals(), philox.Signs()


@value
class Gaussian(Directions):
    """z ~ N(0, I).

    Source: Baydin et al. 2022, definition 1; Malladi et al. 2023 (MeZO), definition 1.
    """

    unbiased, symmetric, elementwise = True, True, True

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return independent(key, probes)

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        return add_noise(_NORMALS, seeds, scales, leaf.start, base, in_place)

    def draw(self, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], out: Tensor | None = None) -> Tensor:
        return noise(_NORMALS, seeds, scales, leaf.start, leaf.parameter.detach(), out)


@value
class Rademacher(Directions):
    """z in {-1, +1}^d, each sign with probability 1/2. Of all independent entries these give the least variance.

    Source: Spall 1992, section III (SPSA's symmetric Bernoulli perturbation).
    """

    unbiased, symmetric, elementwise = True, True, True

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return independent(key, probes)

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        return add_noise(_SIGNS, seeds, scales, leaf.start, base, in_place)

    def draw(self, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], out: Tensor | None = None) -> Tensor:
        return noise(_SIGNS, seeds, scales, leaf.start, leaf.parameter.detach(), out)
