"""Detect that a loss writes into its batch, restore the containers of the batch, and copy batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.evaluation.mutable_state import Named, Traversal
from gradcost.core.evaluation.saved_state import version_of

Record = tuple[Any, Any]  # (tensor, (version, requires_grad, grad)), or (container, shallow copy)
_SCALARS = {int, float, bool, str, bytes, type(None)}


def watch(batch: Any) -> list[Record]:
    """Record the tensors and containers of a batch, for `put_back`. Costs less than 1 us for a pair of tensors."""
    records: list[Record] = []
    _watch(batch, records)
    return records


def put_back(records: list[Record]) -> list[Tensor]:
    """Restore the entries of a batch's containers. Return the tensors that were written in place.

    Also restore `requires_grad` and `.grad` of leaf tensors. The values of written tensors are not restored.
    """
    written = []
    for value, saved in records:
        if isinstance(value, Tensor):
            version, requires_grad, grad = saved
            if value.is_leaf:
                if value.requires_grad is not requires_grad:
                    value.requires_grad_(requires_grad)
                if value.grad is not grad:
                    value.grad = grad
            if version_of(value) != version:
                written.append(value)
        elif isinstance(value, list):
            if len(value) != len(saved) or any(one is not other for one, other in zip(value, saved, strict=True)):
                list.__setitem__(value, slice(None), saved)
        elif value.keys() != saved.keys() or any(value[key] is not saved[key] for key in saved):
            value.clear()
            value.update(saved)
    return written


def copied(batch: Any) -> Any:
    """Return a deep copy of a batch. Its tensors are detached clones with the same `requires_grad`.

    The copy shares parameters and modules with the batch.

    Raises:
        BadInput: the batch is or holds an iterator.
        Unsupported: the batch holds another object that cannot be copied.
    """
    traversal = Traversal()
    traversal.visit("batch", batch)
    memo: dict[int, Any] = {
        id(value): value.detach().clone().requires_grad_(value.requires_grad)
        for _, value in traversal.objects
        if isinstance(value, Tensor)
    }
    if any(isinstance(value, Iterator) for value in traversal.seen.values()):
        raise BadInput("the batch is or holds an iterator, which an evaluation consumes. Pass a list of its items.")
    memo |= {key: value for key, value in traversal.seen.items() if isinstance(value, nn.Parameter | nn.Module)}
    try:
        return copy.deepcopy(batch, memo)
    except (TypeError, NotImplementedError, RuntimeError, copy.Error) as error:
        raise Unsupported(
            f"the loss writes into its batch, and the batch cannot be copied ({error}). Let the loss copy the "
            "tensors or containers that it changes."
        ) from error


def contents(batch: Any) -> list[Named]:
    """Return the tensors and mutable containers of a batch, with names such as "batch[0]"."""
    traversal = Traversal()
    traversal.visit("batch", batch)
    return traversal.objects


def name_in(batch: Any, tensor: Tensor) -> str:
    """Return the name of a tensor in a batch, such as "batch['labels']"."""
    return next((name for name, value in contents(batch) if value is tensor), "batch")


def _watch(value: Any, records: list[Record]) -> None:
    kind = type(value)
    if kind is Tensor or isinstance(value, Tensor):
        records.append((value, (version_of(value), value.requires_grad, value.grad if value.is_leaf else None)))
    elif kind in _SCALARS:
        pass
    elif isinstance(value, tuple):
        for item in value:
            _watch(item, records)
    elif isinstance(value, list):
        records.append((value, value.copy()))
        for item in value:
            _watch(item, records)
    else:
        entries = value if isinstance(value, dict) else getattr(value, "__dict__", None)
        if isinstance(entries, dict) and not isinstance(value, type):
            records.append((entries, entries.copy()))
            for item in entries.values():
                _watch(item, records)
