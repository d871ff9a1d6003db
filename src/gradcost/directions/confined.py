"""Directions that are zero but on some leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from gradcost.core.key import Key
from gradcost.core.objective import Leaf
from gradcost.directions.direction import Directions, SparseDirections


@dataclass(frozen=True, eq=False)
class _Confined(SparseDirections):
    """`directions` on the leaves of these names, each placed where the mapping puts it, and zero on all others."""

    directions: Directions
    leaves: Mapping[str, Leaf] = field(repr=False)
    unbiased = False

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return self.directions.seeds(key, probes, dimension)

    def touches(self, leaf: Leaf, seeds: Sequence[int]) -> bool:
        return leaf.name in self.leaves

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        placed = self.leaves.get(leaf.name)
        return base if placed is None else self.directions.add(base, placed, seeds, scales, in_place)


def confined(directions: Directions, leaves: Sequence[Leaf]) -> Directions:
    """`directions` on these leaves and zero on all others: nothing is copied there, and nothing has a tangent."""
    return _Confined(directions, {leaf.name: leaf for leaf in leaves})
