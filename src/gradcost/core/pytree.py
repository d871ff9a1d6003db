"""Functions on pytrees: tensors and other objects nested in tuples, lists and dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from gradcost.core.errors import BadInput


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors among the leaves of a pytree, in order. A tensor that occurs twice is returned twice."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def plain(batch: Any) -> Any:
    """Convert a mapping that is not a dict, such as transformers' BatchEncoding, to a dict. Others are unchanged."""
    return dict(batch) if isinstance(batch, Mapping) and not isinstance(batch, dict) else batch


def batch_size(batch: Any) -> int:
    """Return the number of examples in a batch: the common first dimension of its tensors. Scalars are ignored.

    Raises:
        BadInput: the tensors differ in their first dimension, or all are scalars.
    """
    sizes = {tensor.shape[0] for tensor in tensors(plain(batch)) if tensor.ndim}
    if len(sizes) != 1:
        reason = f"here it is {', '.join(map(str, sorted(sizes)))}" if sizes else "none has one"
        raise BadInput(f"the tensors of a batch share their first dimension, one entry per example, but {reason}.")
    return sizes.pop()
