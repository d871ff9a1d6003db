"""Cross-entropy of a language model, computed in chunks: the logits of all rows never exist at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]

from gradcost.checkpointing.recompute import recompute_in_backward
from gradcost.core.equal_parts import part_lengths
from gradcost.core.errors import BadInput

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (rows, weight, bias) -> logits


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    chunks: int = 8,
    bias: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Return the mean cross-entropy of the logits `F.linear(hidden, weight, bias)` against `target`.

    The rows of `hidden` (one per target word) are split into chunks of nearly equal length. Only one chunk's logits
    are in memory at a time. They are not saved for the backward pass, which recomputes them from the chunk's rows.
    Half-precision logits are converted to float32 before the softmax.

    Cost: one forward matmul with `weight` more than `F.cross_entropy` on all logits. The backward pass adds up the
    gradient of `weight` in one tensor.

    Law: loss and gradients equal those of `F.cross_entropy` on all logits, up to rounding. Forward-mode
    differentiation, vmap and perturbed weights (`slopes.substitution`) work.

    Args:
        hidden: input of the head, shape (..., d).
        weight: weight of the head, shape (words, d).
        target: word indices, shape (...).
        chunks: number of chunks of rows.
        bias: bias of the head, shape (words,), or None.
        ignore_index: targets equal to this index do not count in the mean. If no target counts, the result is nan, as
            with `F.cross_entropy`.
    Returns:
        The mean loss, a scalar.
    Raises:
        BadInput: chunks < 1, or the shapes do not match.
    Source: Mini-sequence transformer (Luo et al. 2024, arXiv 2407.15892).
    """
    _check(hidden, weight, target, chunks, bias)
    if not torch.is_grad_enabled():
        # Read each parameter once: `slopes.substitution` computes a perturbed weight again at every read.
        weight, bias = weight.view(weight.shape), None if bias is None else bias.view(bias.shape)
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    chunks = max(1, min(chunks, len(targets)))
    lengths, linear = part_lengths(len(targets), chunks), _linear_for(weight, chunks)
    sums = [
        recompute_in_backward(_summed_loss, linear, chunk, weight, bias, words, ignore_index)
        for chunk, words in zip(rows.split(lengths), targets.split(lengths), strict=True)
    ]
    return torch.stack(sums).sum() / (targets != ignore_index).sum()


def _linear_for(weight: Tensor, count: int) -> Linear:
    """Return the linear function of `count` chunks: `F.linear`, or the same with a shared gradient of `weight`."""
    is_differentiated = torch.is_grad_enabled() and functorch.maybe_current_level() is None
    if count < 2 or not (is_differentiated and weight.requires_grad):
        return F.linear
    gradient = _SharedGradient(count)

    def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits: Any = _Linear.apply(rows, weight, gradient)
        return logits if bias is None else logits + bias

    return linear


class _SharedGradient:
    """The sum of the gradients of one weight from `count` chunks."""

    def __init__(self, count: int) -> None:
        self.count, self.missing = count, count
        self.sum: Tensor | None = None

    def add(self, gradient: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Add gradient.T @ rows. Return the sum after the last chunk, None before."""
        if self.sum is None:
            self.sum = (gradient.mT @ rows).to(dtype)
        elif gradient.dtype == dtype:
            torch.addmm(self.sum, gradient.mT, rows, out=self.sum)
        else:  # under autocast
            self.sum += gradient.mT @ rows
        self.missing -= 1
        if self.missing:
            return None
        result, self.sum, self.missing = self.sum, None, self.count
        return result


class _Linear(torch.autograd.Function):
    """`F.linear` without bias, whose backward pass adds to a `_SharedGradient`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, gradient: _SharedGradient) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.gradient = gradient
        # Detached: else autocast in torch 2.9 keeps the cast weight, which has no graph, for later uses.
        return F.linear(rows, weight.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        (of_logits,) = gradients
        dtype = of_logits.dtype
        of_weight = ctx.gradient.add(of_logits, rows.to(dtype), weight.dtype)
        of_rows = (of_logits @ weight.to(dtype)).to(rows.dtype) if ctx.needs_input_grad[0] else None
        return of_rows, of_weight, None


def _summed_loss(
    linear: Linear, rows: Tensor, weight: Tensor, bias: Tensor | None, words: Tensor, ignore_index: int
) -> Tensor:
    """Return the summed loss of one chunk of rows."""
    logits = linear(rows, weight, bias)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(logits, words, ignore_index=ignore_index, reduction="sum")


def _check(hidden: Tensor, weight: Tensor, target: Tensor, chunks: int, bias: Tensor | None) -> None:
    if chunks < 1:
        raise BadInput(f"the rows of `hidden` are cut into 1 chunk or more, not {chunks!r}.")
    shapes_match = hidden.ndim > 0 and weight.ndim == 2 and hidden.shape == (*target.shape, weight.shape[1])
    if not shapes_match:
        raise BadInput(
            "chunked_cross_entropy takes hidden (..., d), weight (words, d) and target (...), not "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(target.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise BadInput(f"a bias of {len(weight)} words has shape ({len(weight)},), not {tuple(bias.shape)}.")
