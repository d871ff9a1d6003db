"""Refuse a gradient whose loss or slopes are not finite, before it reaches a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradcost.core.errors import BadInput
from gradcost.core.fake import is_fake


class NotFinite(BadInput):
    """The loss or a slope of a batch is not finite, so no gradient is applied. `number` is that loss or slope."""

    def __init__(self, what: str, number: float) -> None:
        super().__init__(
            f"the {what} of this batch is {number}, so its gradient cannot be applied, and no weight has moved. "
            "Check the batch (a mean over no targets is nan) and the weights. Skip the batch, or lower the learning "
            "rate."
        )
        self.number = number


def require_finite(loss: Tensor, slopes: Tensor | None = None, groups: Sequence[Any] = ()) -> None:
    """Raise unless the loss and the slopes are finite. On an accelerator, this waits for their values.

    Args:
        loss: a scalar.
        slopes: a vector; None if there are no slopes. Fake tensors pass.
        groups: process groups whose processes all raise if the loss of one of them is not finite.
    Raises:
        NotFinite: one of the numbers is not finite.
    """
    if is_fake(loss):
        return
    number: Any = loss.tolist()  # faster than float(loss), and not seen by a dispatch mode
    are_finite = torch.tensor(math.isfinite(number), dtype=torch.int32, device=loss.device) if groups else None
    for group in groups:
        dist.all_reduce(are_finite, dist.ReduceOp.MIN, group=group)
    if not math.isfinite(number):
        raise NotFinite("loss", number)
    if are_finite is not None and not are_finite:
        raise NotFinite("loss that another process has", math.nan)
    for number in () if slopes is None else slopes.tolist():
        if not math.isfinite(number):
            raise NotFinite("slope", number)
