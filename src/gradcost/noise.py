"""Noise added to weights: base + sum_k scales[k] * z_k, by the faster path that serves.

`reference` is plain torch on any device; `fused` is one compiled pass over the weights on a CPU (extra `fast`).
They agree bit for bit: see `philox`, which defines the streams.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from gradcost.philox import Stream, generate

_CHUNK = 1 << 16  # elements whose temporaries are alive at once on the reference path


def add(
    stream: Stream,
    seeds: Sequence[int],
    scales: Sequence[float],
    start: int,
    base: Tensor,
    in_place: bool = False,
) -> Tensor:
    """base + sum_k scales[k] * z_k, where z_k are the elements of stream k that `base` covers.

    Law: with `start` the index of the first element of `base`, adding piece by piece equals adding to the
    whole, bit for bit; the terms are added in the order of the seeds. Float32 and float64 are computed in
    their own precision; bfloat16 and float16 in float32, rounded once at the end.

    Shapes: any `base`; the result has its shape, dtype and device: a new tensor, or `base` itself changed in
    place, which must then be contiguous.
    """
    precise = base.dtype in (torch.float32, torch.float64)
    flat = base.detach().reshape(-1)
    if not precise:
        flat = flat.to(torch.float32)
    path = fused if base.device.type == "cpu" and has_fused_path() and not isinstance(base, FakeTensor) else reference
    out = flat if in_place or not precise else torch.empty_like(flat)
    path(stream, seeds, scales, start, flat, out)
    if not in_place:
        return out.to(base.dtype).reshape(base.shape)
    assert base.is_contiguous()
    return base if precise else base.copy_(out.reshape(base.shape))


def reference(
    stream: Stream, seeds: Sequence[int], scales: Sequence[float], start: int, base: Tensor, out: Tensor
) -> None:
    """`out[:] = base + sum_k scales[k] * z_k` by torch operations, a chunk of 65,536 elements at a time."""
    for at in range(0, base.numel(), _CHUNK):
        piece = base[at : at + _CHUNK]
        for seed, scale in zip(seeds, scales, strict=True):
            z = generate(stream, seed, start + at, piece.numel(), base.device)
            piece = piece + z.to(base.dtype) * torch.tensor(scale, dtype=base.dtype, device=base.device)
        out[at : at + _CHUNK] = piece


@functools.cache
def has_fused_path() -> bool:
    """Whether numba (extra `fast`) is installed."""
    return importlib.util.find_spec("numba") is not None


def fused(
    stream: Stream, seeds: Sequence[int], scales: Sequence[float], start: int, base: Tensor, out: Tensor
) -> None:
    """`out[:] = base + sum_k scales[k] * z_k` in one compiled pass over the weights, on torch's thread count."""
    from gradcost import noise_fused  # numba takes half a second to import: only where it is used

    noise_fused.add(stream, seeds, scales, start, base, out)
