"""Cross-entropy of a language model, computed in chunks: the logits of all rows never exist at once."""

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

    The rows of `hidden` (one per target word) are split into chunks of nearly equal length. Only one chunk's logits
    are in memory at a time. They are not saved for the backward pass, which recomputes them from the chunk's rows.
    Half-precision logits are converted to float32 before the softmax.

    Cost: one forward matmul with `weight` more than `F.cross_entropy` on all logits.

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
    lengths = _chunk_lengths(len(targets), chunks)
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


def _chunk_lengths(rows: int, chunks: int) -> list[int]:
    chunks = max(1, min(chunks, rows))
    length, remainder = divmod(rows, chunks)
    return [length + (i < remainder) for i in range(chunks)]


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
