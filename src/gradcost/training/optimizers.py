"""The optimizers of torch.optim as values, and their use leaf by leaf."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gradcost.core.errors import BadInput
from gradcost.core.objective import Leaf, Objective
from gradcost.core.value import value


class LeafOptimizer(Protocol):
    """A torch optimizer over a few leaves, or an object with the same interface. It reads `.grad`."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def step(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


class Optimizer(ABC):
    """The configuration of an optimizer. The learning rate of step t, from 0, is lr * exp(-decay * t)."""

    lr: float
    decay: float

    @abstractmethod
    def build(self, leaves: Sequence[Leaf]) -> LeafOptimizer:
        """Build the optimizer of some leaves.

        Args:
            leaves: the trainable parameters that it moves.
        Returns:
            An optimizer with the learning rate `lr`. The caller applies the decay.
        """


def _parameters(leaves: Sequence[Leaf]) -> list[torch.nn.Parameter]:
    return [leaf.parameter for leaf in leaves]


def _check(optimizer: Optimizer) -> None:
    if not (optimizer.lr > 0 and math.isfinite(optimizer.lr)):
        raise BadInput(f"lr, the learning rate, must be finite and above 0, not {optimizer.lr!r}.")
    if not optimizer.decay >= 0:
        raise BadInput(f"decay, the rate in lr * exp(-decay * step), must be 0 or more, not {optimizer.decay!r}.")


@value
class SGD(Optimizer):
    """Gradient descent (`torch.optim.SGD`).

    Args:
        lr: learning rate, above 0.
        momentum: heavy-ball momentum; 0 is none.
        weight_decay: factor of the L2 penalty's gradient.
        decay: rate of the learning rate's decay, lr * exp(-decay * step).
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    decay: float = 0.0

    def __post_init__(self) -> None:
        _check(self)

    def build(self, leaves: Sequence[Leaf]) -> LeafOptimizer:
        return torch.optim.SGD(_parameters(leaves), self.lr, self.momentum, weight_decay=self.weight_decay)


@value
class Nesterov(Optimizer):
    """Gradient descent with Nesterov's momentum (`torch.optim.SGD(nesterov=True)`).

    Args:
        lr: learning rate, above 0.
        momentum: Nesterov's momentum, above 0.
        weight_decay: factor of the L2 penalty's gradient.
        decay: rate of the learning rate's decay, lr * exp(-decay * step).
    """

    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    decay: float = 0.0

    def __post_init__(self) -> None:
        _check(self)

    def build(self, leaves: Sequence[Leaf]) -> LeafOptimizer:
        return torch.optim.SGD(
            _parameters(leaves), self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=True
        )


@value
class Adam(Optimizer):
    """Adam (`torch.optim.Adam`).

    Args:
        lr: learning rate, above 0.
        beta1: decay rate of the mean of the gradients.
        beta2: decay rate of the mean of their squares.
        eps: added to the denominator.
        decay: rate of the learning rate's decay, lr * exp(-decay * step).
    Source: Kingma and Ba 2015.
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0

    def __post_init__(self) -> None:
        _check(self)

    def build(self, leaves: Sequence[Leaf]) -> LeafOptimizer:
        return torch.optim.Adam(_parameters(leaves), self.lr, (self.beta1, self.beta2), self.eps)


@value
class AdamW(Optimizer):
    """Adam with decoupled weight decay (`torch.optim.AdamW`).

    Args:
        lr: learning rate, above 0.
        beta1: decay rate of the mean of the gradients.
        beta2: decay rate of the mean of their squares.
        eps: added to the denominator.
        weight_decay: each step multiplies the weights by 1 - lr * weight_decay.
        decay: rate of the learning rate's decay, lr * exp(-decay * step).
    Source: Loshchilov and Hutter 2019.
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    decay: float = 0.0

    def __post_init__(self) -> None:
        _check(self)

    def build(self, leaves: Sequence[Leaf]) -> LeafOptimizer:
        betas = (self.beta1, self.beta2)
        return torch.optim.AdamW(_parameters(leaves), self.lr, betas, self.eps, weight_decay=self.weight_decay)


SMALL = 1 << 16  # bytes; smaller leaves share one optimizer call


class Leafwise:
    """torch optimizers over a few leaves each, so that a gradient is used and dropped leaf by leaf.

    Law: a step equals that of one optimizer over all leaves after `gradient.write()`, bit for bit. These optimizers
    are elementwise. Memory: one large leaf's `.grad`, and those of a group of small leaves (below 64 KiB). A group
    shares one optimizer call, which costs more time than the group costs memory.

    Args:
        optimizer: the configuration of all of them.
        objective: the objective whose leaves move.
    """

    def __init__(self, optimizer: Optimizer, objective: Objective) -> None:
        self.optimizer = optimizer
        self.step = 0
        self.parameters = {leaf.name: leaf.parameter for leaf in objective.leaves}
        self.groups = {name: group for group in _groups(objective.leaves) for name in group}
        leaves = {leaf.name: leaf for leaf in objective.leaves}
        self.parts = {group: optimizer.build([leaves[name] for name in group]) for group in self.groups.values()}
        self.waiting: dict[tuple[str, ...], dict[str, Tensor | None]] = {group: {} for group in self.parts}

    def use(self, name: str, gradient: Tensor) -> None:
        """Move a leaf along its gradient, together with its group. A `.grad` that the leaf had before is restored.

        Call it once per leaf and step, in any order.

        Args:
            name: the name of the leaf.
            gradient: of its shape and dtype.
        """
        group, parameter = self.groups[name], self.parameters[name]
        waiting, part = self.waiting[group], self.parts[group]
        waiting[name], parameter.grad = parameter.grad, gradient
        if len(waiting) < len(group):
            return
        if self.optimizer.decay:
            part.param_groups[0]["lr"] = self.optimizer.lr * math.exp(-self.optimizer.decay * self.step)
        part.step()
        for member, previous in waiting.items():
            self.parameters[member].grad = previous
        waiting.clear()

    def advance(self) -> None:
        """End the step: the learning rate decays."""
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the step and each group's torch state, in the order of the leaves."""
        return {"step": self.step, "parts": [part.state_dict() for part in self.parts.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned for the same optimizer and leaves."""
        self.step = state["step"]
        for part, part_state in zip(self.parts.values(), state["parts"], strict=True):
            part.load_state_dict(part_state)


def _groups(leaves: Sequence[Leaf]) -> list[tuple[str, ...]]:
    """Return one group per large leaf, and groups of consecutive small leaves of `SMALL` bytes or more together."""
    groups: list[tuple[str, ...]] = [(leaf.name,) for leaf in leaves if leaf.parameter.nbytes >= SMALL]
    small: list[Leaf] = []
    for leaf in leaves:
        if leaf.parameter.nbytes < SMALL:
            small.append(leaf)
            if sum(member.parameter.nbytes for member in small) >= SMALL:
                groups.append(tuple(member.name for member in small))
                small = []
    return [*groups, tuple(leaf.name for leaf in small)] if small else groups
