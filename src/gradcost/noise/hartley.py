"""Stream of orthogonal rows: element i of row k is sign_i cas(2 pi k i / d), i = 0 .. d - 1, with cas = cos + sin.

The d rows with the same signs are orthogonal, each of squared norm d (discrete Hartley transform; Bracewell 1983).
k i mod d is computed in integers, so the phase is exact for any d below 2^45. Sine and cosine are the float32
functions of `philox`. Therefore the bits are the same for any chunk size, in `add.reference` and in `add.fused`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradcost.core.key import Key
from gradcost.core.value import value
from gradcost.noise.philox import Signs, Stream, sine_and_cosine

QUARTER = math.pi / 2


@value
class Hartley(Stream):
    """Rows of length `dimension`. The lowest bits of a seed are the row k; the other bits determine the signs.

    Args:
        dimension: d, the length of a row; below 2^45.
    """

    dimension: int
    per_block = 128
    workspace = 5120

    @property
    def bits(self) -> int:
        """The number of low bits of a seed that store the row k."""
        return max(1, (self.dimension - 1).bit_length())

    def seed(self, tag: int, row: int) -> int:
        """Return the seed of a row. The high bits of `tag` determine the signs. Rows of one tag are orthogonal."""
        return tag >> self.bits << self.bits | row

    def row(self, seed: int) -> int:
        return (seed & ((1 << self.bits) - 1)) % self.dimension

    def signs(self, seed: int) -> int:
        """Return the seed of the sign stream that multiplies the row."""
        return Key(seed >> self.bits).fold("signs").seed

    def reference(self, seed: int, first_block: int, blocks: int, device: torch.device) -> Tensor:
        count = blocks * self.per_block
        assert self.dimension * count < 1 << 62
        row = self.row(seed)
        # residue = k i mod d. The first one is computed in Python integers, which cannot overflow.
        residue = torch.arange(count, device=device) * row
        residue += row * first_block * self.per_block % self.dimension
        residue %= self.dimension
        quarters = residue.to(torch.float64) / self.dimension * 4.0
        del residue
        quadrant = torch.floor(quarters + 0.5)
        sine, cosine = sine_and_cosine((quarters - quadrant).to(torch.float32) * QUARTER)
        # A quarter turn changes cas = cos + sin to cos - sin; a half turn changes its sign.
        odd = (quadrant == 1.0) | (quadrant == 3.0)
        cas = cosine + torch.where(odd, -sine, sine)
        cas = torch.where((quadrant == 2.0) | (quadrant == 3.0), -cas, cas)
        del quarters, quadrant, sine, cosine, odd
        return cas * Signs().reference(self.signs(seed), first_block, blocks, device)
