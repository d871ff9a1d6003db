"""The same batch in another size, for a forecast: shapes without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradcost.core.errors import BadInput
from gradcost.core.pytree import plain, tensors

_REPEATED = 1 << 20  # whole numbers that are repeated: models look at masks and positions


def batch_size(batch: Any) -> int:
    """The examples in a batch: the first dimension that its tensors have in common.

    Raises: ValueError when they differ in it, or there are none.
    """
    sizes = {tensor.shape[0] for tensor in tensors(plain(batch)) if tensor.ndim}
    if len(sizes) != 1:
        found = "none has one" if not sizes else f"here it is {', '.join(map(str, sorted(sizes)))}"
        raise BadInput(f"the examples of a batch lie along the first dimension of all of its tensors, and {found}.")
    return sizes.pop()


def resized(batch: Any, size: int) -> Any:
    """A batch of `size` examples with the shapes and types of `batch`, and no more data than its whole numbers.

    Those (tokens, masks) are repeated from the start; floating-point tensors are on the `meta` device. Scalars and
    what is no tensor stay. Raises: ValueError when size < 1, and as `batch_size`.
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
