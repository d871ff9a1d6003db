"""Directions that are matrices of low rank, leaf by leaf."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.memory_events import tag
from gradcost.core.objective import Leaf, Objective
from gradcost.core.value import value
from gradcost.directions.direction import Directions, Refreshed, independent
from gradcost.noise import philox
from gradcost.noise.add import add_noise

_PIECE = 1 << 20  # elements of a half-precision leaf that are float32 at once, in whole rows


class Factors(NamedTuple):
    """A direction on a leaf of m rows and n columns: z = left' right / sqrt(rank).

    left: rank x m, right: rank x n, both of the leaf's dtype.
    """

    left: Tensor
    right: Tensor

    def scaled(self, scale: float, dtype: torch.dtype) -> Factors:
        """In this type, the factors of scale * z without the root: left' right."""
        return Factors(self.left.to(dtype).mul(scale / math.sqrt(len(self.left))), self.right.to(dtype))


class Factored(Directions):
    """Directions with a low rank on every leaf that is a matrix, so that forward mode needs no tangent of its size.

    A leaf of two dimensions or more is a matrix: the first of them by all others. One of fewer has normal entries.
    """

    @abstractmethod
    def factors(self, leaf: Leaf, seed: int) -> Factors:
        """The direction on a leaf that is a matrix."""


def is_matrix(leaf: Leaf) -> bool:
    return leaf.parameter.ndim >= 2


@value
class LowRank(Factored):
    """z = A B' / sqrt(rank) on a leaf that is an m x n matrix, with A (m x rank) and B (n x rank) of independent
    standard normal entries; such entries themselves on leaves of fewer than two dimensions.

    Law: E[z z'] = I. It scatters more than a Gaussian direction, and how much depends on the shapes:
    E[|z|^2 (g . z)^2] = (d + 2) |g|^2 + (2 / rank) sum over the matrices of (m + n + 1) |g_matrix|^2.

    z is never materialised: `add` holds the factors of one direction and one leaf beside the base, and adds their
    outer products in place, one after the other, by fused multiply-adds (a CPU without them rounds twice). These are
    the same bits on any number of threads, which a matrix product's are not. Half precision is computed in float32
    and rounded once; the factors are of the leaf's type, so that forward mode looks along the same direction.

    In forward mode the tangent of a linear layer is dx W' + (x B) A' / sqrt(rank): with n directions in one forward
    L layers cost 1 + n matmuls each and rank (m + n) / (m n) of one a direction, in place of 1 + 2n.

    Leaves are taken whole: `add` on a piece of one is another direction.

    Sources: Sarkar et al., "Evolution strategies at the hyperscale" (EGGROLL), arXiv 2511.16652 (2025): A B' over
    the root of the rank; Chen et al. (LOZO), arXiv 2410.07698 (2024). Raises: ValueError when rank < 1.
    """

    rank: int = 1
    unbiased = True

    def __post_init__(self) -> None:
        _check_rank(self.rank)

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return independent(key, probes)

    def factors(self, leaf: Leaf, seed: int) -> Factors:
        return _drawn(leaf, self.rank, Key(seed), Key(seed))

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        return _added(self, base, leaf, seeds, scales, in_place)


class Held(NamedTuple):
    """done: estimates so far. right: the seed of the factor B that is held at present."""

    done: int = 0
    right: int = 0


