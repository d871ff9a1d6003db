"""Directions that move some of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from gradcost.directions.direction import Directions, Situated
from gradcost.directions.gaussian import Gaussian
from gradcost.directions.masks import Mask
from gradcost.key import Key
from gradcost.objective import Objective
from gradcost.value import value


@value
class Masked(Situated):
    """z = mask * u, with u of `directions`: the weights off the mask are neither perturbed nor updated.

    Law: E[z z'] = diag(mask), the exact gradient of the weights within the mask and zero for the others; with a
    mask drawn anew for each probe (`Random`) the identity. On the mask the numbers are those of u, up to
    `Random`'s factor, and a weight off it stays as it is, bit for bit. The mask is that of the weights as they
    stand, never of perturbed ones, and nothing as large as a leaf is kept of it.

    A gradient whose mask depends on the weights can be replayed until they change in place; afterwards a replay
    raises ValueError (`parameter.data` changes them unseen: do not use it).

    Sources: Liu et al., "Sparse MeZO", arXiv 2402.15751 (2024), algorithm 1; and see the masks.
    """

    mask: Mask
    directions: Directions = Gaussian()

    def __post_init__(self) -> None:
        object.__setattr__(self, "unbiased", self.mask.unbiased and self.directions.unbiased)

    def init(self, objective: Objective) -> None:
        return None

    def settled(self, objective: Objective, key: Key, state: Any) -> Directions:
        return self.mask.over(self.directions, objective, key)

    def learned(self, state: Any, gradient: Iterator[tuple[str, Tensor]]) -> None:
        return None
