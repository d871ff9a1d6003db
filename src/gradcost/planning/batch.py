"""A batch of another size, for a forecast: shapes without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradcost.core.errors import BadInput
from gradcost.core.pytree import batch_size, plain

_REPEATED = 1 << 20  # integers that are repeated at most: models read masks and positions


def resized(batch: Any, size: int) -> Any:
    """Return a batch of `size` examples with the shapes and types of `batch`.

    Integer tensors (tokens, masks) are repeated from the start. Floating-point tensors are on the `meta` device.
    Scalars, and values other than tensors, stay as they are.

    Raises:
        BadInput: size < 1, or the tensors do not share their first dimension.
    """
    if size < 1:
        raise BadInput(f"a batch has 1 example or more, not {size}.")
    batch_size(batch)

    def sized(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim:
            return leaf
        shape = (size, *leaf.shape[1:])
        known = not (leaf.is_floating_point() or leaf.is_meta) and leaf.device.type == "cpu" and len(leaf)
        if known and size * leaf[0].numel() <= _REPEATED:
            return leaf[torch.arange(size) % len(leaf)]
        return torch.empty(shape, dtype=leaf.dtype, device="meta")

    return pytree.tree_map(sized, plain(batch))
