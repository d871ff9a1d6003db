"""The tensors in nested containers and objects, and copies of such values with placeholders for the tensors.

`packed` makes a copy, which does not change when a block changes the original in place. `unpacked` makes a new value
from a copy.
Containers are:

- lists, tuples, named tuples, dictionaries and sets, and their subclasses; the nodes of torch's pytree registry.
- objects of Python classes with `__dict__` or `__slots__`, except modules, functions and classes.
- random generators and NumPy arrays, which have no tensors but change in place.

Other values are opaque: the copy refers to the original.
"""

from __future__ import annotations

import copyreg
import pickle
import random
import types
from collections.abc import Callable
from enum import Enum
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_ATOMS = frozenset(
    (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.layout)
)


class _Kind(NamedTuple):
    """How values of a type are copied. start, fill: for types whose values may contain themselves; otherwise None."""

    open: Callable[[Any], tuple[list[Any], Any]]  # value -> (children, context)
    make: Callable[[list[Any], Any], Any]  # (children, context) -> value
    start: Callable[[Any], Any] | None = None  # context -> empty value
    fill: Callable[[Any, list[Any], Any], None] | None = None  # (empty value, children, context)


class _Node:
    """The copy of one container."""

    __slots__ = ("children", "context", "kind")

    def __init__(self, kind: _Kind) -> None:
        self.kind = kind


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in a value, in order. A tensor that occurs twice is returned twice, a container once."""
    found: list[Tensor] = []
    _collect(value, found, set())
    return found


def _collect(value: Any, found: list[Tensor], seen: set[int]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif type(value) not in _ATOMS and (kind := _kind(type(value))) is not None and id(value) not in seen:
        seen.add(id(value))
        for child in kind.open(value)[0]:
            _collect(child, found, seen)


def packed(value: Any, leaf: Callable[[Tensor], Any], memo: dict[int, _Node] | None = None) -> Any:
    """Return a copy of a value with `leaf(tensor)` in place of each tensor, for `unpacked`.

    Args:
        value: any value.
        leaf: returns the placeholder of a tensor.
        memo: id of a container -> its copy, so that each container is copied once. None: no copies yet.
    """
    if isinstance(value, Tensor):
        return leaf(value)
    if type(value) in _ATOMS or (kind := _kind(type(value))) is None:
        return value
    memo = {} if memo is None else memo
    if id(value) not in memo:
        node = memo[id(value)] = _Node(kind)
        children, node.context = kind.open(value)
        node.children = [packed(child, leaf, memo) for child in children]
    return memo[id(value)]


def unpacked(copy: Any, leaf: Callable[[Any], Any], memo: dict[int, Any] | None = None) -> Any:
    """Return a new value with the content of a copy.

    Args:
        copy: a result of `packed`.
        leaf: returns the tensor for a placeholder, and any other value unchanged.
        memo: id of the copy of a container -> its new value. None: no values yet.
    """
    if type(copy) is not _Node:
        return leaf(copy)
    memo = {} if memo is None else memo
    if id(copy) in memo:
        return memo[id(copy)]
    kind = copy.kind
    if kind.start is None or kind.fill is None:
        value = kind.make([unpacked(child, leaf, memo) for child in copy.children], copy.context)
        memo[id(copy)] = value
        return value
    value = memo[id(copy)] = kind.start(copy.context)
    kind.fill(value, [unpacked(child, leaf, memo) for child in copy.children], copy.context)
    return value


def is_same_copy(one: Any, other: Any) -> bool:
    """Return whether two copies have the same structure, equal placeholders and equal simple values.

    Opaque values are the same if they are one object.
    """
    if type(one) is not _Node or type(other) is not _Node:
        return one is other or (type(one) is type(other) and _is_equal(one, other))
    return (
        one.kind is other.kind
        and len(one.children) == len(other.children)
        and _is_equal(one.context, other.context)
        and all(map(is_same_copy, one.children, other.children))
    )


def _is_equal(one: Any, other: Any) -> bool:
    try:
        return bool(np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other)
    except Exception:  # an object that cannot be compared
        return False


@lru_cache(maxsize=4096)
def _kind(cls: type) -> _Kind | None:
    """Return how values of this class are copied; None if they are opaque."""
    if cls in _BUILTIN:
        return _BUILTIN[cls]
    node = None if hasattr(cls, "get_seq_length") else pytree.SUPPORTED_NODES.get(cls)
    if node is not None:
        return _Kind(
            lambda value: tuple(node.flatten_fn(value)),  # type: ignore[arg-type,return-value]
            lambda children, context: node.unflatten_fn(children, context),
        )
    if issubclass(cls, nn.Module | type | Enum | types.FunctionType | types.ModuleType) or hasattr(cls, "__del__"):
        return None
    base: Any = next((base for base in (tuple, list, dict, set, frozenset) if issubclass(cls, base)), object)
    try:
        base.__new__(cls)
    except TypeError:  # a class whose instances have a part in C
        return None
    return _subclass_of(base)


def _subclass_of(base: Any) -> _Kind:
    """Return how instances of a Python class with this built-in base are copied: their items and their attributes."""
    items = _BUILTIN.get(base)

    def open_(value: Any) -> tuple[list[Any], Any]:
        children, context = ([], None) if items is None else items.open(value)
        names, attributes = _attributes(value)
        return children + attributes, (type(value), len(children), context, names)

    def make(children: list[Any], context: Any) -> Any:
        cls, count, _, names = context
        value = base.__new__(cls, children[:count])
        _set_attributes(value, names, children[count:])
        return value

    def start(context: Any) -> Any:
        return base.__new__(context[0])

    def fill(value: Any, children: list[Any], context: Any) -> None:
        _, count, inner, names = context
        if base is list:
            list.extend(value, children[:count])
        elif base is dict:
            dict.update(value, zip(inner, children[:count], strict=True))
        elif base is set:
            set.update(value, children[:count])
        _set_attributes(value, names, children[count:])

    return _Kind(open_, make) if base in (tuple, frozenset) else _Kind(open_, make, start, fill)


def _attributes(value: Any) -> tuple[list[str], list[Any]]:
    named = dict(getattr(value, "__dict__", ()))
    for slot in copyreg._slotnames(type(value)):  # type: ignore[attr-defined]
        if hasattr(value, slot):
            named[slot] = getattr(value, slot)
    return list(named), list(named.values())


def _set_attributes(value: Any, names: list[str], attributes: list[Any]) -> None:
    for name, attribute in zip(names, attributes, strict=True):
        object.__setattr__(value, name, attribute)


def _extend(value: Any, children: list[Any], context: Any) -> None:
    value.extend(children)


def _update(value: Any, children: list[Any], context: Any) -> None:
    value.update(zip(context, children, strict=True))


def _generator(device: torch.device, state: bytes) -> torch.Generator:
    generator = torch.Generator(device)
    return generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


_PICKLED = _Kind(lambda value: ([], pickle.dumps(value)), lambda children, state: pickle.loads(state))
_BUILTIN: dict[type, _Kind] = {
    tuple: _Kind(lambda value: (list(value), None), lambda children, context: tuple(children)),
    frozenset: _Kind(lambda value: (list(value), None), lambda children, context: frozenset(children)),
    list: _Kind(lambda value: (list(value), None), lambda children, context: children, lambda context: [], _extend),
    dict: _Kind(
        lambda value: (list(value.values()), list(value)),
        lambda children, context: dict(zip(context, children, strict=True)),
        lambda context: {},
        _update,
    ),
    torch.Generator: _Kind(
        lambda value: ([], (value.device, value.get_state().numpy().tobytes())),
        lambda children, state: _generator(*state),
    ),
    np.ndarray: _Kind(lambda value: ([], value.copy()), lambda children, array: array.copy()),
    random.Random: _PICKLED,
    np.random.Generator: _PICKLED,
    np.random.RandomState: _PICKLED,
    set: _Kind(
        lambda value: (list(value), None),
        lambda children, context: set(children),
        lambda context: set(),
        lambda value, children, context: value.update(children),
    ),
}
