"""Configurations of torch.optim optimizers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch

from gradcost.core.errors import BadInput
from gradcost.core.objective import Leaf
from gradcost.core.value import value


class LeafOptimizer(Protocol):
    """The interface of a torch optimizer over some leaves. `step` reads their `.grad`."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def step(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


ADAPTIVE_RATES = (3e-6, 0.3)  # around 0.001, where each step of Adam moves a weight by about the learning rate


class Optimizer(ABC):
    """The configuration of an optimizer. The learning rate of step t, from 0, is lr * exp(-decay * t).

    Class attribute:
    - `usual_rates`: the range in which a comparison searches the learning rate, five decades.
    """

    usual_rates: ClassVar[tuple[float, float]] = (1e-4, 10.0)
    lr: float
    decay: float

    @abstractmethod
    def build(self, leaves: Sequence[Leaf]) -> LeafOptimizer:
        """Build an optimizer that moves some leaves.

        Args:
            leaves: the trainable parameters to move.
        Returns:
            An optimizer with the constant learning rate `lr`. The caller applies the decay.
        """


def require_optimizer(optimizer: Any) -> None:
    """Raise BadInput if `optimizer` is not an `Optimizer`."""
    if not isinstance(optimizer, Optimizer):
        hint = "gradcost.SGD(0.1) or gradcost.AdamW(1e-3), which are torch's optimizers applied leaf by leaf"
        raise BadInput(f"the optimizer is of type {type(optimizer).__name__}: give {hint}.")


def with_rate(optimizer: Optimizer, lr: float) -> Optimizer:
    """Return an optimizer with another learning rate; for `Master` and `StochasticallyRounded` that of the inner one.

    Args:
        optimizer: any optimizer.
        lr: the learning rate.
    """
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, Optimizer):
        return replace(optimizer, optimizer=with_rate(inner, lr))  # type: ignore[type-var]
    return replace(optimizer, lr=lr)  # type: ignore[type-var]


def _parameters(leaves: Sequence[Leaf]) -> list[torch.nn.Parameter]:
    return [leaf.parameter for leaf in leaves]


_ENDS = {"momentum": math.inf, "weight_decay": math.inf, "eps": math.inf, "beta1": 1.0, "beta2": 1.0}  # not included


def _require_valid_numbers(optimizer: Optimizer) -> None:
    """Check `lr`, `decay` and the other numbers that an optimizer of this file may have."""
    if not (optimizer.lr > 0 and math.isfinite(optimizer.lr)):
        raise BadInput(f"lr, the learning rate, must be finite and above 0, not {optimizer.lr!r}.")
    if not 0 <= optimizer.decay < math.inf:
        rate = "decay, the rate in lr * exp(-decay * step),"
        raise BadInput(f"{rate} must be finite and 0 or more, not {optimizer.decay!r}.")
    for name, end in _ENDS.items():
        number = getattr(optimizer, name, 0.0)
        if not 0 <= number < end:
            below = "below 1" if end == 1 else "finite"
            raise BadInput(f"{name} of {type(optimizer).__name__} must be 0 or more and {below}, not {number!r}.")


@value
class SGD(Optimizer):
    """Gradient descent (`torch.optim.SGD`).

    Args:
        lr: learning rate, above 0.
        momentum: heavy-ball momentum, 0 or more; 0 turns it off.
        weight_decay: weight_decay * parameter is added to the gradient (L2 penalty); 0 or more.
        decay: decay rate of the learning rate, which is lr * exp(-decay * step); 0 or more.
    Raises:
        BadInput: a number is outside of its range, or not finite.
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    decay: float = 0.0

    def __post_init__(self) -> None:
        _require_valid_numbers(self)

    def build(self, leaves: Sequence[Leaf]) -> LeafOptimizer:
        return torch.optim.SGD(_parameters(leaves), self.lr, self.momentum, weight_decay=self.weight_decay)


@value
class Nesterov(Optimizer):
    """Gradient descent with Nesterov's momentum (`torch.optim.SGD(nesterov=True)`).

    Args:
        lr: learning rate, above 0.
        momentum: Nesterov's momentum, above 0.
        weight_decay: weight_decay * parameter is added to the gradient (L2 penalty); 0 or more.
        decay: decay rate of the learning rate, which is lr * exp(-decay * step); 0 or more.
    Raises:
        BadInput: a number is outside of its range, or not finite.
    """

    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    decay: float = 0.0

    def __post_init__(self) -> None:
        _require_valid_numbers(self)
        if not self.momentum > 0:
            raise BadInput(f"Nesterov's momentum must be above 0, not {self.momentum!r}: use SGD without momentum.")

    def build(self, leaves: Sequence[Leaf]) -> LeafOptimizer:
        return torch.optim.SGD(
            _parameters(leaves), self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=True
        )


@value
class Adam(Optimizer):
    """Adam (`torch.optim.Adam`).

    Args:
        lr: learning rate, above 0.
        beta1: decay rate of the running mean of the gradients, 0 or more and below 1.
        beta2: decay rate of the running mean of the squared gradients, 0 or more and below 1.
        eps: added to the denominator, 0 or more.
        decay: decay rate of the learning rate, which is lr * exp(-decay * step); 0 or more.
    Raises:
        BadInput: a number is outside of its range, or not finite.
    Source: Kingma and Ba 2015.
    """

    usual_rates: ClassVar[tuple[float, float]] = ADAPTIVE_RATES
    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0

    def __post_init__(self) -> None:
        _require_valid_numbers(self)

    def build(self, leaves: Sequence[Leaf]) -> LeafOptimizer:
        return torch.optim.Adam(_parameters(leaves), self.lr, (self.beta1, self.beta2), self.eps)


@value
class AdamW(Optimizer):
    """Adam with decoupled weight decay (`torch.optim.AdamW`).

    Args:
        lr: learning rate, above 0.
        beta1: decay rate of the running mean of the gradients, 0 or more and below 1.
        beta2: decay rate of the running mean of the squared gradients, 0 or more and below 1.
        eps: added to the denominator, 0 or more.
        weight_decay: each step multiplies the weights by 1 - lr * weight_decay; 0 or more.
        decay: decay rate of the learning rate, which is lr * exp(-decay * step); 0 or more.
    Raises:
        BadInput: a number is outside of its range, or not finite.
    Source: Loshchilov and Hutter 2019.
    """

    usual_rates: ClassVar[tuple[float, float]] = ADAPTIVE_RATES
    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    decay: float = 0.0

    def __post_init__(self) -> None:
        _require_valid_numbers(self)

    def build(self, leaves: Sequence[Leaf]) -> LeafOptimizer:
        betas = (self.beta1, self.beta2)
        return torch.optim.AdamW(_parameters(leaves), self.lr, betas, self.eps, weight_decay=self.weight_decay)
