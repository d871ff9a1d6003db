"""Batches, arguments and results as trees: tensors nested in tuples, lists and dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from gradcost.core.errors import BadInput


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in a tree in its order, each as often as it occurs."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def plain(batch: Any) -> Any:
    """Return the batch as a tree: a mapping such as transformers' BatchEncoding becomes a dictionary."""
    return dict(batch) if isinstance(batch, Mapping) and not isinstance(batch, dict) else batch


def batch_size(batch: Any) -> int:
    """Return how many examples a batch holds: the common first dimension of its tensors. Scalars do not count.

    Raises:
        BadInput: the tensors differ in their first dimension, or none has one.
    """
    sizes = {tensor.shape[0] for tensor in tensors(plain(batch)) if tensor.ndim}
    if len(sizes) != 1:
        reason = f"here it is {', '.join(map(str, sorted(sizes)))}" if sizes else "none has one"
        raise BadInput(f"the tensors of a batch share their first dimension, one entry per example, but {reason}.")
    return sizes.pop()
