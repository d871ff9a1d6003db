"""The bits of tensors: as bytes, and as a checksum that notices each changed and each moved element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradcost.core.complex_numbers import as_real

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # the integer type of that many bytes
_PIECE = {"cpu": 1 << 15, "cuda": 1 << 21}  # elements at a time, of 16 bytes: few, and on a CPU within its cache


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of the elements of a strided tensor, in the order of its indices; not copied if possible."""
    return _flat(tensor).view(torch.uint8).cpu().numpy().data


def checksum(tensor: Tensor) -> int:
    """Return a checksum of a strided tensor: the sum of (2 i + 1) times element i, as integers modulo 2^64."""
    flat = _flat(tensor)
    words = flat.view(_WORDS[flat.itemsize])
    piece = _PIECE.get(tensor.device.type, _PIECE["cuda"])
    odd = 2 * torch.arange(min(piece, words.numel()), device=words.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), piece):
        part = words[start : start + piece].to(torch.int64, copy=True)
        total += 2 * start * part.sum()
        total += part.mul_(odd[: part.numel()]).sum()
    return int(total)


def _flat(tensor: Any) -> Tensor:
    if hasattr(tensor, "to_local"):  # a DTensor: the part of this process
        tensor = tensor.to_local()
    return as_real(tensor.detach()).resolve_neg().contiguous().reshape(-1)


def bits_of(tensor: Tensor | None) -> Any:
    """Return (shape, dtype, checksum of the bits) of a tensor; for sparse or quantized tensors no checksum."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_quantized:
        return tensor.shape, tensor.dtype, tensor.layout
    return tensor.shape, tensor.dtype, checksum(tensor)
