"""Directions that are nonzero on one group of leaves only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

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
    """z = sqrt(G) u on one of G groups of leaves and zero on the others, with u from `directions`.

    Groups are sampled without replacement within an estimate, so G probes use each group once.

    Law: E[z z'] = I if E[u u'] = I. For Gaussian u and n <= G probes, the estimate g of the gradient grad has
    E|g|^2 = (G / n) sum_j (d_j + 2) |grad_j|^2. Group j has d_j weights, and grad_j is the gradient in them. If all
    groups have the same size, this is (d + 2 G) / n |grad|^2, close to E|g|^2 for n probes of u. It is
    smaller if small groups have large gradients.

    Cost: lower than with u itself. A finite difference does not copy leaves outside the group, and forward mode
    computes no tangent for them. With L linear layers, a forward-mode probe of layer l (1 .. L) costs L + 1 + L - l
    matmuls instead of 3L - 1. So the cost of an estimate depends on the sampled groups, unless n is a multiple of G.

    Args:
        directions: the distribution of u.
        by: the partition of the leaves.
    Sources: Nesterov 2012, "Efficiency of coordinate descent methods on huge-scale optimization problems", section 2
    (random blocks of coordinates); Wang et al., LeZO, arXiv 2410.09823 (2024): some layers per step, unscaled.
    """

    directions: Directions = Gaussian()
    by: Grouping = EachLeaf()

    def __post_init__(self) -> None:
        object.__setattr__(self, "unbiased", self.directions.unbiased)

    def init(self, objective: Objective) -> None:
        return None

    def resolve(self, objective: Objective, key: Key, state: None) -> tuple[Directions, None]:
        group_of = self.by.groups(objective)
        return _InGroup(self.directions, group_of, 1 + max(group_of.values()), self.directions.unbiased), None

    def update(self, state: None, gradient: Iterator[tuple[str, Tensor]]) -> None:
        return None


@dataclass(frozen=True, eq=False)
class _InGroup(SparseDirections):
    """Directions on one group each. seed = G * (seed of u, modulo floor(2^64 / G)) + group number."""

    directions: Directions
    group_of: Mapping[str, int] = field(repr=False)
    count: int
    unbiased: bool

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        inner = self.directions.seeds(key, probes, dimension)
        groups = sample_without_replacement(key.fold("groups"), probes, self.count)
        limit = (1 << 64) // self.count
        return tuple(seed % limit * self.count + group for seed, group in zip(inner, groups, strict=True))

    def touches(self, leaf: Leaf, seeds: Sequence[int]) -> bool:
        return any(seed % self.count == self.group_of[leaf.name] for seed in seeds)

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        if not self.touches(leaf, seeds):
            return base
        count, group, root = self.count, self.group_of[leaf.name], math.sqrt(self.count)
        pairs = [(seed, scale) for seed, scale in zip(seeds, scales, strict=True) if seed % count == group]
        inner_seeds, inner_scales = [seed // count for seed, _ in pairs], [scale * root for _, scale in pairs]
        return self.directions.add(base, leaf, inner_seeds, inner_scales, in_place)
