"""Evaluate a loss in the gradient mode that it needs, and return it without an autograd graph.

An ordinary loss is evaluated under `torch.no_grad()`. Gradients are on for three kinds of losses (`AutogradUse`):

- A loss that differentiates, as physics-informed networks and energy-force models do by `torch.autograd.grad`.
- A loss with constant parts, such as the target of a teacher under `torch.no_grad()`. An outer `torch.no_grad()`
  would hide where such a part begins and ends.
- A loss that has another value with gradients off.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from gradcost.core.errors import Unsupported
from gradcost.core.evaluation.autograd_use import (
    SET_GRAD_ENABLED,
    AutogradUse,
    ConstantParts,
    drop,
    examine,
    known_use,
)
from gradcost.core.evaluation.first_use import can_check
from gradcost.core.interrupts import raise_interrupt, undoing

T = TypeVar("T")


class _Evaluation:
    """An evaluation with gradients on.

    Args:
        use: what the loss does with autograd.
    """

    def __init__(self, use: AutogradUse) -> None:
        self.use, self.parts = use, ConstantParts()
        self.level = functorch.maybe_current_level()
        self.forward_mode = torch._C._is_fwd_grad_enabled()


class _State(threading.local):
    """The evaluation that runs in this thread.

    evaluation: the evaluation with gradients on, or None.
    is_attempt: whether the loss runs without the result of an examination.
    examines: whether this attempt ends in `_Unknown` if the loss sets the gradient mode.
    raises_unknown: whether setting the gradient mode raises `_Unknown` now, while the loss runs.
    """

    evaluation: _Evaluation | None = None
    is_attempt = False
    examines = False
    raises_unknown = False


_state = _State()


class _Unknown(BaseException):
    """A loss sets the gradient mode, and no examination has seen that it does."""


def with_known_use(method: Callable[..., T]) -> Callable[..., T]:
    """Decorate a method (self, objective, batch, key, ...) that evaluates substituted weights.

    The first call examines the loss, then runs the method. On fake tensors, and under a dispatch mode (which counts
    every operation), the loss is examined only if the method fails or the loss sets the gradient mode.

    A loss may change during training (a consistency term after a warm-up). It is examined again if the method fails,
    or if the loss sets the gradient mode for the first time.
    """

    @functools.wraps(method)
    def informed(self: Any, objective: Any, batch: Any, key: Any, *rest: Any) -> T:
        use = known_use(objective)
        if use is None and not _state.is_attempt:
            if can_check(objective.model):
                use = examine(objective, batch, key)
            else:
                try:
                    with _attempt(examines=True):
                        return method(self, objective, batch, key, *rest)
                except (_Unknown, RuntimeError, NotImplementedError) as error:
                    raise_interrupt(error)
                    use = examine(objective, batch, key)
                    if not isinstance(error, _Unknown) and (use is None or not any(use)):
                        raise
        if _state.is_attempt:
            return method(self, objective, batch, key, *rest)
        if use is not None:
            try:
                return method(self, objective, batch, key, *rest)
            except (_Unknown, RuntimeError, NotImplementedError) as error:
                raise_interrupt(error)
                if _state.evaluation is not None or examine(objective, batch, key) in (None, use):
                    raise
            return method(self, objective, batch, key, *rest)
        with _attempt(examines=False):
            return method(self, objective, batch, key, *rest)

    return informed


@contextmanager
def _attempt(examines: bool) -> Iterator[None]:
    def restore() -> None:
        _state.is_attempt = _state.examines = _state.raises_unknown = False

    with undoing(restore):
        _state.is_attempt, _state.examines = True, examines
        yield


def evaluated(objective: Any, batch: Any, key: Any, evaluate: Callable[[], Tensor]) -> Tensor:
    """Return `evaluate()` in the gradient mode that the objective's loss needs.

    Args:
        objective: the Objective.
        batch: any pytree.
        key: seeds the random layers.
        evaluate: returns the loss of the batch. It is called again if the first call fails because the
            loss differentiates.
    Returns:
        The loss, without an autograd graph.
    """
    use = known_use(objective)
    if use is None or not use.needs_gradients:
        try:
            with _gradients_off(raises_unknown=use is not None and not use.sets_mode):
                return evaluate()
        except RuntimeError as error:
            raise_interrupt(error)
            if use is not None or _state.is_attempt or not is_plain():
                raise
            use = examine(objective, batch, key)
            if use is None or not use.needs_gradients:
                raise
    with gradients_on(use):
        return without_graph(evaluate())


@contextmanager
def _gradients_off(raises_unknown: bool) -> Iterator[None]:
    """Like `torch.no_grad()`, but torch function modes do not see it: they see only the modes that the loss sets.

    Args:
        raises_unknown: whether the loss raises `_Unknown` if it sets the gradient mode.
    """
    before = torch.is_grad_enabled(), _state.raises_unknown

    def restore() -> None:
        enabled, _state.raises_unknown = before
        with torch._C.DisableTorchFunction():
            SET_GRAD_ENABLED(enabled)

    with undoing(restore):
        with torch._C.DisableTorchFunction():
            SET_GRAD_ENABLED(False)
        _state.raises_unknown = raises_unknown or _state.examines
        yield


def is_plain() -> bool:
    """Return whether no part of gradcost replaces weights or functions, and no transform is active."""
    modes = torch.overrides._get_current_function_mode_stack()
    return (
        functorch.maybe_current_level() is None
        and forward_ad._current_level < 0
        and all(type(mode).__module__.startswith("torch.") for mode in modes)
    )


def in_either_mode(evaluate: Callable[[], Tensor]) -> Tensor:
    """Return `evaluate()` with gradients off; if that fails, as for a loss that differentiates, with gradients on."""
    try:
        with torch.no_grad():
            return evaluate()
    except RuntimeError as error:
        raise_interrupt(error)
        with torch.enable_grad():
            return evaluate().detach()


@contextmanager
def gradients_on(use: AutogradUse) -> Iterator[None]:
    """Switch gradients on inside the context, and track the constant parts of the loss.

    The autograd graph saves no tensor, unless the loss differentiates or applies `torch.func` transforms.

    Args:
        use: what the loss does with autograd.
    """
    before, evaluation = _state.evaluation, _Evaluation(use)
    keeps_graph = use.differentiates or use.transforms  # transforms do not allow hooks on saved tensors

    def restore() -> None:
        _state.evaluation = before
        torch._C._set_fwd_grad_enabled(evaluation.forward_mode)

    with undoing(restore):
        _state.evaluation = evaluation
        with torch.enable_grad(), nullcontext() if keeps_graph else saved_tensors_hooks(drop, _refuse):
            yield


def in_constant_part() -> bool:
    """Return whether the loss is inside its own `torch.no_grad()` or `torch.inference_mode()`."""
    evaluation = _state.evaluation
    return evaluation is not None and (evaluation.parts.is_inside or torch.is_inference_mode_enabled())


def set_grad_enabled(enabled: bool) -> None:
    """Replace `torch._C._set_grad_enabled` while substituted weights are evaluated.

    Forward-mode differentiation ignores `torch.no_grad()`. This function makes it stop there, as backprop does.

    Raises:
        Unsupported: the loss computes with activations under `torch.no_grad()` inside a forward-mode transform.
    """
    if _state.raises_unknown:
        raise _Unknown
    was_enabled, evaluation = torch.is_grad_enabled(), _state.evaluation
    SET_GRAD_ENABLED(enabled)
    if evaluation is None or not evaluation.parts.follow(was_enabled, enabled):
        return
    if not (evaluation.use.forward_mode and functorch.maybe_current_level() != evaluation.level):
        torch._C._set_fwd_grad_enabled(enabled and evaluation.forward_mode)
    elif evaluation.use.reads_moved:  # forward mode cannot be off: it would stop the transform's own tangents
        raise Unsupported(
            "the loss computes with activations under torch.no_grad() inside a forward-mode transform, such as "
            "torch.func.jvp. Use .detach() there, or use backprop()."
        )


def without_graph(loss: Tensor) -> Tensor:
    """Return a loss without its autograd graph. A forward-mode tangent stays attached."""
    if not loss.requires_grad:
        return loss
    if forward_ad._current_level < 0:
        return loss.detach()
    primal, tangent = forward_ad.unpack_dual(loss)
    return primal.detach() if tangent is None else forward_ad.make_dual(primal.detach(), tangent.detach())


def _refuse(dropped: None) -> Tensor:
    raise Unsupported(
        "the loss differentiates (torch.autograd.grad or backward), and it did not when it was first evaluated. Use "
        "two loss functions: one that always differentiates, and one that never does."
    )
