"""Find the mutable objects that can be reached from a value, and restore their content.

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
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradcost.core.evaluation.user_modules import is_installed

_MAX_OBJECTS = 50_000  # per traversal; a data set in a closure may have more, and is no state of the loss
# Packages whose objects and classes are not entered.
_OPAQUE = {"abc", "builtins", "collections", "concurrent", "enum", "functools", "importlib", "itertools", "logging"}
_OPAQUE |= {"multiprocessing", "numpy", "threading", "torch", "types", "typing", "weakref", "_thread"}
_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial, types.CellType)

Named = tuple[str, Any]  # (name for messages, object)


class Traversal:
    """A depth-first traversal. It collects (name, object) in `objects` (mutable ones), `modules` and `generators`.

    Args:
        follow_functions: whether to enter functions. If False, `functions` collects them.
        skipped: objects that are not entered, such as buffers.
    """

    def __init__(self, follow_functions: bool = False, skipped: Iterable[Any] = ()) -> None:
        self.follow_functions = follow_functions
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
            if isinstance(value, _SCALARS) or id(value) in self.seen or len(self.seen) > _MAX_OBJECTS:
                continue
            self.seen[id(value)] = value
            stack += reversed(list(self._enter(name, value)))

    def _enter(self, name: str, value: Any) -> Iterator[Named]:
        """Record a value and yield (name, value) of what it contains."""
        if isinstance(value, nn.Module):
            self.modules.append((name, value))
            yield from self._attributes(name, value)
        elif is_generator(value):
            self.generators.append((name, value))
        elif isinstance(value, nn.Parameter | types.ModuleType):
            pass
        elif isinstance(value, Tensor | bytearray) or _is_array(value):
            self.objects.append((name, value))
        elif isinstance(value, dict | list | set | deque | tuple | frozenset):
            if not isinstance(value, tuple | frozenset):
                self.objects.append((name, value))
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
        elif not _is_opaque(type(value)):
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
            if not _is_opaque(kind):
                slots = NamedValues(value, _slots(kind))
                if slots.names:
                    self.objects.append((name, slots))
                    yield from [(f"{prefix}{key}", item) for key, item in slots.read().items()]
                yield kind.__qualname__, kind

    def _class(self, kind: type) -> Iterator[Named]:
        if not _is_opaque(kind) and not _is_library(getattr(sys.modules.get(kind.__module__), "__file__", None)):
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
            yield from [(name, item) for item in _cell(value)]
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


class Saved:
    """The content of mutable objects at construction.

    Args:
        objects: (name, object) pairs, as in `Traversal.objects`.
    """

    def __init__(self, objects: Iterable[Named]) -> None:
        self._saved = [(name, value, _content(value)) for name, value in objects]

    def changed(self) -> list[Named]:
        """Return the objects whose content differs from the saved content."""
        return [(name, value) for name, value, saved in self._saved if not _is_same(_content(value), saved)]

    def counters(self) -> list[str]:
        """Return the names of the objects in which a number differs from the saved number."""
        return [name for name, value, saved in self._saved if _differing_numbers(_content(value), saved)]

    def filled(self) -> list[Named]:
        """Return the bounded queues that have more entries than before. A list that grows may be a log."""
        return [
            (name, value)
            for name, value, saved in self._saved
            if isinstance(value, deque) and value.maxlen is not None and len(value) > len(saved)
        ]

    def restore(self) -> None:
        """Give each object its saved content."""
        for _, value, saved in self._saved:
            _restore(value, saved)


def is_generator(value: Any) -> bool:
    """Return whether a value is a random generator of torch, NumPy or Python's `random`."""
    if isinstance(value, torch.Generator | random.Random):
        return True
    return _package(type(value)) == "numpy" and hasattr(value, "standard_normal")


def version_of(tensor: Tensor) -> int:
    """Return the version counter of a tensor, which in-place operations increment; 0 for an inference tensor."""
    return 0 if tensor.is_inference() else tensor._version


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same shape, type and bits."""
    if one.is_nested or other.is_nested:
        parts = [tensor.unbind() if tensor.is_nested else () for tensor in (one, other)]
        return len(parts[0]) == len(parts[1]) and all(map(same_bits, *parts))
    if one.shape != other.shape or one.dtype != other.dtype or one.layout != other.layout:
        return False
    if one.layout in (torch.sparse_coo, torch.sparse_csr):
        one, other = one.to_dense(), other.to_dense()
    elif one.layout != torch.strided:
        return False
    flat = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return bool(torch.equal(*flat))


def _content(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone(), value.requires_grad, value.grad_fn is not None, version_of(value)
    if isinstance(value, NamedValues):
        return value.read()
    if isinstance(value, types.CellType):
        return _cell(value)
    if _is_array(value):
        return value.copy()
    return dict(value) if isinstance(value, dict) else list(value)


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(_is_same_item, one.values(), other.values()))
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_is_same_item, one, other))
    if isinstance(one, tuple):
        if one[0].layout != torch.strided:
            return one[1:] == other[1:]
        return one[1:3] == other[1:3] and same_bits(one[0], other[0])
    return one.shape == other.shape and one.tobytes() == other.tobytes()


def _differing_numbers(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        pairs = [(one[key], other[key]) for key in one.keys() & other.keys()]
    else:
        pairs = list(zip(one, other, strict=True)) if isinstance(one, list) and len(one) == len(other) else []
    return any(isinstance(a, int | float) and isinstance(b, int | float) and a != b for a, b in pairs)


def _is_same_item(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and type(one) in _SCALARS and one == other)


def _restore(value: Any, saved: Any) -> None:
    if isinstance(value, Tensor):
        _restore_tensor(value, *saved[:3])
    elif isinstance(value, NamedValues):
        value.write(saved)
    elif isinstance(value, types.CellType):
        value.cell_contents = saved[0]
    elif isinstance(value, dict):
        plain: Any = OrderedDict if isinstance(value, OrderedDict) else dict  # a subclass may refuse `clear`
        if not _is_same(dict(value), saved):
            plain.clear(value)
            plain.update(value, saved)
    elif isinstance(value, set | deque):
        value.clear()
        value.update(saved) if isinstance(value, set) else value.extend(saved)
    elif _is_array(value):
        value[...] = saved
    else:
        value[:] = saved  # a list or a bytearray


def _restore_tensor(value: Tensor, content: Tensor, requires_grad: bool, has_graph: bool) -> None:
    if not has_graph and not value._is_view():
        value.detach_()  # drops the graph or tangent that an in-place write has added
        value.requires_grad_(requires_grad)
    if value.shape == content.shape:
        value.data.copy_(content)
    else:
        value.data = content


def _is_array(value: Any) -> bool:
    return _package(type(value)) == "numpy" and type(value).__name__ == "ndarray"


def _cell(cell: types.CellType) -> list[Any]:
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


def _is_opaque(kind: type) -> bool:
    return _package(kind) in _OPAQUE


def _package(kind: type) -> str:
    module: Any = kind.__module__  # for some types of C extensions, this is not a string
    return module.partition(".")[0] if isinstance(module, str) else "builtins"


def _is_library(path: str | None) -> bool:
    return path is not None and (is_installed(path) or path.startswith("<frozen"))
