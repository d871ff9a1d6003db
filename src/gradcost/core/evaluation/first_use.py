"""Results of the checks that run at the first use of a model and loss.

A check reads and writes `findings(model, loss)`. It writes only after success, so a check that raises runs again at
the next use. It runs only where `can_check(model)`. A loss may change during training, so a check is repeated at
the uses for which `is_due`.

Two losses with the same code and different numbers, such as the weight of a term that is 0 at first, are two losses.
But a number may differ at each step. So only the 1st, 2nd, 4th, 8th, ... set of numbers has findings of its own, and
the sets between have those of the one before them.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from gradcost.core.fake import is_fake
from gradcost.core.interrupts import is_own_hook

# Of each module of a model: a reference (an id may be that of a module that was freed), its type, number of hooks.
_Structure = list[tuple[weakref.ref[nn.Module], type[nn.Module], int]]
Findings = dict[tuple[str, bool], Any]  # (purpose, train/eval flag) -> result of a check
_findings: WeakKeyDictionary[nn.Module, dict[Any, dict[Any, Findings]]] = WeakKeyDictionary()  # by code, by numbers
_structures: WeakKeyDictionary[nn.Module, _Structure] = WeakKeyDictionary()
_MAX_LOSSES = 1000  # per model, and sets of numbers per loss; bounds the memory if each step makes a new one
_MAX_ITEMS = 16  # of a tuple or dictionary that is read


def findings(model: nn.Module, loss: Callable[..., Any]) -> Findings:
    """Return the results of the checks of this model and loss so far. Checks add their results to this dictionary."""
    losses = _findings.setdefault(model, {})
    if len(losses) > _MAX_LOSSES:
        losses.clear()
    constants: list[Any] = []
    versions = losses.setdefault(_identity(loss, constants), {})
    numbers = tuple(constants)
    if numbers not in versions:
        if len(versions) > _MAX_LOSSES:
            versions.clear()
        is_own = len(versions) & (len(versions) + 1) == 0  # its number is a power of 2
        versions[numbers] = {} if is_own else next(reversed(versions.values()))
    return versions[numbers]


def forget_if_changed(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Drop the findings of a model if it has other modules or hooks than at the last call.

    Args:
        model: the model.
        modules: its modules.
    """
    structure = [(weakref.ref(module), type(module), _hooks(module)) for module in modules]
    if _structures.setdefault(model, structure) != structure:
        _structures[model] = structure
        _findings.pop(model, None)


def _hooks(module: nn.Module) -> int:
    """Return the number of a module's forward hooks, without those of gradcost, which come and go."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return sum(not is_own_hook(hook) for hook in hooks)


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


def _identity(loss: Any, numbers: list[Any], depth: int = 4) -> Any:
    """Return a key that is equal for losses with the same code, such as one function that is defined twice.

    Args:
        loss: the loss, or a value that it uses.
        numbers: gets the numbers that it uses.
        depth: how deep values that it uses are followed.
    """

    def of(values: Iterable[Any]) -> Any:
        return tuple(_identity(value, numbers, depth - 1) for value in values)

    if isinstance(loss, str | bool | None):
        return type(loss), loss  # such as reduction="sum"
    if isinstance(loss, int | float | complex):
        numbers.append((type(loss), loss))
        return type(loss)
    if isinstance(loss, dict) and len(loss) <= _MAX_ITEMS:  # not its numbers: it may be a log
        return type(loss), tuple(
            (name, value) for name, value in loss.items() if isinstance(value, str | bool | None)
        )
    if isinstance(loss, tuple) and len(loss) <= _MAX_ITEMS and depth:
        return type(loss), of(loss)
    if not callable(loss) or depth == 0:
        return type(loss)  # not the value: tensors may differ at each step
    if isinstance(loss, types.MethodType):
        return *of([loss.__func__]), _reference(loss.__self__)
    if isinstance(loss, functools.partial):
        return of((loss.func, *loss.args, *loss.keywords.values()))
    if isinstance(loss, types.FunctionType):
        return loss.__code__, of([*map(_content, loss.__closure__ or ()), *(loss.__defaults__ or ())])
    attributes = getattr(loss, "__dict__", None)
    if isinstance(attributes, dict) and len(attributes) <= _MAX_ITEMS and not isinstance(loss, nn.Module | type):
        return type(loss), tuple(attributes), of(attributes.values())  # such as a loss with a weight
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
