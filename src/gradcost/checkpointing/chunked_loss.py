"""The loss of a language model without all of its logits at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gradcost.checkpointing.recompute import recomputed
from gradcost.core.errors import BadInput


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    chunks: int = 8,
    bias: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The mean cross-entropy of `F.linear(hidden, weight, bias)` against `target`: a scalar.

    hidden: (..., d). weight: (words, d), bias: (words,). target: (...) of word numbers; where it is
    `ignore_index` there is no loss, and where it is that everywhere the mean is nan, as in `F.cross_entropy`.

    The rows are cut into `chunks` of nearly equal length, and the logits of one of them are alive at a time: each
    chunk saves its rows of `hidden`, and its head runs again in the backward, one matmul of the head more in all.
    Logits in half precision are taken to float32 before the softmax.

    Law: the loss and its gradients are those of the whole to rounding; forward-mode differentiation, vmap and
    substituted weights go through it. Source: Mini-sequence transformer (Luo et al. 2024, arXiv 2407.15892).
    Raises: ValueError when chunks < 1 or the shapes do not match.
    """
    _refuse(hidden, weight, target, chunks, bias)
    if not torch.is_grad_enabled():
        # Read once: where another weight is substituted for this one, each use would make it anew.
        weight, bias = weight.view(weight.shape), None if bias is None else bias.view(bias.shape)
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    lengths = _lengths(len(targets), chunks)
    sums = [
        recomputed(_head, some, weight, bias, words, ignore_index)
        for some, words in zip(rows.split(lengths), targets.split(lengths), strict=True)
    ]
    return torch.stack(sums).sum() / (targets != ignore_index).sum()


def _head(rows: Tensor, weight: Tensor, bias: Tensor | None, words: Tensor, ignore_index: int) -> Tensor:
    """The summed loss of one chunk of rows."""
    logits = F.linear(rows, weight, bias)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(logits, words, ignore_index=ignore_index, reduction="sum")


def _lengths(rows: int, chunks: int) -> list[int]:
    chunks = max(1, min(chunks, rows))
    short, longer = divmod(rows, chunks)
    return [short + (number < longer) for number in range(chunks)]


def _refuse(hidden: Tensor, weight: Tensor, target: Tensor, chunks: int, bias: Tensor | None) -> None:
    if chunks < 1:
        raise BadInput(f"the rows of logits are cut into 1 chunk or more, not {chunks!r}.")
    fits = hidden.ndim > 0 and weight.ndim == 2 and hidden.shape == (*target.shape, weight.shape[1])
    if not fits:
        raise BadInput(
            "chunked_cross_entropy takes hidden (..., d), weight (words, d) and target (...), not "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(target.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise BadInput(f"a bias of {len(weight)} words has shape ({len(weight)},), not {tuple(bias.shape)}.")
