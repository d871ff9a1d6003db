"""The path of `add_noise` on a GPU: generate and add in one pass over the weights, compiled by Triton.

The kernels perform the operations of `philox` in the same order, so a GPU gives the bits of a CPU. Products and sums
are not combined into fused multiply-adds, which would round once instead of twice (`enable_fp_fusion`), and the
square root is the correctly rounded one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from gradcost.noise.philox import ANGLE, COS, LN2, LOG, PHILOX_MULTIPLIERS, PHILOX_WEYL, SIN, Signs, Stream

_M0, _M1 = (tl.constexpr(m) for m in PHILOX_MULTIPLIERS)
_W0, _W1 = (tl.constexpr(w) for w in PHILOX_WEYL)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (tl.constexpr(c) for c in LOG)
_S0, _S1, _S2 = (tl.constexpr(c) for c in SIN)
_C0, _C1, _C2 = (tl.constexpr(c) for c in COS)
_LN2_HIGH, _LN2_LOW = (tl.constexpr(c) for c in LN2)
_ANGLE = tl.constexpr(ANGLE)
_WORD_TO_UNIFORM = tl.constexpr(2.0**-32)  # factor from a 32-bit word to a number between 0 and 1
_HALF_SQRT2_BITS = tl.constexpr(0x3F3504F3)  # the float32 sqrt(2) / 2, read as an integer

_PER_PROGRAM = 2048  # elements of one program


@triton.jit
def _philox(block, seed):
    """Return the four words of each block; block: int64 tensor, seed: int64."""
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, _M0), c0 * _M0
        high1, low1 = tl.umulhi(c2, _M1), c2 * _M1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _W0, k1 + _W1
    return c0, c1, c2, c3


@triton.jit
def _in_order(a, b, c, d):
    """Return a[0], b[0], c[0], d[0], a[1], ..."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _term(table, number, seeds, dtype: tl.constexpr):
    """Return the seed and the scale of a term."""
    scale = tl.load(table + seeds + number).to(tl.float64, bitcast=True)
    return tl.load(table + number), scale.to(dtype)


@triton.jit(do_not_specialize=["seeds", "start", "size"])
def _signs(out, base, table, seeds, start, size):
    """Set out[i] = base[i] + sum_k scales[k] * sign_k(start + i). base: None stands for zeros."""
    program = tl.program_id(0).to(tl.int64)
    first_block = start.to(tl.int64) // 128
    block = first_block + program * 16 + tl.arange(0, 16)
    bit = tl.arange(0, 32)[None, :]
    at = (first_block * 128 - start) + program * 2048 + tl.arange(0, 64)[:, None] * 32 + bit
    inside = (at >= 0) & (at < size)
    dtype: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([64, 32], dtype)
    if base is not None:
        total = tl.load(base + at, mask=inside, other=0.0).to(dtype)
    for number in range(seeds):
        seed, scale = _term(table, number, seeds, dtype)
        a, b, c, d = _philox(block, seed)
        word = _in_order(a, b, c, d)[:, None]
        negative = ((word >> bit.to(tl.uint32)) & 1) == 1
        total += tl.where(negative, -scale, scale)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _pair(first, second):
    """Return two normals from two words, by the operations of `philox._box_muller`."""
    uniform = (first.to(tl.float32) + 0.5) * _WORD_TO_UNIFORM
    bits = uniform.to(tl.int32, bitcast=True)
    exponent = (bits - _HALF_SQRT2_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    square = f * f
    polynomial = _L0 * f + _L1
    polynomial = polynomial * f + _L2
    polynomial = polynomial * f + _L3
    polynomial = polynomial * f + _L4
    polynomial = polynomial * f + _L5
    polynomial = polynomial * f + _L6
    polynomial = polynomial * f + _L7
    polynomial = polynomial * f + _L8
    power = exponent.to(tl.float32)
    log = f * (square * polynomial) + power * _LN2_LOW - square * 0.5 + f + power * _LN2_HIGH
    radius = tl.sqrt_rn(log * -2.0)
    quadrant = (second + 536870912) >> 30
    angle = (second - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32) * _ANGLE
    square = angle * angle
    sine = ((_S0 * square + _S1) * square + _S2) * square * angle + angle
    cosine = ((_C0 * square + _C1) * square + _C2) * square * square - square * 0.5 + 1.0
    odd = (quadrant & 1) == 1
    turned_cosine, turned_sine = tl.where(odd, -sine, cosine), tl.where(odd, cosine, sine)
    half_turn = 1.0 - (quadrant & 2).to(tl.float32)
    return radius * (turned_cosine * half_turn), radius * (turned_sine * half_turn)


@triton.jit(do_not_specialize=["seeds", "start", "size"])
def _normals(out, base, table, seeds, start, size):
    """Set out[i] = base[i] + sum_k scales[k] * normal_k(start + i). base: None stands for zeros."""
    program = tl.program_id(0).to(tl.int64)
    first_block = start.to(tl.int64) // 4
    block = first_block + program * 512 + tl.arange(0, 512)
    at = (first_block * 4 - start) + program * 2048 + tl.arange(0, 2048)
    inside = (at >= 0) & (at < size)
    dtype: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([2048], dtype)
    if base is not None:
        total = tl.load(base + at, mask=inside, other=0.0).to(dtype)
    for number in range(seeds):
        seed, scale = _term(table, number, seeds, dtype)
        a, b, c, d = _philox(block, seed)
        z0, z1 = _pair(a, b)
        z2, z3 = _pair(c, d)
        total += scale * _in_order(z0, z1, z2, z3).to(dtype)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def add(
    stream: Stream, seeds: Sequence[int], scales: Sequence[float], start: int, base: Tensor | None, out: Tensor
) -> None:
    """Set `out[:] = base + sum_k scales[k] * z_k`, for contiguous vectors of equal length on a GPU.

    float64 is computed in float64. All other dtypes are computed in float32 and rounded once.

    Args:
        stream: `Signs` or `Normals`.
        seeds: one 64-bit seed per direction.
        scales: one factor per seed.
        start: stream index of the first element.
        base: None stands for zeros.
        out: the result.
    """
    if out.numel() == 0:
        return
    programs = -(-(start % stream.per_block + out.numel()) // _PER_PROGRAM)
    kernel: Any = _signs if isinstance(stream, Signs) else _normals  # Triton adds kernel[grid]
    with torch.cuda.device_of(out):
        kernel[(programs,)](
            out, base, table(seeds, scales, out), len(seeds), start, out.numel(), enable_fp_fusion=False
        )


def table(seeds: Sequence[int], scales: Sequence[float], out: Tensor) -> Tensor:
    """Return seeds and scales as the kernels read them: int64, the scales as the bits of float64 numbers."""
    rounding = torch.float64 if out.dtype == torch.float64 else torch.float32
    factors = torch.tensor(scales, dtype=rounding).to(torch.float64).view(torch.int64)
    signed = [seed - (1 << 64) if seed >> 63 else seed for seed in seeds]
    return torch.cat([torch.tensor(signed, dtype=torch.int64), factors]).to(out.device)
