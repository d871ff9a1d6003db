"""Configurations of torch.optim optimizers, and `Leafwise`, which applies one leaf by leaf."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from gradcost.core.blocks import find_blocks
from gradcost.core.errors import BadInput
from gradcost.core.fake import stands_for
from gradcost.core.objective import Leaf, Objective
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


SMALL = 1 << 16  # bytes; leaves below this size are grouped, with one optimizer call per group


class Leafwise:
    """One torch optimizer per group of leaves, so that each gradient can be freed before the next one is computed.

    A large leaf forms a group alone. Small leaves (below 64 KiB) are grouped, because an optimizer call per small
    leaf would cost more time than grouping costs memory. A block with a large leaf has groups of its own.

    Law: a step equals the step of one optimizer over all leaves after `gradient.write()`, bit for bit, because the
    update rules are elementwise. Memory: the gradient of one large leaf, plus the gradients of one group of small
    leaves.

    Args:
        optimizer: the configuration that every group uses.
        objective: the objective whose leaves are moved.
        at_once: whether all leaves form one group, as in a loop of `loss.backward(); optimizer.step()`, which holds
            all gradients. For forecasts of such a loop.
    """

    def __init__(self, optimizer: Optimizer, objective: Objective, at_once: bool = False) -> None:
        self.optimizer, self.at_once = optimizer, at_once
        self.step = 0
        self.rate: float | None = None  # the learning rate of the next step; None: that of the optimizer
        self.parameters = {leaf.name: leaf.parameter for leaf in objective.leaves}
        groups = [tuple(self.parameters)] if at_once else update_groups(objective)
        self.groups = {name: group for group in groups for name in group}
        leaves = {leaf.name: leaf for leaf in objective.leaves}
        self.parts = {group: optimizer.build([leaves[name] for name in group]) for group in self.groups.values()}
        if at_once and stands_for() == "cuda":
            for group in (group for part in self.parts.values() for group in part.param_groups):
                group["foreach"] = True  # torch's choice for parameters on CUDA
        # Per group: the gradients that have arrived; None for a leaf without one, or moved by pieces. They become `.grad` when
        # the last one is there, because an estimator may set `.grad` aside and restore it.
        self.waiting: dict[tuple[str, ...], dict[str, Tensor | None]] = {group: {} for group in self.parts}
        self.skipped: set[str] = set()  # the leaves that had no gradient in their latest step

    def use(self, name: str, gradient: Tensor) -> None:
        """Accept the gradient of one leaf. Once every leaf of its group was used or skipped, move the group.

        Call `use` or `skip` once per leaf and step, in any order. `.grad` of the leaves has the same value before and
        after.

        Args:
            name: the name of the leaf.
            gradient: the leaf's gradient, with the shape and dtype of the leaf.
        """
        if gradient.is_sparse and not _accepts_sparse(self.optimizer):
            gradient = gradient.to_dense()
        self.skipped.discard(name)
        self._arrived(name, gradient)

    def skip(self, name: str) -> None:
        """Accept that one leaf has no gradient in this step. Its weights and its state stay, as in torch.optim.

        Args:
            name: the name of the leaf.
        """
        self.skipped.add(name)
        self._arrived(name, None)

    def __call__(self, name: str, gradient: Tensor) -> None:
        """Call `use`."""
        self.use(name, gradient)

    @property
    def takes_pieces(self) -> bool:
        """Whether `use_piece` may be called: for plain SGD, which needs no other elements and no state."""
        optimizer = self.optimizer
        return not self.at_once and type(optimizer) is SGD and not optimizer.momentum and not optimizer.weight_decay

    def use_piece(self, name: str, start: int, gradient: Tensor) -> None:
        """Move some elements of one leaf, by the operation of torch's SGD. The last piece ends the leaf's step.

        Args:
            name: the name of the leaf.
            start: the first element, in row-major order.
            gradient: the gradient of this element and the following ones, a vector.
        """
        flat, end = self.parameters[name].detach().view(-1), start + gradient.numel()
        flat[start:end].add_(gradient, alpha=-self._rate())
        if end == flat.numel():
            self._arrived(name, None)

    def _arrived(self, name: str, gradient: Tensor | None) -> None:
        """Note the gradient of a leaf, or that there is nothing left to move; move the group after its last leaf."""
        group = self.groups[name]
        waiting, part = self.waiting[group], self.parts[group]
        waiting[name] = gradient
        if len(waiting) < len(group):
            return
        previous = {member: self.parameters[member].grad for member in group}
        has_any = any(waiting[member] is not None for member in group)
        for member in group:
            self.parameters[member].grad = waiting.pop(member)
        if has_any:
            if self.optimizer.decay or self.rate is not None:
                part.param_groups[0]["lr"] = self._rate()
            part.step()
        for member, grad in previous.items():
            self.parameters[member].grad = grad

    def _rate(self) -> float:
        return self.rate if self.rate is not None else self.present_rate

    @property
    def present_rate(self) -> float:
        """The learning rate of the optimizer at this step."""
        return self.optimizer.lr * math.exp(-self.optimizer.decay * self.step)

    def advance(self) -> None:
        """End the step: the next one uses the next decayed learning rate."""
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps taken and the torch state of each group, in the order of `parts`."""
        return {"step": self.step, "parts": [part.state_dict() for part in self.parts.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned for the same optimizer and leaves."""
        self.step = state["step"]
        for part, part_state in zip(self.parts.values(), state["parts"], strict=True):
            part.load_state_dict(part_state)


def _accepts_sparse(optimizer: Optimizer) -> bool:
    """Whether torch's optimizer accepts the sparse gradient of an embedding."""
    return isinstance(optimizer, SGD) and not optimizer.momentum and not optimizer.weight_decay


def update_groups(objective: Objective) -> list[tuple[str, ...]]:
    """Return the names of the leaves in each group: one large leaf, or small ones of up to about `SMALL` bytes.

    The small leaves of a block with a large leaf are in no group with other leaves. So all such blocks have equal
    groups, and the gradients of a group are complete at the end of the block's backward pass.
    """
    blocks = {
        id(parameter): number
        for number, block in enumerate(find_blocks(objective.model))
        for module in block
        for parameter in module.parameters()
    }
    large = [leaf for leaf in objective.leaves if leaf.parameter.nbytes >= SMALL]
    separate = {blocks[id(leaf.parameter)] for leaf in large if id(leaf.parameter) in blocks}
    groups: list[tuple[str, ...]] = [(leaf.name,) for leaf in large]
    small: list[Leaf] = []
    previous: int | None = None
    for leaf in objective.leaves:
        if leaf.parameter.nbytes < SMALL:
            block = blocks.get(id(leaf.parameter))
            if small and block != previous and {block, previous} & separate:
                groups.append(tuple(member.name for member in small))
                small = []
            previous = block
            small.append(leaf)
            if sum(member.parameter.nbytes for member in small) >= SMALL:
                groups.append(tuple(member.name for member in small))
                small = []
    return [*groups, tuple(leaf.name for leaf in small)] if small else groups
