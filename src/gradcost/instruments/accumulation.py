"""Recognise the additions of gradients that autograd would do in place, if no dispatch mode were active."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_accumulation(old: Any, new: Any) -> bool:
    """Return True if autograd adds a gradient to `old`, which nothing else references.

    Autograd would add in place here (torch's `can_accumulate_inplace`), but it does not under a dispatch mode. The
    tracker adds in place instead, to count the memory of a step without tracker. `old` has at most four references:
    autograd's buffer, the call's arguments, this function's arguments and the Python wrapper.

    Args:
        old: the first argument of an addition.
        new: the second one.
    """
    if torch._C._current_graph_task_id() < 0 or torch.is_grad_enabled():
        return False
    if not (isinstance(old, Tensor) and isinstance(new, Tensor)) or (old.shape, old.dtype) != (new.shape, new.dtype):
        return False
    if torch.strided != old.layout or torch.strided != new.layout:
        return False
    unshared = torch._C._storage_Use_Count(old.untyped_storage()._cdata) == 2  # the tensor and this call
    return unshared and old._use_count() <= 4 and old.is_contiguous()  # type: ignore[attr-defined]
