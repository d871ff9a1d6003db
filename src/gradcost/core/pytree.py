"""Batches, arguments and results as trees: tuples, lists and dictionaries with tensors in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in a tree, in its order, each as often as it occurs."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def plain(batch: Any) -> Any:
    """The batch as a tree: transformers' BatchEncoding and its like become dictionaries."""
    return dict(batch) if isinstance(batch, Mapping) and not isinstance(batch, dict) else batch
