"""Directions that are a low-rank matrix on each matrix leaf."""

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
from gradcost.directions.direction import Directions, StatefulDirections, independent
from gradcost.noise import philox
from gradcost.noise.add import add_noise

_PIECE = 1 << 20  # elements of a half-precision leaf that are converted to float32 at once, in whole rows


class Factors(NamedTuple):
    """A direction on a leaf of m rows and n columns: z = left' right / sqrt(rank).

    Args:
        left: shape (rank, m), of the leaf's dtype.
        right: shape (rank, n), of the leaf's dtype.
    """

    left: Tensor
    right: Tensor

    def scaled(self, scale: float, dtype: torch.dtype) -> Factors:
        """Return factors of this dtype with scale * z = left' right."""
        return Factors(self.left.to(dtype).mul(scale / math.sqrt(len(self.left))), self.right.to(dtype))


class Factored(Directions):
    """Directions of low rank on each matrix leaf, so that forward mode needs no tangent of the leaf's size.

    A leaf of two or more dimensions is a matrix: the first dimension by all others. Other leaves have normal entries.
    """

    @abstractmethod
    def factors(self, leaf: Leaf, seed: int) -> Factors:
        """Return the direction on a matrix leaf.

        Args:
            leaf: a leaf of two or more dimensions.
            seed: the direction.
        """


def is_matrix(leaf: Leaf) -> bool:
    return leaf.parameter.ndim >= 2


@value
class LowRank(Factored):
    """z = A B' / sqrt(rank) on an m x n matrix leaf; A (m x rank) and B (n x rank) have standard normal entries.

    Leaves of fewer than two dimensions have standard normal entries.

    Law: E[z z'] = I. The variance is larger than a Gaussian direction's and depends on the shapes:
    E[|z|^2 (g . z)^2] = (d + 2) |g|^2 + (2 / rank) sum over the matrices of (m + n + 1) |g_matrix|^2.

    Memory: z is never materialised. `add` holds the factors of one direction and one leaf, and adds their outer
    products in place by fused multiply-adds (a CPU without them rounds twice). The bits are the same for any number
    of threads; a matrix product's are not. Half precision is computed in float32 and rounded once. The factors have
    the leaf's dtype, so that forward mode uses the same direction.

    Cost: in forward mode the tangent of a linear layer is dx W' + (x B) A' / sqrt(rank). n directions in one forward
    pass of L layers cost 1 + n matmuls per layer, plus rank (m + n) / (m n) of one per direction, instead of 1 + 2n.

    `add` needs the whole leaf: on a piece of a leaf it would give another direction.

    Args:
        rank: the number of columns of A and B, at least 1.
    Raises:
        BadInput: rank < 1.
    Sources: Sarkar et al., "Evolution strategies at the hyperscale" (EGGROLL), arXiv 2511.16652 (2025): A B' over
    the root of the rank; Chen et al. (LOZO), arXiv 2410.07698 (2024).
    """

    rank: int = 1
    unbiased = True

    def __post_init__(self) -> None:
        _check_rank(self.rank)

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return independent(key, probes)

    def factors(self, leaf: Leaf, seed: int) -> Factors:
        return _draw_factors(leaf, self.rank, Key(seed), Key(seed))

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        return _add(self, base, leaf, seeds, scales, in_place)


class Held(NamedTuple):
    """The state of `LazyLowRank`.

    Args:
        done: estimates so far.
        right: the seed of the present factor B.
    """

    done: int = 0
    right: int = 0


