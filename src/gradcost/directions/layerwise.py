"""One group of leaves at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gradcost.core.key import Key
from gradcost.core.objective import Leaf, Objective
from gradcost.core.value import value
from gradcost.directions.direction import Directions, SparseDirections, StatefulDirections
from gradcost.directions.groups import EachLeaf, Grouping
from gradcost.directions.independent import Gaussian
from gradcost.noise.permutation import sample_without_replacement


@value
class Layerwise(StatefulDirections):
    """z = sqrt(G) u within one of G groups of leaves and zero outside, with u of `directions`; the groups are dealt
    without replacement through an estimate's probes, so that n = G probes look into each group once.

    Law: E[z z'] = I where it is so of u. Over Gaussian directions and for n <= G probes
    E|g|^2 = (G / n) sum_g (d_g + 2) |grad_g|^2, with d_g weights in group g and grad_g the gradient in them. With
    groups of one size that is (d + 2 G) / n |grad|^2: about as far as u's own n probes scatter; it is less where
    the small groups have the large gradients.

    It is cheaper: a leaf outside the group is not copied for a difference. In forward mode it has no tangent, so
    a probe into layer l of L linear layers alone (from 1) costs L + 1 + L - l matmuls instead of 3L - 1. What one
    estimate costs therefore depends on the groups that its key deals, unless n is a multiple of G.

    Sources: Nesterov 2012, "Efficiency of coordinate descent methods on huge-scale optimization problems", section 2
    (random blocks of coordinates); Wang et al., LeZO, arXiv 2410.09823 (2024): some layers at a time, unscaled.
    """

    directions: Directions = Gaussian()
    by: Grouping = EachLeaf()

    def __post_init__(self) -> None:
        object.__setattr__(self, "unbiased", self.directions.unbiased)

    def init(self, objective: Objective) -> None:
        return None

    def resolve(self, objective: Objective, key: Key, state: Any) -> Directions:
        return _InGroup(self.directions, self.by.groups(objective), self.directions.unbiased)

    def update(self, state: Any, gradient: Iterator[tuple[str, Tensor]]) -> None:
        return None


@dataclass(frozen=True, eq=False)
class _InGroup(SparseDirections):
    """A seed holds both: G times the inner directions' own (its lowest 64 - log2 G bits), and the group."""

    directions: Directions
    group_of: Mapping[str, int] = field(repr=False)
    unbiased: bool

    @property
    def count(self) -> int:
        return 1 + max(self.group_of.values())

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        inner = self.directions.seeds(key, probes, dimension)
        dealt = sample_without_replacement(key.fold("groups"), probes, self.count)
        room = (1 << 64) // self.count
        return tuple(seed % room * self.count + group for seed, group in zip(inner, dealt, strict=True))

    def touches(self, leaf: Leaf, seeds: Sequence[int]) -> bool:
        return any(seed % self.count == self.group_of[leaf.name] for seed in seeds)

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        if not self.touches(leaf, seeds):
            return base
        count, here, root = self.count, self.group_of[leaf.name], math.sqrt(self.count)
        pairs = [(seed, scale) for seed, scale in zip(seeds, scales, strict=True) if seed % count == here]
        inner, lengths = [seed // count for seed, _ in pairs], [scale * root for _, scale in pairs]
        return self.directions.add(base, leaf, inner, lengths, in_place)
