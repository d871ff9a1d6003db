"""Change the size of a batch for a forecast, which needs shapes but no data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradcost.core.errors import BadInput
from gradcost.core.pytree import batch_size, plain

_MAX_REPEATED = 1 << 20  # elements; smaller integer tensors have values, because models read masks and positions


def resized(batch: Any, size: int) -> Any:
    """Return a batch of `size` examples with the shapes and types of `batch`.

    - Integer tensors on the CPU (tokens, masks): the examples of `batch` are repeated, up to 2^20 elements.
    - Other tensors: empty, on the `meta` device.
    - Scalars, and values other than tensors: unchanged.

    Raises:
        BadInput: size < 1, or the first dimensions of the tensors differ.
    """
    if size < 1:
        raise BadInput(f"a batch has 1 example or more, not {size}.")
    batch_size(batch)

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim:
            return leaf
        shape = (size, *leaf.shape[1:])
        has_values = not (leaf.is_floating_point() or leaf.is_meta) and leaf.device.type == "cpu" and len(leaf)
        if has_values and size * leaf[0].numel() <= _MAX_REPEATED:
            return leaf[torch.arange(size) % len(leaf)]
        return torch.empty(shape, dtype=leaf.dtype, device="meta")

    return pytree.tree_map(resize, plain(batch))
