"""Directions that are a low-rank matrix on each matrix leaf."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradcost.core.complex_numbers import as_real, real_count
from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.memory_events import tag
from gradcost.core.objective import Leaf, Objective
from gradcost.core.value import value
from gradcost.directions.direction import Directions, StatefulDirections, independent
from gradcost.noise import philox
from gradcost.noise.add import add_noise

_PIECE = 1 << 20  # elements of a half-precision leaf converted to float32 at once, rounded down to complete rows


class Factors(NamedTuple):
    """The factors of a direction on a leaf of m rows and n columns: z = left' right / sqrt(rank).

    Args:
        left: shape (rank, m), of the leaf's dtype.
        right: shape (rank, n), of the leaf's dtype.
    """

    left: Tensor
    right: Tensor

    def scaled(self, scale: float, dtype: torch.dtype) -> Factors:
        """Return factors of this dtype whose product left' right is scale * z."""
        return Factors(self.left.to(dtype).mul(scale / math.sqrt(len(self.left))), self.right.to(dtype))


class Factored(Directions):
    """Directions of low rank on each matrix leaf, so that forward mode needs no tangent of the leaf's size.

    A leaf of two or more dimensions is a matrix, flattened after its first dimension. A complex one is a real matrix
    with two columns per element. On other leaves, z has independent standard normal entries.
    """

    @abstractmethod
    def factors(self, leaf: Leaf, seed: int) -> Factors:
        """Return the factors of a direction on a matrix leaf.

        Args:
            leaf: a leaf of two or more dimensions.
            seed: the seed of the direction.
        """


def is_matrix(leaf: Leaf) -> bool:
    return leaf.parameter.ndim >= 2


@value
class LowRank(Factored):
    """z = A B' / sqrt(rank) on an m x n matrix leaf; A (m x rank) and B (n x rank) have standard normal entries.

    On leaves of fewer than two dimensions, z has independent standard normal entries.

    Law: E[z z'] = I. For any vector g, with g_M its part on matrix M of m x n elements,
    E[|z|^2 (g . z)^2] = (d + 2) |g|^2 + (2 / rank) sum over the matrices M of (m + n + 1) |g_M|^2.
    A Gaussian direction has only the first term, so the variance is larger here.

    Memory: z is never materialised. `add` stores the factors of one direction on one leaf at a time.

    Precision: `add` adds the outer products in place by fused multiply-adds (a CPU without them rounds twice). Unlike
    a matrix product, this gives the same bits for any number of threads. Half precision is computed in float32 and
    rounded once. The factors have the leaf's dtype, so that forward mode uses the same direction.

    Cost: in forward mode the output of a linear layer has the tangent dx W' + (x B) A' / sqrt(rank). W is the weight,
    x the input and dx the tangent of x. k directions in one forward pass cost 1 + k matmuls per layer instead of
    1 + 2k, plus rank (m + n) / (m n) matmuls per direction.

    `add` accepts complete leaves only: on a piece of a leaf it would add another direction.

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
        done: number of estimates so far.
        right: the seed of the current factor B.
    """

    done: int = 0
    right: int = 0


@value
class LazyLowRank(StatefulDirections):
    """z = A B' / sqrt(rank) as in `LowRank`, with a new A per probe and one B for `every` consecutive estimates.

    These `every` estimates are a period. On leaves of fewer than two dimensions, z has standard normal entries.

    Law: E[z z'] = I for random B. The key of a period's first estimate determines B. Given B, the mean estimate on a
    matrix leaf is G B B' / rank, with G the gradient. The rows of an estimate lie in the span of B's columns, so
    within a period the optimizer stays in a subspace of `rank` dimensions.

    Memory: the state is the number of estimates and the seed of B, 16 bytes. Training can resume within a period. A
    gradient regenerates the directions of its own estimate, even if B has changed since.

    Args:
        rank: the number of columns of A and B, at least 1.
        every: number of consecutive estimates that use one B, at least 1.
    Raises:
        BadInput: rank or every is below 1.
    Source: Chen et al., "Enhancing zeroth-order fine-tuning for language models with low-rank structures" (LOZO),
    arXiv 2410.07698 (2024), algorithm 1: their U is A, their V is B, nu is `every`. Their factor 1/r is here the
    square of the 1 / sqrt(rank) in z.
    """

    rank: int = 1
    every: int = 50
    unbiased = True

    def __post_init__(self) -> None:
        _check_rank(self.rank)
        if self.every < 1:
            raise BadInput(
                f"every, the number of estimates that use one factor B, must be 1 or more, not {self.every!r}. "
                "LowRank(rank) draws a new B for each probe."
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
    """The directions of one estimate. All have the same factor B, drawn from the seed `right`."""

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
    """Draw the factors from random streams of this leaf alone, independent of those of other leaves."""
    rows, columns = _shape(leaf)
    factors = []
    for key, size in ((left.fold("left", leaf.start), rows), (right.fold("right", leaf.start), columns)):
        zero = as_real(leaf.parameter.detach()).new_zeros(rank, size)
        factors.append(add_noise(philox.Normals(), [key.seed], [1.0], 0, zero, in_place=True))
    return Factors(*factors)


def _shape(leaf: Leaf) -> tuple[int, int]:
    rows = leaf.parameter.shape[0]
    return rows, real_count(leaf.parameter) // max(rows, 1)


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
    assert base.numel() == leaf.parameter.numel(), "add needs a complete leaf"
    out = base if in_place else base.detach().clone(memory_format=torch.contiguous_format)
    matrix = as_real(out).view(_shape(leaf))
    half = matrix.dtype not in (torch.float32, torch.float64)
    rows = max(1, _PIECE // max(matrix.shape[1], 1) if half else len(matrix))
    for at in range(0, len(matrix), rows):
        piece = matrix[at : at + rows]
        accumulator = piece.float() if half else piece
        for seed, scale in zip(seeds, scales, strict=True):
            _add_product(accumulator, directions.factors(leaf, seed).scaled(scale, accumulator.dtype), at)
        if half:
            piece.copy_(accumulator)
    return tag("shifted", out)


def _add_product(base: Tensor, factors: Factors, first: int) -> None:
    """Add left' right to `base`, whose first row is row `first` of the leaf. The factors are freed on return."""
    for column, row in zip(factors.left, factors.right, strict=True):
        base.addcmul_(column[first : first + len(base), None], row)
