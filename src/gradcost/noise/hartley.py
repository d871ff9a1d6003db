"""Rows of an orthogonal basis as a stream: row k is sign_i cas(2 pi k i / d), i = 0 .. d - 1, with cas = cos + sin.

For one vector of signs the d rows are orthogonal, each of squared length d (the discrete Hartley transform; Bracewell
1983). An element takes k i mod d from whole numbers, so the phase is exact for any d below 2^45; its float32 sine and
cosine are those of `philox`, and so the bits are the same however a tensor is cut, and on either path of `noise`.
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
    """The rows of length `dimension`. A seed names its row: the lowest bits are k, the others give the signs."""

    dimension: int
    per_block = 128
    workspace = 5120

    @property
    def bits(self) -> int:
        """How many of a seed's 64 bits are k's."""
        return max(1, (self.dimension - 1).bit_length())

    def seed(self, tag: int, row: int) -> int:
        """The seed of a row, with the signs of this tag: all rows of one tag are orthogonal to each other."""
        return tag >> self.bits << self.bits | row

    def row(self, seed: int) -> int:
        return (seed & ((1 << self.bits) - 1)) % self.dimension

    def signs(self, seed: int) -> int:
        """The seed of the row's signs."""
        return Key(seed >> self.bits).fold("signs").seed

    def reference(self, seed: int, first_block: int, blocks: int, device: torch.device) -> Tensor:
        count = blocks * self.per_block
        assert self.dimension * count < 1 << 62
        row = self.row(seed)
        # k i mod d: of the first element in Python's whole numbers, of the others by what they are beyond it.
        residue = torch.arange(count, device=device) * row
        residue += row * first_block * self.per_block % self.dimension
        residue %= self.dimension
        quarters = residue.to(torch.float64) / self.dimension * 4.0
        del residue
        quadrant = torch.floor(quarters + 0.5)
        sine, cosine = sine_and_cosine((quarters - quadrant).to(torch.float32) * QUARTER)
        # cas of a quarter turn more: sine -> cosine, cosine -> -sine; of a half turn more: the negative.
        odd = (quadrant == 1.0) | (quadrant == 3.0)
        cas = cosine + torch.where(odd, -sine, sine)
        cas = torch.where((quadrant == 2.0) | (quadrant == 3.0), -cas, cas)
        del quarters, quadrant, sine, cosine, odd
        return cas * Signs().reference(self.signs(seed), first_block, blocks, device)
