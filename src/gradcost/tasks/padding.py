"""Attention masks of padded sequences for models of transformers.

The direct way is a mask of two dimensions, 1 for real tokens and 0 for padding. For such a mask, many models test
whether all tokens are real: a synchronisation in each step, and another kernel for a batch without padding. The
other masks of this module have no such test, and each model accepts only some of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradcost.core.isolation import eval_mode, restored_generators
from gradcost.tasks.pretrained_files import encoded, tokenizer

Mask = Callable[[Tensor, int], Tensor | None]
# Relative to the largest logit: above the rounding of float32 in deep models, below the effect of a wrong mask.
TOLERANCE = 1e-4


def plain_mask(tokens: Tensor, padding: int) -> Tensor:
    """Return 1 for real tokens and 0 for padding, shape (N, T)."""
    return (tokens != padding).long()


def additive_mask(tokens: Tensor, padding: int) -> Tensor:
    """Return 0 for real tokens and the least float32 for padding, shape (N, 1, 1, T)."""
    mask = torch.zeros(tokens.shape, device=tokens.device)
    return mask.masked_fill(tokens == padding, torch.finfo(mask.dtype).min)[:, None, None, :]


def no_mask(tokens: Tensor, padding: int) -> None:
    """Return None. In a causal model, no token sees the padding on its right."""


def best_mask(model: nn.Module, tokens: Tensor, padding: int) -> Mask:
    """Return the first of `additive_mask`, `no_mask` and `plain_mask` with the logits of `plain_mask`.

    The model is called a few times, in eval mode. Random generators are restored.

    Args:
        model: a sequence classifier of transformers.
        tokens: two different rows with padding on the right, as long as those of the task: a window of attention that
            is longer than the batch has no effect.
        padding: the token of padding.
    """

    def logits(mask: Mask) -> Tensor:
        return model(input_ids=tokens, attention_mask=mask(tokens, padding)).logits

    with eval_mode(model), torch.no_grad(), restored_generators():
        try:
            right = logits(plain_mask)
        except Exception:
            return plain_mask  # the loss says what is wrong, such as a text longer than the model's positions
        tolerance = TOLERANCE * float(right.abs().max())
        if torch.allclose(right[0], right[1], rtol=0, atol=tolerance):
            return plain_mask  # logits that do not depend on the text, such as those of a head of zeros, tell nothing
        for mask in (additive_mask, no_mask):
            try:
                found = logits(mask)
            except Exception:
                continue  # The model needs a mask of another shape.
            if torch.allclose(found, right, rtol=0, atol=tolerance):
                return mask
    return plain_mask


def padded_example(weights: str, length: int) -> Tensor:
    """Return two rows of random words in the tokenizer's format, the second with padding: int64, shape (2, length).

    Args:
        weights: the name of a pretrained model, whose tokenizer is used.
        length: number of tokens per row.
    """
    encode: Any = tokenizer(weights)
    rows = encoded(weights, ["a " * length, "a " * max(1, length // 4)], length)
    special = set(encode.all_special_ids)
    # An added token can be one that the model has no embedding for.
    added = special | set(encode.get_added_vocab().values())
    words = torch.tensor(sorted(set(encode.get_vocab().values()) - added))
    fixed = torch.isin(rows, torch.tensor(sorted(special - {encode.unk_token_id})))
    chosen = torch.randint(len(words), rows.shape, generator=torch.Generator().manual_seed(0))
    return torch.where(fixed, rows, words[chosen])
