"""Select examples of a batch, and split a batch into micro-batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gradcost.core.equal_parts import part_lengths
from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.pytree import batch_size, children, is_array, leaves

Cut = Callable[[Any, int], Any]  # (tensor, array or list, dimension of the examples) -> some of its examples
_SHARED = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, torch.Size)
_SHARED += (Tensor, np.ndarray, np.generic)  # those without dimensions


def split(batch: Any, count: int) -> list[tuple[float, Any]]:
    """Split a batch into micro-batches along the dimension of its examples (`batch_size`).

    Tensors, NumPy arrays and lists with one entry per example are split, in any nesting of containers, which keep
    their types. Each micro-batch contains every other value, unchanged.

    Args:
        batch: any pytree.
        count: number of micro-batches. For 1 the batch is returned unchanged.
    Returns:
        One (weight, micro-batch) per micro-batch, in order. weight: fraction of the batch's examples in it.
    Raises:
        BadInput: the number of examples is not defined, or smaller than `count`.
        Unsupported: the batch contains an object that cannot be split.
    """
    if count == 1:
        return [(1.0, batch)]
    size = require_examples(batch, count)
    lengths = part_lengths(size, count)
    starts = itertools.accumulate(lengths, initial=0)
    return [
        (length / size, _cut(batch, size, _rows(start, length), "the batch"))
        for start, length in zip(starts, lengths, strict=False)
    ]


def require_examples(batch: Any, count: int) -> int:
    """Return the number of examples of a batch.

    Raises:
        BadInput: the number is not defined, or smaller than `count`.
    """
    size = batch_size(batch)
    if size < count:
        raise BadInput(f"a batch of {size} cannot be cut into {count} micro-batches: use at most {size}.")
    return size


def at_most(count: int, batch: Any) -> int:
    """Return `count`, or the number of examples of a batch that has fewer, such as the last one of an epoch.

    Raises:
        BadInput: the number of examples is not defined.
    """
    return min(count, batch_size(batch) or count) if count > 1 else count


def first_part(batch: Any, count: int) -> Any:
    """Return the first of `count` micro-batches, or of as many as the batch has examples."""
    return split(batch, at_most(count, batch))[0][1]


def selected(batch: Any, rows: Sequence[int]) -> Any:
    """Return a batch with copies of some examples only. Other values are as in `split`.

    Args:
        batch: any pytree.
        rows: the indices of the examples.
    """

    def take(leaf: Any, axis: int) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.index_select(axis, torch.tensor(rows, device=leaf.device))
        return leaf.take(rows, axis) if isinstance(leaf, np.ndarray) else type(leaf)([leaf[row] for row in rows])

    return _cut(batch, batch_size(batch), take, "the batch")


def map_examples(batch: Any, function: Cut) -> Any:
    """Return a copy of a batch with `function(value, dimension)` in place of each value that holds examples.

    Args:
        batch: any pytree.
        function: takes a tensor, NumPy array or list, and the dimension of its examples.
    """
    return _cut(batch, batch_size(batch), function, "the batch")


def _rows(start: int, length: int) -> Cut:
    def cut(leaf: Any, axis: int) -> Any:
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            return leaf.narrow(axis, start, length)
        if isinstance(leaf, Tensor):
            return leaf.index_select(axis, torch.arange(start, start + length, device=leaf.device))
        return leaf[(slice(None),) * axis + (slice(start, start + length),)] if axis else leaf[start : start + length]

    return cut


def _cut(tree: Any, size: int, cut: Cut, path: str) -> Any:
    """Apply `cut` to each value that holds the `size` examples. path: name of the value in messages."""
    if is_array(tree):
        axis = _axis(tree, size, path)
        return tree if axis is None else cut(tree, axis)
    if isinstance(tree, _SHARED):
        return tree
    node = children(tree)
    if node is None or isinstance(tree, PackedSequence):
        return _shared(tree, size, path)
    if isinstance(tree, list | tuple) and len(tree) == size and not hasattr(tree, "_fields"):
        arrays = [leaf for leaf in leaves(tree) if is_array(leaf)]
        if not arrays or any(size not in leaf.shape for leaf in arrays):
            if isinstance(tree, tuple) and not all(isinstance(entry, str) for entry in tree):
                raise Unsupported(
                    f"{path} is a tuple of {size} values in a batch of {size} examples: micro-batches need to know "
                    "whether it has one value per example. Make it a list or a tensor if it has, or take it out of "
                    "the batch."
                )
            return cut(tree, 0)
    return node.rebuilt(
        [_cut(value, size, cut, path + name) for name, value in zip(node.names, node.values, strict=True)]
    )


def _axis(array: Any, size: int, path: str) -> int | None:
    """Return the dimension of the examples; None for an array with one row, which all examples share."""
    if isinstance(array, Tensor) and array.is_nested:
        raise Unsupported(f"{path} is a nested tensor, which micro-batches cannot split: use a padded tensor.")
    axes = [axis for axis, length in enumerate(array.shape) if length == size]
    if axes and (axes[0] == 0 or len(axes) == 1):
        return axes[0]
    if not axes and array.shape[0] == 1:
        return None
    raise BadInput(
        f"{path} has shape {tuple(array.shape)} in a batch of {size} examples: the first dimension of every tensor "
        "has one entry per example. Take values that all examples share out of the batch."
    )


def _shared(value: Any, size: int, path: str) -> Any:
    """Return a value that all micro-batches share; refuse one that may hold examples."""
    sized = not callable(value) and hasattr(value, "__len__") and len(value) == size
    attributes = [*getattr(value, "__dict__", {}).values()] if not callable(value) else []
    if sized or isinstance(value, Iterator | PackedSequence) or any(is_array(leaf) for leaf in leaves(attributes)):
        raise Unsupported(
            f"{path} is of type {type(value).__name__}, which micro-batches cannot split. Put tensors, NumPy arrays "
            "or lists into a dictionary, a tuple or a dataclass."
        )
    return value
