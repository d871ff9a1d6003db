"""Add noise to weights: base + sum_k scales[k] * z_k, by the fastest available path.

  - `reference`: torch operations, on any device.
  - `fused`: one compiled pass over the weights on a CPU (numba).
  - `on_gpu`: one compiled pass over the weights on a GPU (Triton), for signs and normals.

All give the same bits. `philox` and `hartley` define the streams.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from gradcost.core.complex_numbers import as_real
from gradcost.core.fake import is_fake, stands_for
from gradcost.core.memory_events import tag
from gradcost.core.note import Note
from gradcost.noise.philox import Normals, Stream, fake_noise, generate

_CHUNK = 1 << 16  # elements per step of the reference path: bounds its temporary tensors
_HALF_CHUNK = 1 << 20  # elements of a half-precision tensor converted to float32 at once


def add_noise(
    stream: Stream,
    seeds: Sequence[int],
    scales: Sequence[float],
    start: int,
    base: Tensor,
    in_place: bool = False,
) -> Tensor:
    """Return base + sum_k scales[k] * z_k. z_k: elements start .. start + base.numel() - 1 of the stream of seeds[k].

    Law: calls on consecutive pieces of a tensor give the same bits as one call on the tensor. The terms are added in
    the order of the seeds. float32 and float64 are computed in their own precision. bfloat16 and float16 are computed
    in float32 and rounded once at the end. A complex element is two elements: its real and its imaginary part.

    Args:
        stream: the distribution of the noise.
        seeds: one 64-bit seed per direction.
        scales: one factor per seed.
        start: stream index of the first element of `base`.
        base: a tensor of any shape and floating or complex type; its elements are numbered in row-major order.
        in_place: True changes `base`, which must be contiguous, instead of allocating a tensor.
    Returns:
        A tensor of the shape, dtype and device of `base`, or `base` itself.
    """
    if base.is_complex():
        moved = add_noise(stream, seeds, scales, start, as_real(base.detach()), in_place)
        return base if in_place else torch.view_as_complex(moved)
    source = base.detach().reshape(-1)
    assert base.is_contiguous() or not in_place
    out = source if in_place else torch.empty_like(source, memory_format=torch.contiguous_format)
    _fill(stream, seeds, scales, start, source, out)
    return _tagged(base if in_place else out.reshape(base.shape), seeds)


def noise(
    stream: Stream,
    seeds: Sequence[int],
    scales: Sequence[float],
    start: int,
    like: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Return sum_k scales[k] * z_k: the bits of `add_noise` on zeros, without a pass that writes the zeros.

    Args:
        stream: the distribution of the noise.
        seeds: one 64-bit seed per direction.
        scales: one factor per seed.
        start: stream index of the first element.
        like: a tensor with the shape, dtype and device of the result.
        out: a contiguous tensor for the result, whose content is ignored; None allocates one.
    """
    if out is None:
        out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    real = as_real(out) if out.is_complex() else out
    _fill(stream, seeds, scales, start, None, real.view(-1))
    return _tagged(out, seeds)


def _fill(
    stream: Stream, seeds: Sequence[int], scales: Sequence[float], start: int, base: Tensor | None, out: Tensor
) -> None:
    """Set `out[:] = base + sum_k scales[k] * z_k`. base: None stands for zeros."""
    path = _path(stream, out)
    if out.dtype in (torch.float32, torch.float64) or path in (on_gpu, _fake_on_gpu):
        path(stream, seeds, scales, start, base, out)
        return
    for at in _starts(out, _HALF_CHUNK):
        if base is None:
            piece = out[at : at + _HALF_CHUNK].new_zeros(out[at : at + _HALF_CHUNK].shape, dtype=torch.float32)
        else:
            piece = base[at : at + _HALF_CHUNK].to(torch.float32)
        path(stream, seeds, scales, start + at, piece, piece)
        out[at : at + _HALF_CHUNK] = piece
        del piece  # frees its memory before the next piece is allocated


