"""The fused path of `add_noise`: generate and add in one pass over the weights, compiled by numba.

The kernels perform the operations of `philox` and `hartley` in the same order, so both paths give the same bits.
Numba does not combine a product and a sum into a fused multiply-add, which would round once instead of twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from gradcost.noise.hartley import QUARTER, Hartley
from gradcost.noise.parallel import run_in_parallel
from gradcost.noise.philox import ANGLE, COS, LN2, LOG, PHILOX_MULTIPLIERS, PHILOX_WEYL, SIN, Signs, Stream

_M0, _M1 = (np.uint64(m) for m in PHILOX_MULTIPLIERS)
_W0, _W1 = (np.uint32(w) for w in PHILOX_WEYL)
_LOG = tuple(np.float32(c) for c in LOG)
_SIN = tuple(np.float32(c) for c in SIN)
_COS = tuple(np.float32(c) for c in COS)
_LN2_HIGH, _LN2_LOW = (np.float32(c) for c in LN2)
_ANGLE, _QUARTER = np.float32(ANGLE), np.float32(QUARTER)
_HALF, _ONE, _TWO = np.float32(0.5), np.float32(1.0), np.float32(2.0)
_WORD_TO_UNIFORM = np.float32(2.0**-32)  # factor from a 32-bit word to a number between 0 and 1
_32 = np.uint64(32)
_HALF_SQRT2_BITS = np.int32(0x3F3504F3)  # the float32 sqrt(2) / 2, read as an integer

_LANES = 64  # Philox blocks computed together, so that the compiler vectorises over them
_MIN_PARALLEL = 1 << 17  # for fewer elements times seeds, one thread is faster than the pool


@numba.njit(inline="always")
def _philox(block, seed):
    c0, c1 = np.uint32(block), np.uint32(block >> _32)
    c2, c3 = np.uint32(0), np.uint32(0)
    k0, k1 = np.uint32(seed), np.uint32(seed >> _32)
    for _ in range(10):
        p0 = np.uint64(c0) * _M0
        p1 = np.uint64(c2) * _M1
        c0, c1, c2, c3 = (
            np.uint32(np.uint32(p1 >> _32) ^ c1 ^ k0),
            np.uint32(p1),
            np.uint32(np.uint32(p0 >> _32) ^ c3 ^ k1),
            np.uint32(p0),
        )
        k0 = np.uint32(k0 + _W0)
        k1 = np.uint32(k1 + _W1)
    return c0, c1, c2, c3


_SET, _FROM_BASE, _ADD = 0, 1, 2  # what a kernel does with the term of one seed
_ZERO = np.float32(0.0)


@numba.njit(inline="always")
def _case(k, base, out):
    """Return the case of seed k. Separate loops: a compiler vectorises over one array, or over two that differ."""
    if k == 0 and base.size == 0:
        return _SET
    return _FROM_BASE if k == 0 and base.ctypes.data != out.ctypes.data else _ADD


@numba.njit(nogil=True, cache=True)
def _signs(seeds, scales, start, base, out):
    """Set out[i] = base[i] + sum_k scales[k] * sign_k(start + i), with sign_k the signs of seeds[k].

    An empty base stands for zeros.
    """
    size = out.size
    words = np.empty((_LANES, 4), np.uint32)
    flat_words = words.reshape(-1)
    for chunk in range(start // 128, (start + size + 127) // 128, _LANES):
        for k in range(seeds.size):
            for lane in range(_LANES):
                c0, c1, c2, c3 = _philox(np.uint64(chunk + lane), seeds[k])
                words[lane, 0], words[lane, 1], words[lane, 2], words[lane, 3] = c0, c1, c2, c3
            case = _case(k, base, out)
            plus, minus = scales[k], -scales[k]
            for w in range(4 * _LANES):
                word = flat_words[w]
                at = chunk * 128 - start + 32 * w
                if at >= 0 and at + 32 <= size:
                    after = out[at : at + 32]  # of fixed length: the compiler vectorises over its elements
                    if case == _SET:
                        for j in range(32):
                            after[j] = minus if (word >> np.uint32(j)) & np.uint32(1) else plus
                    elif case == _FROM_BASE:
                        before = base[at : at + 32]
                        for j in range(32):
                            after[j] = before[j] + (minus if (word >> np.uint32(j)) & np.uint32(1) else plus)
                    else:
                        for j in range(32):
                            after[j] += minus if (word >> np.uint32(j)) & np.uint32(1) else plus
                elif at + 32 > 0 and at < size:
                    for j in range(max(0, -at), min(32, size - at)):
                        sign = minus if (word >> np.uint32(j)) & np.uint32(1) else plus
                        before_j = 0.0 if case == _SET else base[at + j] if case == _FROM_BASE else out[at + j]
                        out[at + j] = before_j + sign


@numba.njit(inline="always")
def _sine_and_cosine(angle):
    square = angle * angle
    sine = ((_SIN[0] * square + _SIN[1]) * square + _SIN[2]) * square * angle + angle
    cosine = ((_COS[0] * square + _COS[1]) * square + _COS[2]) * square * square - square * _HALF + _ONE
    return sine, cosine


@numba.njit(inline="always")
def _exponent(bits):
    """Return the exponent of a float32 whose mantissa is between sqrt(2) / 2 and sqrt(2), from its bits."""
    return np.int32(np.int32(bits - _HALF_SQRT2_BITS) >> np.int32(23))


@numba.njit(inline="always")
def _pair(bits, offset, quadrant, mantissa):
    """Return two normals by Box-Muller, from the bits and mantissa of a uniform number and an angle in two parts."""
    exponent = np.float32(_exponent(bits))
    f = mantissa - _ONE
    square = f * f
    polynomial = _LOG[0]
    for i in range(1, 9):
        polynomial = polynomial * f + _LOG[i]
    log = f * (square * polynomial) + exponent * _LN2_LOW - square * _HALF + f + exponent * _LN2_HIGH
    radius = np.sqrt(log * -_TWO)
    sine, cosine = _sine_and_cosine(np.float32(offset) * _ANGLE)
    odd = (quadrant & np.int32(1)) == np.int32(1)
    c = -sine if odd else cosine
    s = cosine if odd else sine
    half_turn = _ONE - np.float32(np.int32(quadrant & np.int32(2)))
    return radius * (c * half_turn), radius * (s * half_turn)


@numba.njit(nogil=True, cache=True)
def _normals(seeds, scales, start, base, out):
    """Set out[i] = base[i] + sum_k scales[k] * normal_k(start + i), with normal_k the normals of seeds[k].

    An empty base stands for zeros. Casts keep all integers at 32 bits (numba widens them to 64), so that a vector
    holds twice as many.
    """
    size = out.size
    words = np.empty((4, _LANES), np.uint32)
    uniform = np.empty((2, _LANES), np.float32)
    mantissa = np.empty((2, _LANES), np.float32)
    bits, mantissa_bits = uniform.view(np.int32), mantissa.view(np.int32)
    z = np.empty((4, _LANES), np.float32)
    flat = np.empty(4 * _LANES, np.float32)
    for chunk in range(start // 4, (start + size + 3) // 4, _LANES):
        for k in range(seeds.size):
            for lane in range(_LANES):
                c0, c1, c2, c3 = _philox(np.uint64(chunk + lane), seeds[k])
                words[0, lane], words[1, lane], words[2, lane], words[3, lane] = c0, c1, c2, c3
            for pair in range(2):
                for lane in range(_LANES):
                    uniform[pair, lane] = (np.float32(words[2 * pair, lane]) + _HALF) * _WORD_TO_UNIFORM
                for lane in range(_LANES):
                    b = bits[pair, lane]
                    mantissa_bits[pair, lane] = np.int32(b - np.int32(_exponent(b) << np.int32(23)))
                for lane in range(_LANES):
                    second = words[2 * pair + 1, lane]
                    quadrant = np.uint32(np.uint32(second + np.uint32(1 << 29)) >> np.uint32(30))
                    offset = np.int32(np.uint32(second - np.uint32(quadrant << np.uint32(30))))
                    a, b = _pair(bits[pair, lane], offset, np.int32(quadrant), mantissa[pair, lane])
                    z[2 * pair, lane], z[2 * pair + 1, lane] = a, b
            for lane in range(_LANES):
                for j in range(4):
                    flat[4 * lane + j] = z[j, lane]
            case, scale = _case(k, base, out), scales[k]
            first = chunk * 4 - start
            if first >= 0 and first + 4 * _LANES <= size:
                after = out[first : first + 4 * _LANES]
                if case == _SET:
                    for i in range(4 * _LANES):
                        after[i] = scale * flat[i] + _ZERO
                elif case == _FROM_BASE:
                    before = base[first : first + 4 * _LANES]
                    for i in range(4 * _LANES):
                        after[i] = before[i] + scale * flat[i]
                else:
                    for i in range(4 * _LANES):
                        after[i] += scale * flat[i]
            else:
                for i in range(max(0, -first), min(4 * _LANES, size - first)):
                    before_i = _ZERO if case == _SET else base[first + i] if case == _FROM_BASE else out[first + i]
                    out[first + i] = before_i + scale * flat[i]


@numba.njit(nogil=True, cache=True)
def _rows(signs, rows_and_residues, dimension, scales, start, base, out):
    """Set out[i] = base[i] + sum_k scales[k] * sign_k(start + i) * cas(2 pi (rows[k] * (start + i) mod d) / d).

    rows_and_residues: two arrays, `rows` and `first_residues`. first_residues[k] is rows[k] * j mod d, with j the
    first index of the 128-element block that contains `start`. The kernel stores residues as float64 (exact integers
    below 2^53), so that the compiler vectorises over them.
    """
    rows, first_residues = rows_and_residues[0], rows_and_residues[1]
    end = start + out.size
    residues = np.empty((rows.size, 128), np.float64)
    z = np.empty(128, np.float32)
    modulus = np.float64(dimension)
    for i in range(out.size):
        out[i] = base[i] if base.size else _ZERO
    for k in range(rows.size):
        for lane in range(128):
            residues[k, lane] = np.float64((first_residues[k] + lane * rows[k]) % dimension)
    for block in range(start // 128, (end + 127) // 128):
        first = block * 128 - start
        low, high = max(0, -first), min(128, out.size - first)
        for k in range(rows.size):
            residue, step = residues[k], np.float64(128 * rows[k] % dimension)
            words = _philox(np.uint64(block), signs[k])
            for lane in range(128):
                quarters = residue[lane] / modulus * 4.0
                quadrant = np.floor(quarters + 0.5)
                sine, cosine = _sine_and_cosine(np.float32(quarters - quadrant) * _QUARTER)
                odd = (quadrant == 1.0) | (quadrant == 3.0)
                cas = cosine + (-sine if odd else sine)
                z[lane] = -cas if (quadrant == 2.0) | (quadrant == 3.0) else cas
                advanced = residue[lane] + step
                residue[lane] = advanced - modulus if advanced >= modulus else advanced
            for w in range(4):
                word, piece = words[w], z[32 * w : 32 * w + 32]
                for j in range(32):
                    piece[j] = -piece[j] if (word >> np.uint32(j)) & np.uint32(1) else piece[j]
            scale = scales[k]
            for lane in range(low, high):
                out[first + lane] += scale * z[lane]


def _kernel(stream: Stream, seeds: Sequence[int]) -> Callable[..., None]:
    """Return the compiled kernel of the stream and seeds, to be called as kernel(scales, start, base, out)."""
    if isinstance(stream, Hartley):
        rows = [stream.row(seed) for seed in seeds]
        signs = np.array([stream.signs(seed) for seed in seeds], dtype=np.uint64)

        def kernel(scales: np.ndarray, start: int, base: np.ndarray, out: np.ndarray) -> None:
            first_residues = [row * (start // 128 * 128) % stream.dimension for row in rows]
            rows_and_residues = np.array([rows, first_residues], dtype=np.int64)
            _rows(signs, rows_and_residues, stream.dimension, scales, start, base, out)

        return kernel
    return functools.partial(_signs if isinstance(stream, Signs) else _normals, np.array(seeds, dtype=np.uint64))


def add(
    stream: Stream, seeds: Sequence[int], scales: Sequence[float], start: int, base: Tensor | None, out: Tensor
) -> None:
    """Set `out[:] = base + sum_k scales[k] * z_k`, for contiguous CPU vectors of equal length, float32 or float64.

    base: None stands for zeros.
    """
    if not seeds:
        out.zero_() if base is None else out.copy_(base)
        return
    target = out.numpy()
    source = target[:0] if base is None else base.numpy()
    kernel, factors = _kernel(stream, seeds), np.array(scales, dtype=target.dtype)
    threads = torch.get_num_threads()
    if out.numel() * len(seeds) < _MIN_PARALLEL or threads == 1:
        kernel(factors, start, source, target)
        return
    size = -(-out.numel() // threads)
    cuts = [slice(at, at + size) for at in range(0, out.numel(), size)]
    run_in_parallel([functools.partial(kernel, factors, start + c.start, source[c], target[c]) for c in cuts])
