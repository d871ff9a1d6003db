"""Noise added to weights: base + sum_k scales[k] * z_k, by the faster path that serves.

`reference` is plain torch on any device; `fused` is one compiled pass over the weights on a CPU (extra `fast`).
They agree bit for bit: see `philox`, which defines the streams.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from gradcost.core.fake import is_fake, stands_for
from gradcost.core.memory_events import tag
from gradcost.noise.philox import Stream, generate, likeness

_CHUNK = 1 << 16  # elements whose temporaries are alive at once on the reference path
_HALVES = 1 << 20  # elements of a half-precision tensor that are float32 at once


def add_noise(
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
    source = base.detach().reshape(-1)
    assert base.is_contiguous() or not in_place
    out = source if in_place else torch.empty_like(source, memory_format=torch.contiguous_format)
    path = _path(base)
    if base.dtype in (torch.float32, torch.float64):
        path(stream, seeds, scales, start, source, out)
    else:
        for at in _starts(base, _HALVES):
            piece = source[at : at + _HALVES].to(torch.float32)
            path(stream, seeds, scales, start + at, piece, piece)
            out[at : at + _HALVES] = piece
            del piece  # before the next one is made
    made = base if in_place else out.reshape(base.shape)
    for _ in seeds:  # each of them draws as many numbers
        tag("noise", made)
    return made


def _path(base: Tensor) -> Callable[..., None]:
    device = stands_for() if is_fake(base) else base.device.type
    if device != "cpu" or not has_fused_path():
        return reference
    return pretended if is_fake(base) else fused


def _starts(base: Tensor, chunk: int) -> Iterable[int]:
    """Where the chunks of a tensor start. Of a fake one the first is enough: no other needs more memory."""
    starts = range(0, base.numel(), chunk)
    return starts[:1] if is_fake(base) else starts


def reference(
    stream: Stream, seeds: Sequence[int], scales: Sequence[float], start: int, base: Tensor, out: Tensor
) -> None:
    """`out[:] = base + sum_k scales[k] * z_k` by torch operations, a chunk of 65,536 elements at a time."""
    if is_fake(base):
        seeds, scales = seeds[:2], scales[:2]  # none after the second needs more memory than it
    for at in _starts(base, _CHUNK):
        piece = base[at : at + _CHUNK]
        for seed, scale in zip(seeds, scales, strict=True):
            if is_fake(base):
                z = likeness(stream, start + at, piece.numel(), base.device)
            else:
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
    from gradcost.noise import fused  # numba takes half a second to import: only where it is used

    fused.add(stream, seeds, scales, start, base, out)


def pretended(
    stream: Stream, seeds: Sequence[int], scales: Sequence[float], start: int, base: Tensor, out: Tensor
) -> None:
    """What `fused` is on fake tensors: it makes no tensor, so there is nothing to do."""
