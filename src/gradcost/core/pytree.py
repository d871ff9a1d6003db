"""Functions on pytrees: tensors and other values nested in tuples, lists, mappings and dataclasses.

They enter the containers that torch's pytrees enter. They also enter mappings other than `dict` (transformers'
BatchEncoding), subclasses of `dict` and `list`, dataclasses and `SimpleNamespace`. A container keeps its type, except
that an immutable mapping becomes a `dict`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from gradcost.core.errors import BadInput


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors among the leaves of a pytree, in order. A tensor that occurs twice is returned twice."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def operands(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among the arguments or results of an operator, in order: faster than `tensors`."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += operands(value)
        elif isinstance(value, dict):
            found += operands(value.values())
    return found


def leaves(tree: Any) -> Iterator[Any]:
    """Yield the values of a pytree that are not containers, in order."""
    for leaf in pytree.tree_leaves(tree):
        node = None if isinstance(leaf, Tensor) else _extra_node(leaf)
        if node is None:
            yield leaf
        else:
            for value in node.values:
                yield from leaves(value)


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return a copy of a pytree, with `function(leaf)` in place of each leaf."""

    def map_leaf(leaf: Any) -> Any:
        node = None if isinstance(leaf, Tensor) else _extra_node(leaf)
        return function(leaf) if node is None else node.rebuilt([tree_map(function, value) for value in node.values])

    return pytree.tree_map(map_leaf, tree)


class Node(NamedTuple):
    """The direct content of a container.

    Args:
        names: the index or attribute of each value, such as "['labels']" or ".labels".
        values: the values.
        rebuilt: returns a container like this one with other values.
    """

    names: list[str]
    values: list[Any]
    rebuilt: Callable[[list[Any]], Any]


def children(tree: Any) -> Node | None:
    """Return the direct content of a container; None if the value is not a container."""
    node = _extra_node(tree)
    is_known_to_torch = type(tree) in pytree.SUPPORTED_NODES or _is_named(tree)
    if node is not None or isinstance(tree, Tensor) or not is_known_to_torch:
        return node
    if type(tree) in (list, tuple):
        return Node([f"[{i}]" for i in range(len(tree))], list(tree), type(tree))
    values, structure = pytree.tree_flatten(tree, is_leaf=lambda value: value is not tree)
    names = [f"[{name!r}]" for name in tree] if isinstance(tree, Mapping) else [f"[{i}]" for i in range(len(values))]
    return Node(names, values, lambda new: pytree.tree_unflatten(new, structure))


def _is_named(tree: Any) -> bool:
    return isinstance(tree, tuple) and hasattr(tree, "_fields")


def _extra_node(leaf: Any) -> Node | None:
    """Return the content of a container that torch's pytrees treat as a leaf; None for all other values."""
    if type(leaf) in pytree.SUPPORTED_NODES or _is_named(leaf):
        return None
    if isinstance(leaf, Mapping):
        return Node([f"[{name!r}]" for name in leaf], list(leaf.values()), lambda new: _mapping(leaf, new))
    if isinstance(leaf, list):
        return Node([f"[{i}]" for i in range(len(leaf))], list(leaf), lambda new: _list(leaf, new))
    if (dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)) or isinstance(leaf, SimpleNamespace):
        names = list(vars(leaf)) if isinstance(leaf, SimpleNamespace) else _fields(leaf)
        values = [getattr(leaf, name) for name in names]
        return Node([f".{name}" for name in names], values, lambda new: _with_attributes(leaf, names, new))
    return None


def _fields(leaf: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(leaf) if hasattr(leaf, field.name)]


def _mapping(original: Mapping[Any, Any], values: Iterable[Any]) -> Mapping[Any, Any]:
    items = dict(zip(original, values, strict=True))
    if not isinstance(original, MutableMapping):
        return items
    new = copy.copy(original)
    for name, value in items.items():
        new[name] = value
    return new


def _list(original: list[Any], values: list[Any]) -> list[Any]:
    new = copy.copy(original)
    new[:] = values
    return new


def _with_attributes(original: Any, names: Iterable[str], values: Iterable[Any]) -> Any:
    new = copy.copy(original)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(new, name, value)  # works for frozen dataclasses too
    return new


# ---- the examples of a batch


def is_array(leaf: Any) -> bool:
    """Return whether a leaf is a tensor or a NumPy array with at least one dimension."""
    return isinstance(leaf, Tensor | np.ndarray) and leaf.ndim > 0


def batch_size(batch: Any) -> int:
    """Return the number of examples in a batch.

    Law: the first of these sizes that exists and is unique. Scalars are ignored; so are arrays with one row, if other
    arrays have more.

      - The first dimension of all tensors and NumPy arrays.
      - The size above 1 that occurs in all shapes.
      - The length of all outermost lists, and of the first dimension of the arrays outside of lists.

    Raises:
        BadInput: none of these sizes exists and is unique.
    """
    arrays = [leaf for leaf in leaves(batch) if is_array(leaf)]
    first = {leaf.shape[0] for leaf in arrays}
    rows = first - {1} or first
    if len(rows) == 1:
        return rows.pop()
    shared = [set(leaf.shape) for leaf in arrays if leaf.shape[0] != 1]
    anywhere = set.intersection(*shared) - {1} if shared else set()
    if len(anywhere) == 1:
        return anywhere.pop()
    lengths, outside = _outermost_lists(batch)
    if len(lengths) == 1 and outside <= lengths:
        return lengths.pop()
    reason = f"here it is {', '.join(map(str, sorted(first)))}" if first else "none has one"
    raise BadInput(f"the tensors of a batch share their first dimension, one entry per example, but {reason}.")


def _outermost_lists(tree: Any) -> tuple[set[int], set[int]]:
    """Return the lengths of the outermost lists, and the first dimensions of the arrays outside of lists."""
    if is_array(tree):
        return set(), {tree.shape[0]}
    node = children(tree)
    if isinstance(tree, list) or node is None:
        return ({len(tree)} if isinstance(tree, list) and tree else set()), set()
    found = [_outermost_lists(value) for value in node.values]
    return set().union(*(lengths for lengths, _ in found)), set().union(*(sizes for _, sizes in found))
