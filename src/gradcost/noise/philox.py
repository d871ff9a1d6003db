"""Counter-based noise: the numbers of a stream are functions of (seed, element index) alone.

The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

  - Key: the 64-bit seed.
  - Block b of a stream: the output at the counter (b mod 2^32, b div 2^32, 0, 0).
  - Rademacher stream: 128 signs per block; element i is bit i mod 32 of word (i div 32) mod 4.
  - Gaussian stream: four normals per block (Box and Muller 1958), two from words 0 and 1, two from words 2 and 3.

An element does not depend on the thread, the device, or how a stream is divided into chunks.

Both streams give the same bits on every device, here and in the kernels of `fused` and `gpu`, for two reasons:

  - They use only integer operations and float32 additions, multiplications and square roots, each rounded once.
  - The logarithm, sine and cosine are polynomials (Cephes, Moshier 1992).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from gradcost.core.value import value

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the key after each round
PHILOX_ROUNDS = 10

# Cephes logf, sinf and cosf: coefficients from the highest power down.
LOG = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1)
LOG += (-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)
LN2 = (0.693359375, -2.12194440e-4)  # high and low part: their sum is ln 2
SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
ANGLE = 6.283185307179586 / 2**32  # radians per unit of a 32-bit word: 2^32 is a full turn

_MASK = 0xFFFFFFFF  # the low 32 bits
_HALF_SQRT2_BITS = 0x3F3504F3  # the float32 sqrt(2) / 2, read as an integer


class Stream(ABC):
    """A distribution of float32 numbers with mean 0 and variance 1, addressed by (seed, index)."""

    per_block: int  # elements per block
    workspace: int  # peak bytes that `reference` allocates per block, its result included
    has_gpu_kernel: bool = False  # whether `gpu.add` knows the stream

    @abstractmethod
    def reference(self, seed: int, first_block: int, blocks: int, device: torch.device) -> Tensor:
        """Return consecutive blocks of the stream, computed by torch operations.

        Args:
            seed: an unsigned 64-bit integer.
            first_block: number of the first block.
            blocks: how many blocks.
            device: where to compute.
        Returns:
            float32, shape (blocks * per_block,).
        """


@value
class Signs(Stream):
    """+1 or -1, each with probability 1/2: 128 per Philox block."""

    per_block = 128
    workspace = 3104
    has_gpu_kernel = True

    def reference(self, seed: int, first_block: int, blocks: int, device: torch.device) -> Tensor:
        words = torch.stack(philox(seed, first_block, blocks, device), dim=1)
        bits = (words.unsqueeze(-1) >> torch.arange(32, device=device)) & 1
        return (1 - 2 * bits).to(torch.float32).reshape(-1)


@value
class Normals(Stream):
    """Standard normal numbers: four per Philox block, at most 6.77 in absolute value."""

    per_block = 4
    workspace = 112
    has_gpu_kernel = True

    def reference(self, seed: int, first_block: int, blocks: int, device: torch.device) -> Tensor:
        words = philox(seed, first_block, blocks, device)
        pairs = [*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])]
        return torch.stack(pairs, dim=1).reshape(-1)


def philox(seed: int, first_block: int, blocks: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """Return the four 32-bit words of consecutive blocks, as int64 tensors of length `blocks`."""
    return philox_at(torch.arange(first_block, first_block + blocks, device=device, dtype=torch.int64), seed)


def philox_at(counter: Tensor, seed: int) -> list[Tensor]:
    """Return the four 32-bit words of each block; `counter`: the numbers of the blocks, int64."""
    zero = torch.zeros_like(counter)
    return philox_rounds([counter & _MASK, counter >> 32, zero, zero], (seed & _MASK, seed >> 32))


def philox_rounds(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Apply Philox4x32-10 to a counter and a key; each word is an int64 tensor or an integer below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # int64 products wrap modulo 2^64. A right shift copies the sign bit; the mask removes the copies.
        p0, p1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + PHILOX_WEYL[0]) & _MASK, (k1 + PHILOX_WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def _horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    total = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + coefficient
    return total


def sine_and_cosine(angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return sine and cosine of float32 angles up to an eighth of a turn, with the same bits on every device."""
    square = angle * angle
    sine = _horner(square, SIN) * square * angle + angle
    cosine = _horner(square, COS) * square * square - square * 0.5 + 1.0
    return sine, cosine


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return two independent normals from two uniform 32-bit words."""
    uniform = (first.to(torch.float32) + 0.5) * 2.0**-32
    bits = uniform.view(torch.int32)
    # uniform = mantissa * 2^exponent, mantissa in [sqrt(2)/2, sqrt(2))
    exponent = ((bits - _HALF_SQRT2_BITS) >> 23).to(torch.float32)
    mantissa = (bits - (((bits - _HALF_SQRT2_BITS) >> 23) << 23)).view(torch.float32)
    f = mantissa - 1.0
    square = f * f
    # log(uniform) = log(1 + f) + exponent * ln 2, in the order of additions of Cephes logf
    log = f * (square * _horner(f, LOG)) + exponent * LN2[1] - square * 0.5 + f + exponent * LN2[0]
    # torch's float32 square root may be one ulp off (vendor libraries). Computed in float64, it rounds correctly.
    radius = torch.sqrt((log * -2.0).to(torch.float64)).to(torch.float32)

    # second = quadrant * 2^30 + offset, offset in [-2^29, 2^29). The last eighth of a turn belongs to quadrant 0.
    quadrant = ((second + (1 << 29)) & _MASK) >> 30
    offset = second - (quadrant << 30)
    offset = torch.where(offset > (1 << 29), offset - (1 << 32), offset)
    sine, cosine = sine_and_cosine(offset.to(torch.float32) * ANGLE)
    odd = (quadrant & 1) == 1
    cosine, sine = torch.where(odd, -sine, cosine), torch.where(odd, cosine, sine)
    half_turn = 1.0 - (quadrant & 2).to(torch.float32)
    return radius * (cosine * half_turn), radius * (sine * half_turn)


def generate(stream: Stream, seed: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Return elements start to start + count - 1 of a stream by torch operations: float32, shape (count,)."""
    device = torch.device(device)
    if count <= 0:
        return torch.empty(0, device=device, dtype=torch.float32)
    first = start // stream.per_block
    last = (start + count - 1) // stream.per_block
    numbers = stream.reference(seed, first, last - first + 1, device)
    offset = start - first * stream.per_block
    return numbers[offset : offset + count]


def fake_noise(stream: Stream, start: int, count: int, device: torch.device) -> Tensor:
    """Stand in for `generate` on fake tensors: allocate its peak memory, then return a tensor of its shape."""
    first, last = start // stream.per_block, (start + count - 1) // stream.per_block
    blocks = last - first + 1
    torch.empty(blocks * stream.workspace, dtype=torch.uint8, device=device)
    offset = start - first * stream.per_block
    return torch.empty(blocks * stream.per_block, device=device, dtype=torch.float32)[offset : offset + count]
