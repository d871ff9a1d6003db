"""Methods, optimizers and tasks of other packages, found by entry point.

A package names its modules in its pyproject.toml:

    [project.entry-points."gradcost.plugins"]
    mine = "my_package.methods"

Each module adds its public value classes (`gradcost.core.value`), and its functions that are annotated to return an
`Estimator`: the presets.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any

from gradcost.core.errors import BadInput
from gradcost.core.evaluation.user_modules import PLUGINS
from gradcost.core.value import is_value


def added(kinds: Collection[str], known: Collection[str]) -> dict[str, Callable[..., Any]]:
    """Return what plug-ins add to expressions of these kinds ("method", "optimizer", "task"), by name.

    Raises:
        BadInput: a plug-in cannot be imported, or redefines one of the `known` names.
    """
    found: dict[str, Callable[..., Any]] = {}
    for label, module in _modules():
        for name, thing in _public(module).items():
            if _kind(thing) not in kinds:
                continue
            if name in known or found.get(name, thing) is not thing:
                raise BadInput(f"the plug-in {label} defines {name}, which exists already: rename it there.")
            found[name] = thing
    return found


@functools.cache
def _modules() -> tuple[tuple[str, ModuleType], ...]:
    """Import the modules of all installed plug-ins, once per process."""
    found = []
    for entry in sorted(importlib.metadata.entry_points(group=PLUGINS)):
        label = f"{entry.name} ({entry.value})"
        try:
            module = entry.load()
        except Exception as error:
            raise BadInput(
                f"the plug-in {label} could not be imported: {type(error).__name__}: {error}. Repair or uninstall it."
            ) from error
        if not isinstance(module, ModuleType):
            raise BadInput(
                f"the plug-in {label} names a {type(module).__name__}: its entry point must name a module."
            )
        found.append((label, module))
    return tuple(found)


def _public(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """Return the value classes and presets in `__all__`, or those that the module defines, if it has none."""
    exported = getattr(module, "__all__", None)
    things = vars(module) if exported is None else {name: getattr(module, name) for name in exported}
    return {
        name: thing
        for name, thing in things.items()
        if not name.startswith("_")
        and (exported is not None or getattr(thing, "__module__", None) == module.__name__)
        and (is_preset(thing) or (inspect.isclass(thing) and is_value(thing)))
    }


def is_preset(thing: Any) -> bool:
    """Return whether a thing is a function that is annotated to return an Estimator."""
    if not inspect.isfunction(thing):
        return False
    returned = inspect.signature(thing).return_annotation
    name = returned if isinstance(returned, str) else getattr(returned, "__name__", "")
    return name.rpartition(".")[2] == "Estimator"


def _kind(thing: Any) -> str:
    from gradcost.training.optimizers import Optimizer

    if inspect.isclass(thing) and issubclass(thing, Optimizer):
        return "optimizer"
    return "task" if hasattr(thing, "batch_at") else "method"
