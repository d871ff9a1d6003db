"""Find the mutable objects that can be reached from a value.

Modules keep state outside parameters and buffers: hidden states, caches, counters, lists of statistics.
A traversal enters attributes, containers, objects and classes. With `follow_functions` it also enters functions:
their closures, defaults and the globals that they name. It does not enter parameters, Python modules, or classes and
globals of installed packages.
"""

from __future__ import annotations

import functools
import random
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradcost.core.evaluation.user_modules import is_installed

_MAX_OBJECTS = 50_000  # per traversal; a data set in a closure may have more, and is no state of the loss
# Packages whose objects and classes are not entered.
_OPAQUE = {"abc", "builtins", "collections", "concurrent", "enum", "functools", "importlib", "itertools", "logging"}
_OPAQUE |= {"multiprocessing", "numpy", "threading", "torch", "types", "typing", "weakref", "_thread"}
SCALARS = (bool, int, float, complex, str, bytes, type(None))
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial, types.CellType)

Named = tuple[str, Any]  # (name for messages, object)


class Traversal:
    """A depth-first traversal. It collects (name, object) in `objects` (mutable ones), `modules` and `generators`.

    Args:
        follow_functions: whether to enter functions. If False, `functions` collects them.
        skipped: objects that are not entered, such as buffers.
        entered: classes of torch or other opaque packages whose objects are entered too.
        most_items: containers with more items are recorded, and not entered.
    """

    def __init__(
        self,
        follow_functions: bool = False,
        skipped: Iterable[Any] = (),
        entered: tuple[type, ...] = (),
        most_items: int = sys.maxsize,
    ) -> None:
        self.follow_functions, self.entered, self.most_items = follow_functions, entered, most_items
        self.seen = {id(value): value for value in skipped}  # keeps the objects, so that no id is reused
        self.objects: list[Named] = []
        self.modules: list[tuple[str, nn.Module]] = []
        self.generators: list[Named] = []
        self.functions: list[Named] = []

    def visit(self, name: str, value: Any) -> None:
        """Enter a value and everything inside it. Objects that were entered before are skipped."""
        stack = [(name, value)]
        while stack:
            name, value = stack.pop()
            if isinstance(value, SCALARS) or id(value) in self.seen or len(self.seen) > _MAX_OBJECTS:
                continue
            self.seen[id(value)] = value
            stack += reversed(list(self._enter(name, value)))

    def _enter(self, name: str, value: Any) -> Iterator[Named]:
        """Record a value and yield (name, value) of what it contains."""
        if type(value) in weakref.ProxyTypes:
            pass  # like a weak reference: its object belongs to others
        elif isinstance(value, nn.Module):
            self.modules.append((name, value))
            yield from self._attributes(name, value)
        elif is_generator(value):
            self.generators.append((name, value))
        elif isinstance(value, nn.Parameter | types.ModuleType):
            pass
        elif isinstance(value, Tensor | bytearray) or is_array(value):
            self.objects.append((name, value))
        elif isinstance(value, dict | list | set | deque | tuple | frozenset):
            if not isinstance(value, tuple | frozenset):
                self.objects.append((name, value))
            if len(value) <= self.most_items:
                items = value.items() if isinstance(value, dict) else enumerate(value)
                yield from [(f"{name}[{key!r}]", item) for key, item in items]
            yield from self._attributes(name, value)
        elif isinstance(value, _FUNCTIONS):
            if self.follow_functions:
                yield from self._function(name, value)
            else:
                self.functions.append((name, value))
        elif isinstance(value, property | staticmethod | classmethod):
            function = value.fget if isinstance(value, property) else value.__func__
            yield name, function
        elif isinstance(value, type):
            yield from self._class(value)
        elif not is_opaque(type(value)) or isinstance(value, self.entered):
            yield from self._attributes(name, value)

    def _attributes(self, name: str, value: Any) -> Iterator[Named]:
        prefix, attributes = f"{name}." if name else "", getattr(value, "__dict__", None)
        if isinstance(value, nn.Module):  # its `__dict__` is not recorded, because an evaluation replaces it
            self.objects.append((f"{prefix}_modules", value._modules))
            yield from [(f"{prefix}{key}", child) for key, child in value._modules.items()]
            keys = [key for key in vars(value) if key not in ("_parameters", "_buffers", "_modules")]
            yield from [(f"{prefix}{key}", vars(value)[key]) for key in keys]
        elif attributes:
            self.objects.append((name, attributes))
            yield from [(f"{prefix}{key}", item) for key, item in attributes.items()]
        for kind in type(value).__mro__:
            if not is_opaque(kind):
                slots = NamedValues(value, _slots(kind))
                if slots.names:
                    self.objects.append((name, slots))
                    yield from [(f"{prefix}{key}", item) for key, item in slots.read().items()]
                yield kind.__qualname__, kind

    def _class(self, kind: type) -> Iterator[Named]:
        if not is_opaque(kind) and not _is_library(getattr(sys.modules.get(kind.__module__), "__file__", None)):
            values = NamedValues(kind, [key for key in vars(kind) if not key.startswith("__")])
            self.objects.append((f"class {kind.__qualname__}", values))
            yield from [(f"{kind.__qualname__}.{key}", vars(kind)[key]) for key in values.names]

    def _function(self, name: str, value: Any) -> Iterator[Named]:
        if isinstance(value, types.MethodType):
            yield from ((name, value.__func__), (name, value.__self__))
        elif isinstance(value, functools.partial):
            yield from [(name, item) for item in (value.func, *value.args, *value.keywords.values())]
        elif isinstance(value, types.CellType):
            self.objects.append((name, value))
            yield from [(name, item) for item in cell_content(value)]
        else:
            yield from zip(value.__code__.co_freevars, value.__closure__ or (), strict=False)
            defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
            yield from [(f"a default of {value.__qualname__}", item) for item in defaults]
            yield value.__qualname__, value.__dict__
            if not _is_library(value.__code__.co_filename):
                yield from self._globals(value.__globals__, set(_names(value.__code__)))

    def _globals(self, namespace: dict[str, Any], names: set[str]) -> Iterator[Named]:
        """Yield the globals with these names. If a global is a Python module, do the same with its attributes."""
        namespaces, entered = [namespace], set()
        while namespaces:
            namespace = namespaces.pop()
            if id(namespace) in entered:  # modules that import each other
                continue
            entered.add(id(namespace))
            values = NamedValues(namespace, sorted(names & namespace.keys()))
            self.objects.append((f"globals of {namespace.get('__name__')}", values))
            for key, item in values.read().items():
                yield key, item
                if isinstance(item, types.ModuleType) and not _is_library(getattr(item, "__file__", "<frozen")):
                    namespaces.append(vars(item))


