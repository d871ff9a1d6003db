"""torch.optim's optimizers as values, and their use leaf by leaf."""

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
    """What moves a few leaves by their `.grad`: a torch optimizer, or what does as one does."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def step(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


class Optimizer(ABC):
    """A configuration of an optimizer, with a learning rate that decays as lr * exp(-decay * step)."""

    lr: float
    decay: float

    @abstractmethod
    def build(self, leaves: Sequence[Leaf]) -> LeafOptimizer:
        """What moves these leaves, at the first step's learning rate."""


def _parameters(leaves: Sequence[Leaf]) -> list[torch.nn.Parameter]:
    return [leaf.parameter for leaf in leaves]


def _check(optimizer: Optimizer) -> None:
    if not (optimizer.lr > 0 and math.isfinite(optimizer.lr)):
        raise BadInput(f"a learning rate is a finite number above 0, not {optimizer.lr!r}.")
    if not optimizer.decay >= 0:
        raise BadInput(f"decay is the rate of lr * exp(-decay * step), 0 or more, not {optimizer.decay!r}.")


@value
class SGD(Optimizer):
    """Gradient descent (`torch.optim.SGD`), with momentum if it is above 0."""

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
    """Gradient descent with Nesterov's momentum (`torch.optim.SGD(nesterov=True)`)."""

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
    """Adam (Kingma and Ba 2015; `torch.optim.Adam`)."""

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
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019; `torch.optim.AdamW`)."""

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


SMALL = 1 << 16  # bytes; leaves below share a call of the optimizer


class Leafwise:
    """torch optimizers over a few leaves each, so that a gradient is used and dropped leaf by leaf.

    Law: a step is what one optimizer over all leaves would do after `gradient.write()`, bit for bit: these
    optimizers treat every element by itself. Beside one leaf's `.grad` only some of less than 64 KiB exist:
    those wait for each other, because a call of an optimizer costs more than they do.
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
        """Move a leaf along its gradient, with its group; called once a leaf and step, in any order.

        A leaf's own `.grad`, if it had one, is put back.
        """
        group, parameter = self.groups[name], self.parameters[name]
        waiting, part = self.waiting[group], self.parts[group]
        waiting[name], parameter.grad = parameter.grad, gradient
        if len(waiting) < len(group):
            return
        if self.optimizer.decay:
            part.param_groups[0]["lr"] = self.optimizer.lr * math.exp(-self.optimizer.decay * self.step)
        part.step()
        for member, kept in waiting.items():
            self.parameters[member].grad = kept
        waiting.clear()

    def advance(self) -> None:
        """The step is over: the learning rate decays."""
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """The step and each group's torch state, in the order of the leaves."""
        return {"step": self.step, "parts": [part.state_dict() for part in self.parts.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave for the same optimizer and leaves."""
        self.step = state["step"]
        for part, held in zip(self.parts.values(), state["parts"], strict=True):
            part.load_state_dict(held)


def _groups(leaves: Sequence[Leaf]) -> list[tuple[str, ...]]:
    """Every large leaf by itself, the small ones in the order of the leaves until they are large together."""
    groups: list[tuple[str, ...]] = [(leaf.name,) for leaf in leaves if leaf.parameter.nbytes >= SMALL]
    small: list[Leaf] = []
    for leaf in leaves:
        if leaf.parameter.nbytes < SMALL:
            small.append(leaf)
            if sum(member.parameter.nbytes for member in small) >= SMALL:
                groups.append(tuple(member.name for member in small))
                small = []
    return [*groups, tuple(leaf.name for leaf in small)] if small else groups
