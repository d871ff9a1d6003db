"""A loss under autocast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class UnderAutocast:
    """A loss that is computed under `torch.autocast`. Backward passes run outside of it, as torch recommends.

    Args:
        loss: returns the loss of the model on a batch.
        device: the type of the model's device.
        dtype: the dtype of autocast.
    """

    loss: Callable[[nn.Module, Any], Tensor]
    device: str
    dtype: torch.dtype

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast(self.device, self.dtype):
            return self.loss(model, batch)