class NamedValues:
    """Some attributes of an object or class, or some entries of a namespace, as one mutable object.

    Args:
        owner: the object, the class, or the dictionary.
        names: the attributes or entries.
    """

    def __init__(self, owner: Any, names: list[str]) -> None:
        self.owner, self.names = owner, names

    def read(self) -> dict[str, Any]:
        if isinstance(self.owner, dict):
            return {name: self.owner[name] for name in self.names if name in self.owner}
        attributes = vars(self.owner) if isinstance(self.owner, type) else None
        if attributes is not None:
            return {name: attributes[name] for name in self.names if name in attributes}
        return {name: getattr(self.owner, name) for name in self.names if hasattr(self.owner, name)}

    def write(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(self.owner, dict):
                self.owner[name] = value
            elif isinstance(self.owner, type):
                if vars(self.owner).get(name) is not value:
                    type.__setattr__(self.owner, name, value)
            else:
                object.__setattr__(self.owner, name, value)


def is_generator(value: Any) -> bool:
    """Return whether a value is a random generator of torch, NumPy or Python's `random` that has a state."""
    if isinstance(value, torch.Generator | random.Random):
        return not isinstance(value, random.SystemRandom)
    return _package(type(value)) == "numpy" and hasattr(value, "standard_normal")


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors that can be reached from a value, without those that only functions reach."""
    traversal = Traversal()
    traversal.visit("", value)
    return [found for _, found in traversal.objects if isinstance(found, Tensor)]


def is_array(value: Any) -> bool:
    return _package(type(value)) == "numpy" and type(value).__name__ == "ndarray"


def attributes_of(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, those in slots included."""
    slots = [name for kind in type(value).__mro__ if not is_opaque(kind) for name in _slots(kind)]
    return {**getattr(value, "__dict__", {}), **NamedValues(value, slots).read()}


def cell_content(cell: types.CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # not assigned yet
        return []


def _slots(kind: type) -> list[str]:
    slots = vars(kind).get("__slots__", ())
    return [slot for slot in ((slots,) if isinstance(slots, str) else slots) if not slot.startswith("__")]


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def is_opaque(kind: type) -> bool:
    return _package(kind) in _OPAQUE


def _package(kind: type) -> str:
    module: Any = kind.__module__  # for some types of C extensions, this is not a string
    return module.partition(".")[0] if isinstance(module, str) else "builtins"


def _is_library(path: str | None) -> bool:
    return path is not None and (is_installed(path) or path.startswith("<frozen"))
