"""Let fakes on a CPU save and allocate what CUDA's kernels of dropout and attention do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradcost.core.interrupts import undoing

_HALF = (torch.float16, torch.bfloat16)
_MOST_FLASH = 256  # entries of a head
_ATEN = torch.ops.aten


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """Replace, inside the context, torch functions for which CUDA has other kernels than a CPU.

    - Dropout saves a mask of one byte per element; on a CPU it saves factors in the type of the input.
    - Attention keeps no scores, also with dropout and masks: half precision without a mask takes FlashAttention, the
      rest the memory-efficient kernel. What neither serves (float32 with fewer heads for keys) takes plain products.

    The functions are replaced where torch's modules look them up, so that recomputation in a backward pass, where
    torch has no function modes, finds them, too. Temporaries inside the kernels are not counted, such as the float32
    gradient of the queries in FlashAttention.

    Source: PyTorch's `_dropout_impl` and `sdp_utils.cpp`.
    """
    places = [
        (torch._VF, "dropout", _dropout),
        (torch, "dropout", _dropout),
        (F, "scaled_dot_product_attention", _attention),
    ]
    originals = [getattr(place, name) for place, name, _ in places]

    def restore() -> None:
        for (place, name, _), original in zip(places, originals, strict=True):
            setattr(place, name, original)

    with undoing(restore):
        for place, name, ours in places:
            setattr(place, name, ours)
        yield


_torch_dropout, _torch_attention = torch.dropout, F.scaled_dot_product_attention


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:
    if not train or not 0 < p < 1 or not input.numel():
        return _torch_dropout(input, p, train)
    return torch.native_dropout(input, p, True)[0]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    heads, entries = query.shape[-3] if query.ndim > 3 else 1, query.shape[-1]
    is_alike = query.ndim == key.ndim == value.ndim == 4 and entries == key.shape[-1] == value.shape[-1]
    if torch.backends.cuda.flash_sdp_enabled() and is_alike and _serves_flash(query, attn_mask):
        return _ATEN._scaled_dot_product_flash_attention(
            *_padded(query, key, value), dropout_p, is_causal, False, scale=entries**-0.5 if scale is None else scale
        )[0][..., :entries]
    whole = entries % (8 if query.dtype in _HALF else 4) == 0 and key.shape[-3] == heads
    if torch.backends.cuda.mem_efficient_sdp_enabled() and is_alike and whole:
        bias = None if attn_mask is None else _bias(query, key, attn_mask)
        needs_sums = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
        return _ATEN._scaled_dot_product_efficient_attention(
            query, key, value, bias, needs_sums, dropout_p, is_causal, scale=scale
        )[0]
    with sdpa_kernel(SDPBackend.MATH):
        return _torch_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


def _serves_flash(query: Tensor, mask: Tensor | None) -> bool:
    return mask is None and query.dtype in _HALF and query.shape[-1] <= _MOST_FLASH


def _padded(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Pad heads to a multiple of 8 entries, as FlashAttention needs."""
    missing = -tensors[0].shape[-1] % 8
    return tuple(F.pad(tensor, (0, missing)) for tensor in tensors) if missing else tensors


def _bias(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Return a mask as the efficient kernel takes it: numbers in the type of the query, one row per query."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    return mask.expand(*query.shape[:-1], key.shape[-2])
