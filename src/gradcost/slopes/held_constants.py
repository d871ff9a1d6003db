"""Hold the constant parts of a loss at their values while a finite difference moves the weights.

Backprop treats two results inside a loss as constants: those under `torch.no_grad()`, and derivatives without
create_graph. If they depend on activations or on the weights of a running module, they change at moved weights. So
one evaluation at the original weights records their inputs, and evaluations at moved weights use the record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from gradcost.core.errors import Unsupported
from gradcost.core.evaluation.autograd_use import SET_GRAD_ENABLED, gives_constants, known_use
from gradcost.core.evaluation.gradient_mode import in_constant_part
from gradcost.core.key import Key
from gradcost.core.notes import warn_once
from gradcost.core.objective import Objective
from gradcost.slopes.rules import RULES
from gradcost.slopes.substitution import UNREAD, with_rules


class HeldConstants:
    """The inputs of the constant parts of one evaluation, in the order of the calls of torch functions.

    Args:
        values: one entry per tensor argument (None if it does not depend on the weights) and per result of
            torch.autograd.grad.
    """

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the context, constant parts use these values. Enter it inside `substituted`."""
        mode = _Replacer(self.values)
        with mode:
            yield
        if mode.position != len(self.values):
            raise Unsupported(_OTHER_CALLS)


def held_constants(objective: Objective, batch: Any, key: Key) -> HeldConstants | None:
    """Record the inputs of the constant parts of the loss. Cost: one forward pass, or none if the result is None.

    Args:
        objective: the model and the loss.
        batch: any pytree; passed to the loss as it is.
        key: seeds the random layers.
    Returns:
        The record; None if no constant part depends on activations or moved weights.
    Raises:
        Unsupported: the constant parts are inside torch.func transforms, or a part of a computed weight is constant.
    """
    use = known_use(objective)
    if use is not None and use.detaches:
        warn_once(objective.model, "detach", _DETACHES)
    if use is not None and use.pads:
        raise Unsupported(
            "an embedding has a padding_idx, and its weight is computed from parameters. Backprop gives its padding "
            "row no gradient; a finite difference moves it. Use forward_gradient() or backprop()."
        )
    if use is None or not (use.reads_moved or use.uses_slopes):
        return None
    if use.transforms:
        raise Unsupported(
            "the loss computes with activations under torch.no_grad(), or calls torch.autograd.grad without "
            "create_graph, and it applies torch.func transforms. A finite difference cannot hold these constants. "
            "Use forward_gradient() or backprop()."
        )
    recorder = _Recorder()
    with with_rules(RULES), recorder:
        objective.evaluate(batch, key)
    return HeldConstants(recorder.values)


class _ConstantPartMode(TorchFunctionMode):
    """Replaces each tensor argument of torch functions in constant parts by `take(argument)`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if gives_constants(func, *args, **kwargs):
            return self.slopes(lambda: func(*args, **kwargs))
        if func is not SET_GRAD_ENABLED and func not in UNREAD and in_constant_part():
            args, kwargs = pytree.tree_map(self._taken, (args, kwargs))
        return func(*args, **kwargs)

    def _taken(self, argument: Any) -> Any:
        is_number = isinstance(argument, Tensor) and (argument.is_floating_point() or argument.is_complex())
        return self.take(argument) if is_number else argument

    def take(self, argument: Tensor) -> Tensor:
        raise NotImplementedError

    def slopes(self, differentiate: Callable[[], Any]) -> Any:
        raise NotImplementedError


class _Recorder(_ConstantPartMode):
    """Records the arguments that depend on the weights. No weight is substituted here, so they require a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Any] = []

    def take(self, argument: Tensor) -> Tensor:
        value = argument.detach() if argument.requires_grad else None
        # A later operation may change an activation in place.
        self.values.append(value if value is None or isinstance(argument, nn.Parameter) else value.clone())
        return argument

    def slopes(self, differentiate: Callable[[], Any]) -> Any:
        derivatives = differentiate()
        self.values.append(pytree.tree_map_only(Tensor, torch.clone, derivatives))
        return derivatives


class _Replacer(_ConstantPartMode):
    """Replaces the arguments by the recorded values."""

    def __init__(self, values: list[Any]) -> None:
        super().__init__()
        self.values, self.position = values, 0

    def take(self, argument: Tensor) -> Tensor:
        value = self._next()
        if value is None:
            return argument
        if not isinstance(value, Tensor) or value.shape != argument.shape or value.dtype != argument.dtype:
            raise Unsupported(_OTHER_CALLS)
        return value

    def slopes(self, differentiate: Callable[[], Any]) -> Any:
        return pytree.tree_map_only(Tensor, torch.clone, self._next())

    def _next(self) -> Any:
        if self.position == len(self.values):
            raise Unsupported(_OTHER_CALLS)
        self.position += 1
        return self.values[self.position - 1]


_DETACHES = (
    "the loss uses `.detach()` or `.data` of an activation. For backprop the result is a constant; in a "
    "finite difference it changes with the weights. Compute it under torch.no_grad() to hold it "
    "constant, or use forward_gradient() or backprop()."
)
_OTHER_CALLS = (
    "at moved weights the loss calls other functions under torch.no_grad(), so a finite difference cannot hold their "
    "results constant. Use forward_gradient() or backprop()."
)
