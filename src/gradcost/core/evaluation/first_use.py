"""Results of the checks that run at the first use of a model and loss.

A check reads and writes `findings(model, loss)`. It writes only after success, so a check that raises runs again at
the next use. It runs only where `can_check(model)`. A loss may change during training, so a check is repeated at
the uses for which `is_due`.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from gradcost.core.fake import is_fake

Findings = dict[tuple[str, bool], Any]  # (purpose, train/eval flag) -> result of a check
_findings: WeakKeyDictionary[nn.Module, dict[Any, Findings]] = WeakKeyDictionary()
_structures: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # a hash of each model's modules
_MAX_LOSSES = 1000  # per model; bounds the memory if each step makes a new callable object


def findings(model: nn.Module, loss: Callable[..., Any]) -> Findings:
    """Return the results of the checks of this model and loss so far. Checks add their results to this dictionary."""
    losses = _findings.setdefault(model, {})
    if len(losses) > _MAX_LOSSES:
        losses.clear()
    return losses.setdefault(_identity(loss), {})


def forget_if_changed(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Drop the findings of a model if it has other modules or hooks than at the last call.

    Args:
        model: the model.
        modules: its modules.
    """
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules]
    structure = hash((tuple(map(id, modules)), tuple(map(type, modules)), tuple(hooks)))
    if _structures.setdefault(model, structure) != structure:
        _structures[model] = structure
        _findings.pop(model, None)


def is_due(uses: int) -> bool:
    """Return whether a check is repeated at this use: the 8th, 32nd, 128th, 512th, and so on.

    Args:
        uses: the number of uses, this one included.
    """
    return uses & (uses - 1) == 0 and uses >= 8 and uses.bit_length() % 2 == 0


def can_check(model: nn.Module) -> bool:
    """Return whether a check may evaluate the model: its tensors are real, and no dispatch mode would count it."""
    parameter = next(model.parameters(), None)
    if parameter is not None and (is_fake(parameter) or parameter.is_meta):
        return False
    return torch._C._len_torch_dispatch_stack() == 0


def _identity(loss: Any, depth: int = 4) -> Any:
    """Return a key that is equal for losses with the same code, such as one function that is defined twice."""
    if isinstance(loss, str | bool | None):
        return type(loss), loss  # such as reduction="sum"
    if not callable(loss) or depth == 0:
        return type(loss)  # not the value: numbers and tensors may differ at each step
    if isinstance(loss, types.MethodType):
        return _identity(loss.__func__, depth - 1), _reference(loss.__self__)
    if isinstance(loss, functools.partial):
        values = (loss.func, *loss.args, *loss.keywords.values())
        return tuple(_identity(value, depth - 1) for value in values)
    if isinstance(loss, types.FunctionType):
        cells = [_content(cell) for cell in loss.__closure__ or ()] + list(loss.__defaults__ or ())
        return loss.__code__, tuple(_identity(value, depth - 1) for value in cells)
    return _reference(loss)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


def _reference(value: Any) -> Any:
    """Return a weak reference to an object, or its type if it supports none."""
    try:
        reference = weakref.ref(value)
        hash(reference)
    except TypeError:
        return type(value)
    return reference
