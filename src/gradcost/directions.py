"""Where to look: random directions z with E[z z'] = I, so that E[(grad . z) z] is the gradient.

A direction is a seed. Its one primitive is to be added, scaled, to a leaf: `add` never makes more of it than
the leaf that it is given, and makes the same numbers whenever and wherever it is asked.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from hashlib import blake2b
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from gradcost import noise, philox
from gradcost.fake import is_fake
from gradcost.key import Key
from gradcost.objective import Leaf
from gradcost.value import value
from gradcost.watch import tell


class Directions(ABC):
    """A distribution of directions in the space of an objective's leaves."""

    unbiased: ClassVar[bool]  # whether E[z z'] = I over the draw of a seed

    @abstractmethod
    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        """One unsigned 64-bit seed for each of the estimate's directions."""

    @abstractmethod
    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        """base + sum_k scales[k] * z_k on one leaf: a new tensor of base's shape and dtype, or base itself."""


def combination(directions: Directions, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float]) -> Tensor:
    """sum_k scales[k] * z_k on one leaf: a tensor of its shape, dtype and device."""
    zero = torch.zeros_like(leaf.parameter, requires_grad=False, memory_format=torch.contiguous_format)
    return directions.add(zero, leaf, seeds, scales, in_place=True)


def independent(key: Key, probes: int) -> tuple[int, ...]:
    """One unrelated seed a probe."""
    return tuple(key.fold("probe", number).seed for number in range(probes))


@value
class Gaussian(Directions):
    """z ~ N(0, I). Baydin et al. 2022, definition 1; Malladi et al. 2023 (MeZO), definition 1."""

    unbiased = True

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return independent(key, probes)

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        return noise.add(philox.Normals(), seeds, scales, leaf.start, base, in_place)


@value
class Rademacher(Directions):
    """z in {-1, +1}^d, each sign with probability one half: the least variance of all independent entries.

    Spall 1992, section III (SPSA's symmetric Bernoulli perturbation).
    """

    unbiased = True

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return independent(key, probes)

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        return noise.add(philox.Signs(), seeds, scales, leaf.start, base, in_place)


@value
class Sphere(Directions):
    """z uniform on the sphere of radius sqrt(d): a Gaussian direction divided by its norm, times sqrt(d).

    Flaxman, Kalai, McMahan 2005, lemma 1: their factor d is here in z, so that E[z z'] = I. The norm takes
    one more pass over the noise, once a seed.
    """

    unbiased = True

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return independent(key, probes)

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        root = math.sqrt(leaf.dimension)
        norms = [root if is_fake(base) else _norm(seed, leaf.dimension) for seed in seeds]
        lengths = [scale * root / norm for scale, norm in zip(scales, norms, strict=True)]
        return noise.add(philox.Normals(), seeds, lengths, leaf.start, base, in_place)


@functools.lru_cache(maxsize=4096)
def _norm(seed: int, dimension: int, chunk: int = 1 << 16) -> float:
    """|z| of a Gaussian direction: blocks of fixed length, each summed by one thread, so that bits repeat."""
    total = 0.0
    for start in range(0, dimension, chunk):
        zero = torch.zeros(min(chunk, dimension - start))
        z = noise.add(philox.Normals(), [seed], [1.0], start, zero, in_place=True).numpy().astype(np.float64)
        total += float(np.square(z).sum())
    return math.sqrt(total)


@value
class Coordinates(Directions):
    """z = sqrt(d) e_i, the i of one estimate dealt without replacement: n = d probes give the exact gradient.

    Kiefer and Wolfowitz 1952 (all of them); random coordinates: Nesterov 2012. A seed is the coordinate.
    """

    unbiased = True

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return tuple(_dealt(key.fold("deal", k // dimension), k % dimension, dimension) for k in range(probes))

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        out = base if in_place else base.detach().clone(memory_format=torch.contiguous_format)
        flat, root = out.view(-1), math.sqrt(leaf.dimension)
        for seed, scale in zip(seeds, scales, strict=True):
            if leaf.start <= seed < leaf.start + flat.numel():
                flat[seed - leaf.start] += scale * root
        return tell("noise", out)


def _dealt(key: Key, position: int, size: int) -> int:
    """Where a random permutation of `size` cards puts `position`: a four-round Feistel network with cycle
    walking (Black and Rogaway 2002), so that no table of `size` numbers is ever made."""
    half = max(1, math.ceil((size - 1).bit_length() / 2))
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for turn in range(4):
            message = f"{key.seed}/{turn}/{right}".encode()
            drawn = int.from_bytes(blake2b(message, digest_size=8).digest(), "little") & mask
            left, right = right, left ^ drawn
        position = left << half | right
        if position < size:
            # Cycle walking favours some cards (by 6% at size 8): a random cut of the deck makes each card alike.
            return (position + key.fold("cut").seed) % size