@value
class LazyLowRank(StatefulDirections):
    """z = A B' / sqrt(rank) as `LowRank`, with a new A per probe and one B for `every` consecutive estimates.

    Leaves of fewer than two dimensions have standard normal entries.

    Law: E[z z'] = I over the draw of B, which comes from the key of the first estimate that uses it. Given B, the
    mean estimate on a matrix leaf is G B B' / rank, with G the gradient. Each estimate's rows lie in the span of B's
    columns, so within a period the optimizer stays in a subspace of `rank` dimensions.

    Memory: the state is the number of estimates and the seed of B, 16 bytes, enough to resume within a period. A
    gradient replays the directions of its own estimate, also at the first estimate of a period.

    Args:
        rank: the number of columns of A and B, at least 1.
        every: how many estimates use one B, at least 1.
    Raises:
        BadInput: rank or every is below 1.
    Source: Chen et al., "Enhancing zeroth-order fine-tuning for language models with low-rank structures" (LOZO),
    arXiv 2410.07698 (2024), algorithm 1: their U is A, their V is B, nu is `every`, and their 1/r is in z's root.
    """

    rank: int = 1
    every: int = 50
    unbiased = True

    def __post_init__(self) -> None:
        _check_rank(self.rank)
        if self.every < 1:
            raise BadInput(
                f"every is for how many estimates a factor is held: 1 or more, not {self.every!r}. "
                "LowRank(rank) draws a factor for each probe."
            )

    def init(self, objective: Objective) -> Held:
        return Held()

    def resolve(self, objective: Objective, key: Key, state: Held) -> tuple[Directions, Held]:
        if state.done % self.every == 0:
            state = Held(state.done, key.fold("held").seed)
        return _SharedRight(self.rank, state.right), state

    def update(self, state: Held, gradient: Iterator[tuple[str, Tensor]]) -> Held:
        return Held(state.done + 1, state.right)


@dataclass(frozen=True)
class _SharedRight(Factored):
    """The directions of one estimate: all share the factor B of the seed `right`."""

    rank: int
    right: int
    unbiased = True

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return independent(key, probes)

    def factors(self, leaf: Leaf, seed: int) -> Factors:
        return _draw_factors(leaf, self.rank, Key(seed), Key(self.right))

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        return _add(self, base, leaf, seeds, scales, in_place)


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise BadInput(f"the rank of a direction is the number of columns of its factors: 1 or more, not {rank!r}.")


def _draw_factors(leaf: Leaf, rank: int, left: Key, right: Key) -> Factors:
    """Draw factors from streams of this leaf: they share no number with another leaf."""
    rows, columns = _shape(leaf)
    factors = []
    for key, size in ((left.fold("left", leaf.start), rows), (right.fold("right", leaf.start), columns)):
        zero = leaf.parameter.detach().new_zeros(rank, size)
        factors.append(add_noise(philox.Normals(), [key.seed], [1.0], 0, zero, in_place=True))
    return Factors(*factors)


def _shape(leaf: Leaf) -> tuple[int, int]:
    rows = leaf.parameter.shape[0]
    return rows, leaf.parameter.numel() // max(rows, 1)


def _add(
    directions: Factored,
    base: Tensor,
    leaf: Leaf,
    seeds: Sequence[int],
    scales: Sequence[float],
    in_place: bool,
) -> Tensor:
    """Return base + sum_k scales[k] * z_k."""
    if not is_matrix(leaf):
        return add_noise(philox.Normals(), seeds, scales, leaf.start, base, in_place)
    assert base.numel() == leaf.parameter.numel(), "add needs the whole leaf"
    out = base if in_place else base.detach().clone(memory_format=torch.contiguous_format)
    matrix = out.view(_shape(leaf))
    half = base.dtype not in (torch.float32, torch.float64)
    rows = max(1, _PIECE // max(matrix.shape[1], 1) if half else len(matrix))
    for at in range(0, len(matrix), rows):
        piece = matrix[at : at + rows]
        wide = piece.float() if half else piece
        for seed, scale in zip(seeds, scales, strict=True):
            _add_product(wide, directions.factors(leaf, seed).scaled(scale, wide.dtype), at)
        if half:
            piece.copy_(wide)
    return tag("shifted", out)


def _add_product(base: Tensor, factors: Factors, first: int) -> None:
    """Add left' right to the rows from `first` on; release the factors before the next ones are drawn."""
    for column, row in zip(factors.left, factors.right, strict=True):
        base.addcmul_(column[first : first + len(base), None], row)
