"""Directions of constant norm."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradcost.core.fake import is_fake
from gradcost.core.key import Key
from gradcost.core.objective import Leaf
from gradcost.core.value import value
from gradcost.directions.direction import Directions, independent
from gradcost.noise import philox
from gradcost.noise.add import add_noise

_CHUNK = 1 << 16  # elements whose squares are summed at once


@value
class Sphere(Directions):
    """z uniform on the sphere of radius sqrt(d): a Gaussian direction divided by its norm, times sqrt(d).

    Law: E[z z'] = I. Cost: the noise of each seed is generated once more, to compute the norm.

    Source: Flaxman, Kalai, McMahan 2005, lemma 1; their factor d is here part of z.
    """

    unbiased, symmetric, elementwise = True, True, True

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return independent(key, probes)

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        root = math.sqrt(leaf.dimension)
        norms = [root if is_fake(base) else _norm(seed, leaf.dimension) for seed in seeds]
        factors = [scale * root / norm for scale, norm in zip(scales, norms, strict=True)]
        return add_noise(philox.Normals(), seeds, factors, leaf.start, base, in_place)


@functools.lru_cache(maxsize=4096)
def _norm(seed: int, dimension: int) -> float:
    """Return |z| of a Gaussian direction. Blocks of fixed length, each summed by one thread, give the same bits."""
    total = 0.0
    for start in range(0, dimension, _CHUNK):
        zero = torch.zeros(min(_CHUNK, dimension - start), dtype=torch.float32, device="cpu")
        z = add_noise(philox.Normals(), [seed], [1.0], start, zero, in_place=True).numpy().astype(np.float64)
        total += float(np.square(z).sum())
    return math.sqrt(total)
