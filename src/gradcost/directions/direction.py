"""Distributions of directions. A direction is a seed; its one operation is to add its multiple to a leaf.

`add` allocates at most one tensor of the leaf's size. It gives the same numbers at every call, in every process.
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

    unbiased: bool  # whether E[z z'] = I over the draw of a seed

    @abstractmethod
    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        """Return the seeds of one estimate's directions.

        Args:
            key: the key of the estimate.
            probes: how many directions.
            dimension: the objective's number of elements.
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
            leaf: the leaf, which determines the elements of z.
            seeds: the directions.
            scales: one factor per seed.
            in_place: change `base`, which must be contiguous, instead of making a tensor.
        Returns:
            A tensor of the shape and dtype of `base`, or `base` itself.
        """


class SparseDirections(Directions):
    """Directions that are zero on some leaves.

    There `add` returns `base` itself, so a finite difference copies nothing, and forward mode computes no
    tangent.
    """

    @abstractmethod
    def touches(self, leaf: Leaf, seeds: Sequence[int]) -> bool:
        """Return whether any of these directions may be nonzero on the leaf.

        Args:
            leaf: the leaf.
            seeds: the directions.
        """


class StatefulDirections(ABC):
    """Directions that depend on the weights or on earlier estimates: resolved to `Directions` at each estimate.

    `Probing` accepts them wherever it accepts `Directions`. A state is a tree of tensors and numbers (tuples, named
    tuples, dictionaries), so that it can be counted and saved; None for directions without memory.
    """

    unbiased: bool  # whether E[z z'] = I over the draw of a key

    @abstractmethod
    def init(self, objective: Objective) -> Any:
        """Return the state before the first estimate.

        Args:
            objective: the objective of the estimates.
        """

    @abstractmethod
    def resolve(self, objective: Objective, key: Key, state: Any) -> tuple[Directions, Any]:
        """Return the directions of one estimate, at the objective's present weights.

        Args:
            objective: the objective.
            key: the key of the estimate.
            state: from `init`, or from `update` after the last estimate.
        Returns:
            (directions, state). state: for `update` after this estimate.
        """

    @abstractmethod
    def update(self, state: Any, gradient: Iterator[tuple[str, Tensor]]) -> Any:
        """Return the state after an estimate.

        Args:
            state: the state that `resolve` returned.
            gradient: the estimated gradient: a name and a tensor per leaf.
        Returns:
            The state for the next estimate.
        """


def combination(directions: Directions, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float]) -> Tensor:
    """Return sum_k scales[k] * z_k on one leaf: a tensor of its shape, dtype and device."""
    zero = torch.zeros_like(leaf.parameter, requires_grad=False, memory_format=torch.contiguous_format)
    return directions.add(zero, leaf, seeds, scales, in_place=True)


def independent(key: Key, probes: int) -> tuple[int, ...]:
    """Return one unrelated seed per probe."""
    return tuple(key.fold("probe", number).seed for number in range(probes))
