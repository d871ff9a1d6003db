"""Change the size of a batch for a forecast, which needs shapes but no data."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradcost.core.batching.micro_batches import map_examples
from gradcost.core.errors import BadInput

_MAX_REPEATED = 1 << 20  # elements; integer tensors up to this size get values: models branch on masks and positions


def resized(batch: Any, size: int) -> Any:
    """Return a batch of `size` examples with the shapes and types of `batch`.

    - Integer tensors on the CPU (tokens, masks), up to 2^20 elements, NumPy arrays and lists with one entry per
      example: the examples of `batch`, repeated.
    - Other tensors: empty, on the `meta` device.
    - Scalars, and other values: unchanged.

    Raises:
        BadInput: size < 1, or the number of examples of `batch` is not defined.
    """
    if size < 1:
        raise BadInput(f"a batch has 1 example or more, not {size}.")

    made: dict[tuple[int, int], tuple[Any, Any]] = {}  # identity and axis -> the leaf, kept alive, and the result

    def resize(leaf: Any, axis: int) -> Any:
        # A tensor that occurs twice, as tokens and as targets, stays one tensor.
        if (id(leaf), axis) not in made:
            made[id(leaf), axis] = leaf, _resized(leaf, axis, size)
        return made[id(leaf), axis][1]

    return map_examples(batch, resize)


def _resized(leaf: Any, axis: int, size: int) -> Any:
    """Return a tensor, array or list with `size` examples along a dimension."""
    if isinstance(leaf, np.ndarray):
        return leaf.take(np.arange(size) % leaf.shape[axis], axis)
    if not isinstance(leaf, Tensor):
        return type(leaf)(list(itertools.islice(itertools.cycle(leaf), size)))
    shape = (*leaf.shape[:axis], size, *leaf.shape[axis + 1 :])
    has_values = not (leaf.is_floating_point() or leaf.is_complex() or leaf.is_meta) and leaf.device.type == "cpu"
    if has_values and leaf.numel() and math.prod(shape) <= _MAX_REPEATED:
        return leaf.index_select(axis, torch.arange(size) % leaf.shape[axis])
    return torch.empty(shape, dtype=leaf.dtype, device="meta")
