"""Forward-mode rule for scaled dot-product attention: no scores of the whole sequence are in memory.

For a block of queries, with scores s = scale q k' + mask, p = softmax(s) and output o = p v, the tangents are
ds = scale (dq k' + q dk') + dmask, dp = p (ds - sum(p ds)) and do = dp v + p dv. PyTorch has this rule only for its
math kernel, whose memory is quadratic in the length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradcost.slopes.duals import Dual, apart, ordinary

_SCORES = 1 << 18  # scores of one block; fewer are slower
_ROWS = 2  # queries of a block, at least, per entry of a head: its scores then are about as many as queries and keys


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Return F.scaled_dot_product_attention of dual tensors, with its tangent.

    Law: the function of F.scaled_dot_product_attention; sums are added in another order. Memory: the scores of a
    block, 2^18 or about as many as queries and keys have entries, for one direction at a time.

    Args:
        query: shape (batch, heads, length, size), as in F.scaled_dot_product_attention.
        key: shape (batch, heads or fewer, source, size).
        value: shape (batch, heads or fewer, source, size of the output).
        attn_mask: bool (False: ignored) or added to the scores; None: no mask.
        dropout_p: the dropout rate.
        is_causal: whether query i attends to keys 0 .. i only.
        scale: the factor of the scores. None: 1 / sqrt(size).
        enable_gqa: whether several heads share keys and values.
    Returns:
        None where this rule does not serve: with dropout, which draws one mask for all scores, where `apart` refuses
        the tensors, for tensors of other than four dimensions, and where batches or heads are broadcast.
    """
    is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
    served = dropout_p == 0 and query.ndim == 4 and key.shape[:-2] == value.shape[:-2]
    served = served and len(query) == len(key) and (enable_gqa or query.shape[1] == key.shape[1])
    parts = apart(query, key, value, None if is_bool else attn_mask) if served else None
    if parts is None:
        return None
    q, k, v, mask = parts.duals
    assert q is not None
    assert k is not None
    assert v is not None
    shared = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    with ordinary():
        if attn_mask is not None and is_bool:
            mask = Dual(attn_mask, None)
        out, tangents = _in_blocks(q, k, v, mask, shared, factor, is_causal)
    return out if tangents is None else parts.joined(out, tangents)


def _in_blocks(
    q: Dual, k: Dual, v: Dual, mask: Dual | None, shared: int, factor: float, is_causal: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the output and its tangents. shared: number of heads that use the same keys and values."""
    batch, heads, length, _ = q.primal.shape
    source, directions = k.primal.shape[-2], max(dual.directions for dual in (q, k, v, mask) if dual is not None)
    rows = max(1, int(_ROWS * q.primal.shape[-1]), _SCORES // (source * batch * heads))
    # The memory order of torch's own kernels: the heads of a token lie side by side.
    size = (batch, length, heads, v.primal.shape[-1])
    out = q.primal.new_empty(size).transpose(1, 2)
    tangents = q.primal.new_empty((directions, *size)).transpose(2, 3) if directions else None
    keys, values = _flat(k.primal, shared), _flat(v.primal, shared)
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        seen = min(stop, source) if is_causal else source  # later keys have no weight
        block = _flat(q.primal[..., start:stop, :])
        scores = _added(None, block, keys[:, :seen].mT, factor)
        _mask(scores.view(batch, heads, stop - start, seen), mask, start, stop, is_causal)
        weights = torch.ops.aten._safe_softmax(scores, -1)
        del scores
        out[..., start:stop, :] = torch.bmm(weights, values[:, :seen]).view(batch, heads, stop - start, -1)
        for number in range(directions):
            moved = None
            if q.tangents is not None:
                moved = _added(None, _flat(q.tangents[number][..., start:stop, :]), keys[:, :seen].mT, factor)
            if k.tangents is not None:
                moved = _added(moved, block, _flat(k.tangents[number][..., :seen, :], shared).mT, factor)
            if mask is not None and mask.tangents is not None:
                moved = torch.zeros_like(weights) if moved is None else moved
                moved.view(batch, heads, stop - start, seen).add_(_rows(mask.tangents[number], start, stop, seen))
            if moved is not None:
                moved = torch.ops.aten._softmax_backward_data(moved, weights, -1, weights.dtype)
                moved = torch.bmm(moved, values[:, :seen])
            if v.tangents is not None:
                moved = _added(moved, weights, _flat(v.tangents[number][..., :seen, :], shared))
            assert moved is not None
            assert tangents is not None
            tangents[number][..., start:stop, :] = moved.view(batch, heads, stop - start, -1)
    return out, tangents


def _mask(scores: Tensor, mask: Dual | None, start: int, stop: int, is_causal: bool) -> None:
    """Mask the scores of a block of queries in place."""
    seen = scores.shape[-1]
    if mask is not None:
        part = _rows(mask.primal, start, stop, seen)
        scores.masked_fill_(~part, -math.inf) if part.dtype == torch.bool else scores.add_(part)
    if is_causal:
        queries, keys = (torch.arange(*ends, device=scores.device) for ends in ((start, stop), (0, seen)))
        scores.masked_fill_(keys > queries.unsqueeze(-1), -math.inf)


def _flat(tensor: Tensor, shared: int = 1) -> Tensor:
    """Return a tensor with batch and heads in one dimension, each head repeated `shared` times."""
    if shared > 1:
        tensor = tensor.unsqueeze(2).expand(-1, -1, shared, -1, -1)
    return tensor.reshape(-1, *tensor.shape[-2:])


def _added(total: Tensor | None, a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
    """Add factor * a b to `total` in place; None stands for zero."""
    is_first = total is None
    total = a.new_empty((len(a), a.shape[1], b.shape[2])) if total is None else total
    return torch.baddbmm(total, a, b, beta=0 if is_first else 1, alpha=factor, out=total)


def _rows(mask: Tensor, start: int, stop: int, seen: int) -> Tensor:
    """Return the part of a mask for some queries and the first keys. A dimension of size 1 is for all."""
    mask = mask[..., start:stop, :] if mask.shape[-2] > 1 else mask
    return mask[..., :seen] if mask.shape[-1] > 1 else mask
