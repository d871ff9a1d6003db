"""Explain why a model or a method cannot be simulated on fake tensors."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)
from torch.utils._python_dispatch import _disable_current_modes

from gradcost.core.errors import BadInput, GradcostError, Unsupported, brief, first_line
from gradcost.core.fake import is_fake
from gradcost.core.key import Key
from gradcost.core.objective import Objective, loss_errors
from gradcost.core.pytree import tensors
from gradcost.core.user_errors import line_of, line_outside

_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
_INSTEAD = "Measure a step on a small batch instead: gradcost.measure(gradcost.instruments.TrainingStep(...))."


@contextmanager
def simulation_errors(objective: Objective, batch: Any) -> Iterator[None]:
    """Convert every exception of a simulation inside the context to a GradcostError with the true reason.

    An error that is not due to missing values comes from the loss or from the simulation. To find out which, the
    loss is evaluated once on the real batch. This is impossible if the model or the batch is on the `meta` device.

    Raises:
        BadInput: the loss cannot be evaluated on this batch; on `meta`: the loss or the simulation fails.
        Unsupported: the loss can be evaluated, but not simulated; the message names the module and an alternative.
    """
    try:
        with _quiet():
            yield
    except GradcostError:
        raise
    except _NEEDS_VALUES as error:
        raise Unsupported(
            f"{_place(objective.model, error)} reads values of a tensor, which a forecast does not have: "
            f"{_quoted(error) or first_line(error)}. {_advice(objective.model)}{_INSTEAD}"
        ) from error
    except Exception as error:
        all_tensors = (*objective.model.parameters(), *objective.model.buffers(), *tensors(batch))
        if any(is_fake(tensor) or tensor.is_meta for tensor in all_tensors):
            raise BadInput(
                f"the loss of {type(objective.model).__name__} cannot be evaluated on this batch: "
                f"{brief(error)}{line_of(error)}, in {_place(objective.model, error)}. "
                f"If it can be evaluated on real tensors, the simulation is the cause. {_INSTEAD}"
            ) from error
        with loss_errors(objective), _disable_current_modes():
            objective.evaluate(batch, Key(0))
        raise Unsupported(
            f"{_place(objective.model, error)} fails on tensors without data, which a forecast uses: "
            f"{brief(error)}. {_INSTEAD}"
        ) from error


def _place(model: nn.Module, error: BaseException) -> str:
    """Return the name of the innermost module of the model in whose forward pass an error was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    innermost, frame = "", error.__traceback__
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        innermost = names.get(id(owner), innermost) if isinstance(owner, nn.Module) else innermost
        frame = frame.tb_next
    return f"{innermost} of {type(model).__name__}" if innermost else type(model).__name__


def _quoted(error: BaseException) -> str:
    line = line_outside(error)
    return f"`{line.line}` ({os.path.basename(line.filename)}, line {line.lineno})" if line is not None else ""


def _advice(model: nn.Module) -> str:
    """Return how to make a transformers mixture of experts run on fake tensors; "" for other models."""
    can_set = getattr(model, "_can_set_experts_implementation", lambda: False)()
    if not can_set or getattr(model.config, "_experts_implementation", None) == "grouped_mm":
        return ""
    return 'Call model.set_experts_implementation("grouped_mm"), which reads no values. '


@contextmanager
def _quiet() -> Iterator[None]:
    """Stop torch from logging a traceback when an operator fails on fake tensors. The error is still raised."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
