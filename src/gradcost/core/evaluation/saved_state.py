"""Save the content of mutable objects, find what has changed in it, and restore it."""

from __future__ import annotations

import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from gradcost.core.evaluation.mutable_state import (
    SCALARS,
    Named,
    NamedValues,
    attributes_of,
    cell_content,
    is_array,
    is_opaque,
    tensors_in,
)
from gradcost.core.fake import is_fake


class Saved:
    """The content of mutable objects at construction.

    Args:
        objects: (name, object) pairs, as in `Traversal.objects`.
    """

    def __init__(self, objects: Iterable[Named]) -> None:
        self._saved = [(name, value, _content(value)) for name, value in objects]

    def changed(self, by_value: bool = False) -> list[Named]:
        """Return the objects whose content differs from the saved content.

        Args:
            by_value: whether an item may be replaced by one of the same value, as in `is_same_value`.
        """
        same_item = is_same_value if by_value else _is_same_item
        return [
            (name, value) for name, value, saved in self._saved if not _is_same(_content(value), saved, same_item)
        ]

    def new_tensors(self) -> list[Tensor]:
        """Return the tensors that can be reached from the objects, and could not be from the saved content."""
        before = set(map(id, tensors_in([saved for _, _, saved in self._saved])))
        return [tensor for tensor in tensors_in([value for _, value, _ in self._saved]) if id(tensor) not in before]

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


def is_same_value(one: Any, other: Any, depth: int = 8) -> bool:
    """Return whether two values are the same, and what they contain to this depth. Fake tensors count as the same."""
    if one is other or depth == 0:
        return True
    if is_array(one) and is_array(other):
        return one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return is_fake(one) or is_fake(other) or same_bits(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, (*SCALARS, bytearray, set, frozenset)):
        return bool(one == other)
    if isinstance(one, list | tuple | deque):
        return len(one) == len(other) and all(
            is_same_value(*pair, depth - 1) for pair in zip(one, other, strict=True)
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same_value(one[key], other[key], depth - 1) for key in one)
    if is_opaque(type(one)):
        return True
    return is_same_value(attributes_of(one), attributes_of(other), depth - 1)


def _content(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone(), value.requires_grad, value.grad_fn is not None, version_of(value)
    if isinstance(value, NamedValues):
        return value.read()
    if isinstance(value, types.CellType):
        return cell_content(value)
    if is_array(value):
        return value.copy()
    return dict(value) if isinstance(value, dict) else list(value)


def _is_same(one: Any, other: Any, same_item: Callable[[Any, Any], bool]) -> bool:
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(same_item, one.values(), other.values()))
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_item, one, other))
    if isinstance(one, tuple):
        if one[0].layout != torch.strided or is_fake(one[0]) or is_fake(other[0]):
            return one[1:] == other[1:]  # the version counter tells
        return one[1:3] == other[1:3] and same_bits(one[0], other[0])
    return one.shape == other.shape and one.tobytes() == other.tobytes()


def _differing_numbers(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        pairs = [(one[key], other[key]) for key in one.keys() & other.keys()]
    else:
        pairs = list(zip(one, other, strict=True)) if isinstance(one, list) and len(one) == len(other) else []
    return any(isinstance(a, int | float) and isinstance(b, int | float) and a != b for a, b in pairs)


def _is_same_item(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and type(one) in SCALARS and one == other)


def _restore(value: Any, saved: Any) -> None:
    if isinstance(value, Tensor):
        _restore_tensor(value, *saved[:3])
    elif isinstance(value, NamedValues):
        value.write(saved)
    elif isinstance(value, types.CellType):
        value.cell_contents = saved[0]
    elif isinstance(value, dict):
        plain: Any = OrderedDict if isinstance(value, OrderedDict) else dict  # a subclass may refuse `clear`
        if not _is_same(dict(value), saved, _is_same_item):
            plain.clear(value)
            plain.update(value, saved)
    elif isinstance(value, set | deque):
        value.clear()
        value.update(saved) if isinstance(value, set) else value.extend(saved)
    elif is_array(value):
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
