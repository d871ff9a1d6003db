"""Directions restricted to some leaves and zero on the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from gradcost.core.key import Key
from gradcost.core.objective import Leaf
from gradcost.directions.direction import Directions, SparseDirections


@dataclass(frozen=True, eq=False)
class _Confined(SparseDirections):
    """`directions` on the leaves whose names are in `leaves`, zero on all others."""

    directions: Directions
    leaves: Mapping[str, Leaf] = field(repr=False)  # their `start` may count only the leaves of `Objective.only`
    unbiased = False

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return self.directions.seeds(key, probes, dimension)

    def touches(self, leaf: Leaf, seeds: Sequence[int]) -> bool:
        return leaf.name in self.leaves

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        inner = self.leaves.get(leaf.name)
        return base if inner is None else self.directions.add(base, inner, seeds, scales, in_place)


def confined(directions: Directions, leaves: Sequence[Leaf]) -> Directions:
    """Restrict directions to these leaves; z is 0 on all others, which are not copied and get no tangent."""
    return _Confined(directions, {leaf.name: leaf for leaf in leaves})
