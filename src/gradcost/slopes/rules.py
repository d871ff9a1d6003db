"""Torch functions that every slope replaces while it evaluates a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradcost.core.errors import Unsupported
from gradcost.core.evaluation.gradient_mode import set_grad_enabled
from gradcost.core.precision import LOSSES_IN_FLOAT32

Rule = Callable[..., Any]
# The types of operators such as torch.ops.aten.mm; also the key of a rule for them, which gets the operator first.
OPERATORS = torch._ops.OperatorBase, torch._ops.OpOverloadPacket


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if scale_grad_by_freq:
        raise Unsupported(
            "scale_grad_by_freq=True changes an embedding's gradient only in the backward pass, so no evaluation of "
            "the loss shows it. Set it to False, or use backprop()."
        )
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)


# Torch functions that every slope replaces: losses (computed in float32), setting the gradient mode (it marks the
# loss's constant parts) and F.embedding (it refuses scale_grad_by_freq).
RULES: dict[Any, Rule] = LOSSES_IN_FLOAT32 | {
    torch._C._set_grad_enabled: set_grad_enabled,
    F.embedding: _embedding,
}
