"""Cross-entropy of a language model that never holds all logits at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gradcost.checkpointing.recompute import recompute_in_backward
from gradcost.core.errors import BadInput


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    chunks: int = 8,
    bias: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Return the mean cross-entropy of the logits `F.linear(hidden, weight, bias)` against `target`.

    The rows are split into chunks of nearly equal length. Only one chunk's logits are in memory at a time: a chunk
    saves its rows of `hidden` and recomputes its logits in the backward pass. Cost: one more matmul of the head.
    Half-precision logits are converted to float32 before the softmax.

    Law: loss and gradients equal `F.cross_entropy` of all logits to rounding. Forward-mode differentiation, vmap and
    substituted weights work.

    Args:
        hidden: shape (..., d).
        weight: shape (words, d).
        target: word indices, shape (...).
        chunks: number of chunks of rows.
        bias: shape (words,), or None.
        ignore_index: a target with this index contributes no loss. If all do, the mean is nan as in
            `F.cross_entropy`.
    Returns:
        The mean loss, a scalar.
    Raises:
        BadInput: chunks < 1, or the shapes do not match.
    Source: Mini-sequence transformer (Luo et al. 2024, arXiv 2407.15892).
    """
    _check(hidden, weight, target, chunks, bias)
    if not torch.is_grad_enabled():
        # Read the parameters once: a substituted weight is made again at every read.
        weight, bias = weight.view(weight.shape), None if bias is None else bias.view(bias.shape)
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    lengths = _lengths(len(targets), chunks)
    sums = [
        recompute_in_backward(_summed_loss, chunk, weight, bias, words, ignore_index)
        for chunk, words in zip(rows.split(lengths), targets.split(lengths), strict=True)
    ]
    return torch.stack(sums).sum() / (targets != ignore_index).sum()


def _summed_loss(rows: Tensor, weight: Tensor, bias: Tensor | None, words: Tensor, ignore_index: int) -> Tensor:
    """Return the summed loss of one chunk of rows."""
    logits = F.linear(rows, weight, bias)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(logits, words, ignore_index=ignore_index, reduction="sum")


def _lengths(rows: int, chunks: int) -> list[int]:
    chunks = max(1, min(chunks, rows))
    length, remainder = divmod(rows, chunks)
    return [length + (number < remainder) for number in range(chunks)]


def _check(hidden: Tensor, weight: Tensor, target: Tensor, chunks: int, bias: Tensor | None) -> None:
    if chunks < 1:
        raise BadInput(f"the rows of logits are cut into 1 chunk or more, not {chunks!r}.")
    shapes_match = hidden.ndim > 0 and weight.ndim == 2 and hidden.shape == (*target.shape, weight.shape[1])
    if not shapes_match:
        raise BadInput(
            "chunked_cross_entropy takes hidden (..., d), weight (words, d) and target (...), not "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(target.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise BadInput(f"a bias of {len(weight)} words has shape ({len(weight)},), not {tuple(bias.shape)}.")
