"""Traverse the state that a model and a loss reach: inside the attributes of the modules, and outside of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from gradcost.core.evaluation.mutable_state import Traversal

NamedModules = list[tuple[str, nn.Module]]
Root = tuple[str, str]  # (name of a module, name of one of its attributes)


def named_modules(model: nn.Module, modules: Iterable[nn.Module]) -> NamedModules:
    """Return (name, module) pairs. Modules outside of the model get a name from their type and number."""
    names = {id(module): name for name, module in model.named_modules()}
    return [
        (names.get(id(module), f"{type(module).__name__} number {number}, outside of the model"), module)
        for number, module in enumerate(modules)
    ]


def everything(model: nn.Module, loss: Any) -> Traversal:
    """Return a traversal of everything that the model and the loss reach, functions included."""
    traversal = Traversal(follow_functions=True)
    traversal.visit("", model)
    traversal.visit("loss", loss)
    return traversal


def attribute_state(named: NamedModules) -> tuple[Traversal, dict[int, Root | None], set[Root]]:
    """Traverse the attributes of the modules.

    Returns:
        The traversal, the attribute that each object belongs to, by the id of the object (None for a class), and the
        attributes that contain a random generator.
    """
    found, owners, with_generators = Traversal(skipped=modules_and_buffers(named)), [], set()
    for name, module in named:
        for attribute, value in list(vars(module).items()):
            if attribute not in ("_parameters", "_buffers", "_modules"):
                generators = len(found.generators)
                found.visit(f"{name}.{attribute}" if name else attribute, value)
                owners += [(name, attribute)] * (len(found.objects) - len(owners))
                if len(found.generators) > generators:
                    with_generators.add((name, attribute))
        visit_classes(found, module)
        owners += [None] * (len(found.objects) - len(owners))
    return found, {id(value): owner for (_, value), owner in zip(found.objects, owners, strict=True)}, with_generators


def function_state(named: NamedModules, loss: Any) -> Traversal:
    """Return a traversal of what functions (the loss, hooks, methods) reach beyond the modules' attributes."""
    attributes = Traversal(skipped=modules_and_buffers(named))
    for name, module in named:
        attributes.visit(name, {key: value for key, value in vars(module).items() if key != "_modules"})
        visit_classes(attributes, module)
    functions = {id(function) for _, function in attributes.functions}
    skipped = [value for key, value in attributes.seen.items() if key not in functions]
    traversal = Traversal(follow_functions=True, skipped=skipped)
    for name, function in (*attributes.functions, ("loss", loss)):
        traversal.visit(name, function)
    return traversal


def visit_classes(traversal: Traversal, module: nn.Module) -> None:
    """Enter the class of a module and its base classes."""
    for kind in type(module).__mro__:
        traversal.visit(kind.__qualname__, kind)


def modules_and_buffers(named: NamedModules) -> list[Any]:
    """Return the modules and their buffers, for traversals that do not enter them."""
    modules = [module for _, module in named]
    return [*modules, *(buffer for module in modules for buffer in module._buffers.values() if buffer is not None)]
