"""Distributions of directions. A direction is stored as a seed; `add` adds multiples of directions to a leaf.

`add` allocates at most one tensor of the leaf's size. Equal seeds give equal numbers, in every process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradcost.core.key import Key
from gradcost.core.objective import Leaf, Objective


class Directions(ABC):
    """A distribution of random directions z in the space of an objective's leaves."""

    unbiased: bool  # whether E[z z'] = I for a random seed
    # Whether the projection on the span of n <= d directions has the mean (n / d) I, as `Projection` needs. True if
    # their distribution is invariant to the sign of each entry and to permutations of the entries.
    symmetric: bool = False
    # Whether an element of z depends only on the seed and on the element's index in the vector of all leaves, so that
    # `add` may be called on a part of a leaf.
    elementwise: bool = False

    @abstractmethod
    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        """Return the seeds of one estimate's directions.

        Args:
            key: the key of the estimate.
            probes: number of directions.
            dimension: d, the total number of elements of the leaves.
        Returns:
            One unsigned 64-bit integer per direction.
        """

    @abstractmethod
    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        """Return base + sum_k scales[k] * z_k on one leaf.

        Args:
            base: a tensor of the leaf's shape.
            leaf: the leaf; z_k is restricted to its elements.
            seeds: one seed per direction z_k.
            scales: one factor per seed.
            in_place: True changes `base`, which must be contiguous, instead of allocating a tensor.
        Returns:
            A tensor of the shape and dtype of `base`, or `base` itself.
        """

    def draw(self, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], out: Tensor | None = None) -> Tensor:
        """Return sum_k scales[k] * z_k on one leaf: a tensor of the leaf's shape, dtype and device.

        Args:
            leaf: the leaf.
            seeds: one seed per direction z_k.
            scales: one factor per seed.
            out: a contiguous tensor for the result, whose content is ignored; None allocates one.
        """
        if out is None:
            out = torch.empty_like(leaf.parameter, requires_grad=False, memory_format=torch.contiguous_format)
        return self.add(out.zero_(), leaf, seeds, scales, in_place=True)


class SparseDirections(Directions):
    """Directions that are zero on some leaves.

    On such a leaf `add` returns `base` itself. A finite difference does not copy the leaf, and forward mode computes
    no tangent for it.
    """

    @abstractmethod
    def touches(self, leaf: Leaf, seeds: Sequence[int]) -> bool:
        """Return whether any of these directions may be nonzero on the leaf.

        Args:
            leaf: the leaf.
            seeds: the seeds of the directions.
        """


class StatefulDirections(ABC):
    """Directions that depend on the weights or on earlier estimates; `resolve` returns one estimate's `Directions`.

    `Probing` accepts them wherever it accepts `Directions`. The state is a pytree of tensors and numbers (tuples,
    named tuples, dictionaries), so that its bytes can be counted and it can be saved. It is None for directions that
    do not depend on earlier estimates.
    """

    unbiased: bool  # whether E[z z'] = I for a random key
    symmetric: bool = False  # as in `Directions`

    @abstractmethod
    def init(self, objective: Objective) -> Any:
        """Return the state before the first estimate.

        Args:
            objective: the objective of the estimates.
        """

    @abstractmethod
    def resolve(self, objective: Objective, key: Key, state: Any) -> tuple[Directions, Any]:
        """Return the directions of one estimate, at the objective's current weights.

        Args:
            objective: the objective.
            key: the key of the estimate.
            state: the result of `init` at the first estimate; later the result of the last `update`.
        Returns:
            (directions, state). state: the argument of `update` after this estimate.
        """

    @abstractmethod
    def update(self, state: Any, gradient: Iterator[tuple[str, Tensor]]) -> Any:
        """Return the state after an estimate.

        Args:
            state: the state that `resolve` returned.
            gradient: the estimated gradient: one (leaf name, tensor) per leaf.
        Returns:
            The state for the next estimate.
        """


def independent(key: Key, probes: int) -> tuple[int, ...]:
    """Return one unrelated seed per probe."""
    return tuple(key.fold("probe", number).seed for number in range(probes))
