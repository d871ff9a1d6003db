"""Forward-mode rule for scaled dot-product attention: no scores of the whole sequence are in memory.

For a block of queries, with scores s = scale q k' + mask, p = softmax(s) and output o = p v, the tangents are
ds = scale (dq k' + q dk') + dmask, dp = p (ds - sum(p ds)) and do = dp v + p dv. PyTorch has this rule only for its
math kernel, whose memory is quadratic in the length.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

_SCORES = 1 << 18  # scores of one block; fewer are slower
_ROWS = 2  # queries of a block, at least, per entry of a head: its scores then are about as many as queries and keys


def serves(query: Tensor, *others: Any, dropout_p: float) -> bool:
    """Return whether `attention` gives the function of F.scaled_dot_product_attention.

    Dropout draws one mask for all scores, and a loss that calls autograd needs PyTorch's rule.

    Args:
        query: the queries.
        others: keys, values and mask.
        dropout_p: the dropout rate.
    """
    tensors = [query, *(other for other in others if isinstance(other, Tensor))]
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    casts = torch.is_autocast_enabled(query.device.type)
    return dropout_p == 0 and query.ndim == 4 and not needs_gradient and not casts


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return F.scaled_dot_product_attention of dual tensors, with its tangent.

    Law: the function of F.scaled_dot_product_attention; sums are added in another order. Memory: the scores of a
    block, 2^18 or about as many as queries and keys have entries, with one tangent per direction.

    Args:
        query: shape (batch, heads, length, size), as in F.scaled_dot_product_attention.
        key: shape (batch, heads or fewer, source, size).
        value: shape (batch, heads or fewer, source, size of the output).
        attn_mask: bool (False: ignored) or added to the scores; None: no mask.
        is_causal: whether query i attends to keys 0 .. i only.
        scale: the factor of the scores. None: 1 / sqrt(size).
        enable_gqa: whether several heads share keys and values.
    """
    heads, length, source = query.shape[-3], query.shape[-2], key.shape[-2]
    if enable_gqa and key.shape[-3] != heads:
        query = query.unflatten(-3, (key.shape[-3], -1))
        key, value = key.unsqueeze(-3), value.unsqueeze(-3)
        if attn_mask is not None and attn_mask.ndim == 4:
            groups = (key.shape[-4], -1) if attn_mask.shape[-3] > 1 else (1, 1)
            attn_mask = attn_mask.unflatten(-3, groups)
    duals = [forward_ad.unpack_dual(tensor) for tensor in (query, key, value)]
    (q, dq), (k, dk), (v, dv) = duals
    mask, dmask = (None, None) if attn_mask is None else forward_ad.unpack_dual(attn_mask)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    rows = max(1, int(_ROWS * query.shape[-1]), _SCORES // (source * math.prod(query.shape[:-2])))
    outs, tangents = [], []
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        seen = min(stop, source) if is_causal else source  # later keys have no weight
        block = q[..., start:stop, :] * factor
        scores = block @ k[..., :seen, :].mT
        dscores = _sum(
            None if dq is None else (dq[..., start:stop, :] * factor) @ k[..., :seen, :].mT,
            None if dk is None else block @ dk[..., :seen, :].mT,
            None if dmask is None else _rows(dmask, start, stop, seen),
        )
        if mask is not None:
            part = _rows(mask, start, stop, seen)
            scores = scores.masked_fill(~part, -math.inf) if part.dtype == torch.bool else scores + part
        if is_causal:
            later = torch.arange(seen, device=q.device) > torch.arange(start, stop, device=q.device).unsqueeze(-1)
            scores = scores.masked_fill(later, -math.inf)
        weights = torch.ops.aten._safe_softmax(scores, -1)
        outs.append(weights @ v[..., :seen, :])
        moved = None if dv is None else weights @ dv[..., :seen, :]
        if dscores is not None:
            weighted = weights * dscores
            dweights = weighted - weights * weighted.sum(-1, keepdim=True)
            moved = _sum(moved, dweights @ v[..., :seen, :])
        tangents.append(moved)
    out = torch.cat(outs, -2) if len(outs) > 1 else outs[0]
    if tangents[0] is not None:
        out = forward_ad.make_dual(out, torch.cat(tangents, -2) if len(tangents) > 1 else tangents[0])
    return out.flatten(-4, -3) if out.ndim > 4 else out


def _rows(mask: Tensor, start: int, stop: int, seen: int) -> Tensor:
    """Return the part of a mask for some queries and the first keys. A dimension of size 1 is for all."""
    mask = mask[..., start:stop, :] if mask.shape[-2] > 1 else mask
    return mask[..., :seen] if mask.shape[-1] > 1 else mask


def _sum(*terms: Tensor | None) -> Tensor | None:
    """Return the sum of the terms that are not None, or None."""
    total: Tensor | None = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, bool]:
    """Return attention, and whether it ran on the math kernel."""
    if serves(query, key, value, attn_mask, dropout_p=dropout_p):
        return attention(query, key, value, attn_mask, is_causal, scale, enable_gqa), False
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options), True