def _tagged(result: Tensor, seeds: Sequence[int]) -> Tensor:
    for _ in seeds:  # one tag per direction
        tag("noise", result)
    return result


def _path(stream: Stream, out: Tensor) -> Callable[..., None]:
    fake = is_fake(out)
    device = stands_for() if fake else out.device.type
    if device == "cpu" and has_fused_path():
        return _fake_fused if fake else fused
    simulated = fake and not torch.cuda.is_available()  # of a GPU elsewhere, which is assumed to have Triton
    if device == "cuda" and stream.has_gpu_kernel and (simulated or has_gpu_path()):
        return _fake_on_gpu if fake else on_gpu
    return reference


def _starts(base: Tensor, chunk: int) -> Iterable[int]:
    """Return the start of each chunk; for a fake tensor only the first, because all chunks need the same memory."""
    starts = range(0, base.numel(), chunk)
    return starts[:1] if is_fake(base) else starts


def reference(
    stream: Stream, seeds: Sequence[int], scales: Sequence[float], start: int, base: Tensor | None, out: Tensor
) -> None:
    """Set `out[:] = base + sum_k scales[k] * z_k` by torch operations, 65,536 elements at a time."""
    if is_fake(out):
        seeds, scales = seeds[:2], scales[:2]  # more seeds do not raise the peak memory
    if base is None:
        base = out.zero_()
    for at in _starts(out, _CHUNK):
        piece = base[at : at + _CHUNK]
        for seed, scale in zip(seeds, scales, strict=True):
            if is_fake(out):
                z = fake_noise(stream, start + at, piece.numel(), out.device)
            else:
                z = generate(stream, seed, start + at, piece.numel(), out.device)
            piece = piece + z.to(out.dtype) * torch.tensor(scale, dtype=out.dtype, device=out.device)
        out[at : at + _CHUNK] = piece


@functools.cache
def has_fused_path() -> bool:
    """Return whether numba is installed."""
    return importlib.util.find_spec("numba") is not None


def fused(
    stream: Stream, seeds: Sequence[int], scales: Sequence[float], start: int, base: Tensor | None, out: Tensor
) -> None:
    """Set `out[:] = base + sum_k scales[k] * z_k` in one compiled pass, with as many threads as torch uses."""
    _compiled()(stream, seeds, scales, start, base, out)


@functools.cache
def _compiled() -> Callable[..., None]:
    from gradcost.noise import fused  # importing numba takes half a second

    return fused.add


def _fake_fused(
    stream: Stream, seeds: Sequence[int], scales: Sequence[float], start: int, base: Tensor | None, out: Tensor
) -> None:
    """Replace `fused` on fake tensors. It does nothing, because `fused` allocates no tensor."""


@functools.cache
def has_gpu_path() -> bool:
    """Return whether Triton works on this machine's GPU. It is tried once; a `Note` has the reason if it does not.

    It needs a C compiler, the headers of Python, a folder for its cache and a GPU of compute capability 7.0 or above.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        with no_dispatch():  # the first call may be on a fake tensor
            on_gpu(Normals(), [0], [1.0], 0, None, torch.empty(1, device="cuda"))
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        warnings.warn(f"Triton does not work, so noise on the GPU is many times slower: {reason}", Note, stacklevel=2)
        return False
    return True


def on_gpu(
    stream: Stream, seeds: Sequence[int], scales: Sequence[float], start: int, base: Tensor | None, out: Tensor
) -> None:
    """Set `out[:] = base + sum_k scales[k] * z_k` in one compiled pass on a GPU. `out` may have any float dtype."""
    from gradcost.noise import gpu  # importing Triton takes a second

    gpu.add(stream, seeds, scales, start, base, out)


def _fake_on_gpu(
    stream: Stream, seeds: Sequence[int], scales: Sequence[float], start: int, base: Tensor | None, out: Tensor
) -> None:
    """Replace `on_gpu` on fake tensors: allocate the table of its seeds and scales."""
    torch.empty(2 * len(seeds), dtype=torch.int64, device=out.device)