@value
class LazyLowRank(Refreshed):
    """z = A B' / sqrt(rank) as `LowRank`, with A new for each probe and B held for `every` estimates, one B for all
    their probes; normal entries on leaves of fewer than two dimensions.

    Law: E[z z'] = I over the draw of B, which comes from the key of the first estimate that it serves. Given B, the
    mean estimate on a matrix leaf is G B B' / rank, with G the gradient, and each estimate's rows lie in the span of
    B's columns, of `rank` dimensions: so within a period the optimizer walks in a subspace.

    The state is the number of estimates made and the seed of B: 16 bytes, enough to resume within a period. What
    an estimate looks along is what its gradient replays, on the first one of a period too.

    Source: Chen et al., "Enhancing zeroth-order fine-tuning for language models with low-rank structures" (LOZO),
    arXiv 2410.07698 (2024), algorithm 1: their U is A, their V is B, nu is `every`, and their 1/r is in z's root.
    Raises: ValueError when rank or every is below 1.
    """

    rank: int = 1
    every: int = 50
    unbiased = True

    def __post_init__(self) -> None:
        _check_rank(self.rank)
        if self.every < 1:
            raise BadInput(
                f"every is for how many estimates a factor is held: 1 or more, not {self.every!r}. With 1 each "
                "estimate has its own; LowRank(rank) draws one a probe."
            )

    def init(self, objective: Objective) -> Held:
        return Held()

    def refreshed(self, key: Key, state: Held) -> Held:
        due = state.done % self.every == 0
        return Held(state.done, key.fold("held").seed) if due else state

    def resolve(self, objective: Objective, key: Key, state: Held) -> Directions:
        return _Holding(self.rank, state.right)

    def update(self, state: Held, gradient: Iterator[tuple[str, Tensor]]) -> Held:
        return Held(state.done + 1, state.right)


@dataclass(frozen=True)
class _Holding(Factored):
    """The directions of one estimate, whose factor B comes from the seed `right`."""

    rank: int
    right: int
    unbiased = True

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return independent(key, probes)

    def factors(self, leaf: Leaf, seed: int) -> Factors:
        return _drawn(leaf, self.rank, Key(seed), Key(self.right))

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        return _added(self, base, leaf, seeds, scales, in_place)


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise BadInput(f"the rank of a direction is the number of columns of its factors: 1 or more, not {rank!r}.")


def _drawn(leaf: Leaf, rank: int, left: Key, right: Key) -> Factors:
    """Factors from streams of the leaf's own: no number in them is another leaf's, nor an entry of a vector."""
    rows, columns = _shape(leaf)
    made = []
    for key, size in ((left.fold("left", leaf.start), rows), (right.fold("right", leaf.start), columns)):
        zero = leaf.parameter.detach().new_zeros(rank, size)
        made.append(add_noise(philox.Normals(), [key.seed], [1.0], 0, zero, in_place=True))
    return Factors(*made)


def _shape(leaf: Leaf) -> tuple[int, int]:
    rows = leaf.parameter.shape[0]
    return rows, leaf.parameter.numel() // max(rows, 1)


def _added(
    directions: Factored,
    base: Tensor,
    leaf: Leaf,
    seeds: Sequence[int],
    scales: Sequence[float],
    in_place: bool,
) -> Tensor:
    """base + sum_k scales[k] * z_k."""
    if not is_matrix(leaf):
        return add_noise(philox.Normals(), seeds, scales, leaf.start, base, in_place)
    assert base.numel() == leaf.parameter.numel(), "a matrix of low rank is one only whole"
    out = base if in_place else base.detach().clone(memory_format=torch.contiguous_format)
    matrix = out.view(_shape(leaf))
    half = base.dtype not in (torch.float32, torch.float64)
    rows = max(1, _PIECE // max(matrix.shape[1], 1) if half else len(matrix))
    for at in range(0, len(matrix), rows):
        piece = matrix[at : at + rows]
        wide = piece.float() if half else piece
        for seed, scale in zip(seeds, scales, strict=True):
            _multiply_in(wide, directions.factors(leaf, seed).scaled(scale, wide.dtype), at)
        if half:
            piece.copy_(wide)
    return tag("shifted", out)


def _multiply_in(base: Tensor, factors: Factors, first: int) -> None:
    """base += left' right in the rows from `first` on. What it holds is gone before the next factors are drawn."""
    for column, row in zip(factors.left, factors.right, strict=True):
        base.addcmul_(column[first : first + len(base), None], row)
