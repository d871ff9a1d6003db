"""How the slopes of several directions become one gradient."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from gradcost.core.fake import is_fake
from gradcost.core.objective import Leaf, Objective
from gradcost.core.value import value
from gradcost.directions import Directions
from gradcost.directions.direction import combination
from gradcost.estimators.gradient import Gradient, Seeded, Signed

_PIECE = 1 << 16  # weights whose directions are in float64 at once


class Combine(ABC):
    """Turns the slopes along several directions into a gradient."""

    unbiased: bool  # whether the gradient is unbiased when the directions are

    @abstractmethod
    def gradient(
        self, objective: Objective, directions: Directions, seeds: Sequence[int], slopes: Sequence[float]
    ) -> Gradient:
        """The gradient that one slope a seed makes."""


@value
class Mean(Combine):
    """g = (1/n) sum_k s_k z_k. Unbiased: E g = E[z z'] grad = grad. (Spall 1992; Baydin et al. 2022.)"""

    unbiased = True

    def gradient(
        self, objective: Objective, directions: Directions, seeds: Sequence[int], slopes: Sequence[float]
    ) -> Seeded:
        return Seeded(objective, directions, tuple(seeds), tuple(slope / len(slopes) for slope in slopes))


@value
class Projection(Combine):
    """g = (d/r) Z (Z'Z)^+ s: the gradient's projection on the span of the directions, of r dimensions, times d/r.

    The projection itself, least squares on the slopes, is the nearest that the span comes to the gradient; its
    expectation is r/d of the gradient, which the factor makes good. Law: E|g|^2 = (d/n)|grad|^2 for n <= d
    independent directions, and n = d is the gradient. Unbiased where the distribution of the directions is the
    same for -z_i and for any order of the weights (Gaussian, Rademacher, Sphere).

    Its Gram matrix needs the n directions of one leaf at once: n times the largest leaf in bytes.

    Source: Fluegel et al., arXiv 2410.17764 (2024), section 3 (their projection, without the factor).
    """

    unbiased = True

    def gradient(
        self, objective: Objective, directions: Directions, seeds: Sequence[int], slopes: Sequence[float]
    ) -> Seeded:
        total = _gram(objective, directions, seeds)
        if total is None:
            return Seeded(objective, directions, tuple(seeds), tuple(slopes))
        inverse = np.linalg.pinv(total, rcond=1e-10, hermitian=True)
        rank = np.linalg.matrix_rank(total, tol=1e-10 * float(np.abs(total).max()), hermitian=True)
        coefficients = objective.dimension / max(int(rank), 1) * (inverse @ np.asarray(slopes))
        return Seeded(objective, directions, tuple(seeds), tuple(coefficients.tolist()))


def _gram(objective: Objective, directions: Directions, seeds: Sequence[int]) -> np.ndarray | None:
    """The inner products of the directions, in float64; None on fake tensors, which have no numbers."""
    total = None
    for leaf in objective.leaves:
        for products in _products(directions, leaf, seeds):
            if not is_fake(products):
                here = products.cpu().numpy()
                total = here if total is None else total + here
    return total


def _products(directions: Directions, leaf: Leaf, seeds: Sequence[int]) -> Iterator[Tensor]:
    """The inner products on a leaf, some of its weights at a time: in float32 more directions than weights would
    seem independent."""
    rows = torch.stack([combination(directions, leaf, [seed], [1.0]).flatten() for seed in seeds])
    for columns in rows.split(_PIECE, dim=1):
        piece = columns.double()
        yield piece @ piece.T
        del piece  # before the next one is made


@value
class Sign(Combine):
    """g = sign of (1/n) sum_k s_k z_k, entry by entry: a step of one length for every weight. Biased: E g is not
    along the gradient, and has no scale.

    Source: Liu, Chen, Chen, Hong, "signSGD via zeroth-order oracle", ICLR 2019, algorithm 1.
    """

    unbiased = False

    def gradient(
        self, objective: Objective, directions: Directions, seeds: Sequence[int], slopes: Sequence[float]
    ) -> Signed:
        return Signed(Mean().gradient(objective, directions, seeds, slopes))


@value
class Normalized(Combine):
    """g = (1/n) sum_k s_k z_k / sigma, with sigma the standard deviation of the n slopes: a step whose length does
    not depend on the loss's scale, as normalised SGD's does not. Biased: E g is along the gradient, but without
    its length.

    With one-sided differences this is FZOO: its sigma is that of the losses loss(theta + eps z_k), which is eps
    times ours, so its step is ours with a learning rate divided by eps. Where all slopes are equal, sigma is
    taken as 1. One probe has no standard deviation: the size of its slope takes its place.

    Source: FZOO, arXiv 2506.09034 (2025), equations 3 and 4.
    """

    unbiased = False

    def gradient(
        self, objective: Objective, directions: Directions, seeds: Sequence[int], slopes: Sequence[float]
    ) -> Seeded:
        mean = sum(slopes) / len(slopes)
        scatter = math.sqrt(sum((slope - mean) ** 2 for slope in slopes) / max(len(slopes) - 1, 1))
        sigma = (abs(mean) if len(slopes) == 1 else scatter) or 1.0
        return Mean().gradient(objective, directions, seeds, [slope / sigma for slope in slopes])
