"""Directions that change a single weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradcost.core.complex_numbers import as_real
from gradcost.core.key import Key
from gradcost.core.memory_events import tag
from gradcost.core.objective import Leaf
from gradcost.core.value import value
from gradcost.directions.direction import Directions
from gradcost.noise.permutation import sample_without_replacement


@value
class Coordinates(Directions):
    """z = sqrt(d) e_i: one weight i per probe, sampled without replacement within an estimate. The seed of z is i.

    Law: E[z z'] = I. d probes give the exact gradient.

    Source: Kiefer and Wolfowitz 1952 (all coordinates); Nesterov 2012 (random coordinates).
    """

    unbiased, symmetric, elementwise = True, True, True

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return sample_without_replacement(key, probes, dimension)

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        out = base if in_place else base.detach().clone(memory_format=torch.contiguous_format)
        flat, root = as_real(out).view(-1), math.sqrt(leaf.dimension)
        for seed, scale in zip(seeds, scales, strict=True):
            if leaf.start <= seed < leaf.start + flat.numel():
                flat[seed - leaf.start] += scale * root
        return tag("noise", out)
