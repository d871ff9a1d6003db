"""Torch functions that every slope replaces while it evaluates a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gradcost.core.errors import Unsupported
from gradcost.core.evaluation.embeddings import EMBEDDINGS, EmbeddingCall
from gradcost.core.evaluation.gradient_mode import set_grad_enabled
from gradcost.core.precision import LOSSES_IN_FLOAT32

Rule = Callable[..., Any]
# The types of operators such as torch.ops.aten.mm; also the key of a rule for them, which gets the operator first.
OPERATORS = torch._ops.OperatorBase, torch._ops.OpOverloadPacket


def _not_scaled(function: Any) -> Rule:
    def rule(*args: Any, **kwargs: Any) -> Any:
        if EmbeddingCall.of(function, args, kwargs).scales:
            raise Unsupported(
                "scale_grad_by_freq=True changes an embedding's gradient only in the backward pass, so no evaluation "
                "of the loss shows it. Set it to False, or use backprop()."
            )
        return function(*args, **kwargs)

    return rule


# Torch functions that every slope replaces: losses (computed in float32), setting the gradient mode (it marks the
# loss's constant parts) and embeddings (they refuse scale_grad_by_freq).
RULES: dict[Any, Rule] = (
    LOSSES_IN_FLOAT32
    | {torch._C._set_grad_enabled: set_grad_enabled}
    | {function: _not_scaled(function) for function in EMBEDDINGS}
)
