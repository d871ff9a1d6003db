"""A direction is a seed: its one primitive is to be added, scaled, to a leaf.

`add` never makes more of it than the leaf that it is given, and makes the same numbers whenever and wherever it is
asked.
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
    """A distribution of directions in the space of an objective's leaves."""

    unbiased: bool  # whether E[z z'] = I over the draw of a seed

    @abstractmethod
    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        """One unsigned 64-bit seed for each of the estimate's directions."""

    @abstractmethod
    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        """base + sum_k scales[k] * z_k on one leaf: a new tensor of base's shape and dtype, or base itself."""


class SparseDirections(Directions):
    """Directions that are zero on whole leaves, and say on which: there a difference copies nothing (`add` gives base
    itself) and forward mode has no tangent, so that neither pays for what does not move."""

    @abstractmethod
    def touches(self, leaf: Leaf, seeds: Sequence[int]) -> bool:
        """Whether a direction of any of these seeds may be other than zero on the leaf."""


class StatefulDirections(ABC):
    """Directions that depend on where the weights are, or on what was found before: made anew for each estimate.

    `Probing` takes them wherever it takes `Directions`. A state is a tree of tensors and numbers (tuples, named
    tuples, dictionaries), so that it can be counted and kept; None is what `init` gives.
    """

    unbiased: bool  # whether E[z z'] = I over the draw of a key

    @abstractmethod
    def init(self, objective: Objective) -> Any:
        """What `settled` wants as its first state; None for directions that remember nothing."""

    @abstractmethod
    def resolve(self, objective: Objective, key: Key, state: Any) -> Directions:
        """The directions of one estimate, at the objective's present weights."""

    @abstractmethod
    def update(self, state: Any, gradient: Iterator[tuple[str, Tensor]]) -> Any:
        """The state after an estimate that found the gradient with these leaves."""


class Refreshed(StatefulDirections):
    """Stateful directions part of whose state is drawn again now and then, from the key of the estimate."""

    @abstractmethod
    def refreshed(self, key: Key, state: Any) -> Any:
        """The state with which the estimate of this key begins, as `settled` and `learned` get it."""


def begun(directions: StatefulDirections, key: Key, state: Any) -> Any:
    """The state with which the estimate of this key begins."""
    return directions.refreshed(key, state) if isinstance(directions, Refreshed) else state


def touches(directions: Directions, leaf: Leaf, seeds: Sequence[int]) -> bool:
    """Whether a direction of any of these seeds may be other than zero on the leaf."""
    return not isinstance(directions, SparseDirections) or directions.touches(leaf, seeds)


def combination(directions: Directions, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float]) -> Tensor:
    """sum_k scales[k] * z_k on one leaf: a tensor of its shape, dtype and device."""
    zero = torch.zeros_like(leaf.parameter, requires_grad=False, memory_format=torch.contiguous_format)
    return directions.add(zero, leaf, seeds, scales, in_place=True)


def independent(key: Key, probes: int) -> tuple[int, ...]:
    """One unrelated seed a probe."""
    return tuple(key.fold("probe", number).seed for number in range(probes))
