"""Combine the slopes along several directions into one gradient."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from gradcost.core.complex_numbers import as_real
from gradcost.core.fake import is_fake
from gradcost.core.objective import Leaf, Objective
from gradcost.core.value import value
from gradcost.directions import Directions
from gradcost.estimators.gradient import Gradient, Seeded, Signed

_PIECE = 1 << 16  # number of entries of each direction that are converted to float64 at once


class Combine(ABC):
    """A rule that turns the slopes along several directions into a gradient."""

    unbiased: bool  # whether unbiased directions give an unbiased gradient
    seeded: bool  # whether the gradient is a `Seeded` with the same seeds
    scales_with_slopes: bool  # whether coefficient k is slope k times a constant
    needs_symmetry: bool = False  # whether the directions have to be `symmetric`

    @abstractmethod
    def gradient(
        self, objective: Objective, directions: Directions, seeds: Sequence[int], slopes: Sequence[float]
    ) -> Gradient:
        """Combine the slopes along these directions into one gradient.

        Args:
            objective: the model and the loss.
            directions: the distribution that turns a seed into a direction.
            seeds: one seed per probe.
            slopes: one slope per seed.
        """


@value
class Mean(Combine):
    """g = (1/n) sum_k s_k z_k.

    Law: unbiased, E g = E[z z'] grad = grad.

    Source: Spall 1992; Baydin et al. 2022.
    """

    unbiased, seeded, scales_with_slopes = True, True, True

    def gradient(
        self, objective: Objective, directions: Directions, seeds: Sequence[int], slopes: Sequence[float]
    ) -> Seeded:
        return Seeded(objective, directions, tuple(seeds), tuple(slope / len(slopes) for slope in slopes))


@value
class Projection(Combine):
    """g = (d/r) Z (Z'Z)^+ s: the projection of the gradient on the span of the directions, scaled to be unbiased.

    The columns of Z are the n directions, s contains the slopes, ^+ is the pseudo-inverse, d is the number of weights
    and r the dimension of the span. The mean of the projection is r/d times the gradient; the factor d/r corrects it.

    Law: E|g|^2 = (d/n) |grad|^2 for n <= d independent directions, and n = d gives the gradient.
    Unbiased if the distribution of the directions is invariant to the sign of each entry and to permutations of the
    entries and never all zero, or if they are orthogonal: Gaussian, Rademacher, Sphere, Orthogonal, Coordinates. Also
    the first three under Masked(Random(share)), up to the factor 1 - (1 - share)^(d n): that all entries are zero has
    the probability (1 - share)^(d n).
    `Probing` refuses other directions (low-rank, layerwise, guided, or on a fixed part of the weights): the mean of
    their projection scales each parameter's gradient by a different factor, which no single d/r corrects.

    Memory: n tensors of one parameter's size, for the matrix Z'Z.

    Source: Fluegel et al., arXiv 2410.17764 (2024), section 3 (their projection, without the factor).
    """

    unbiased, seeded, scales_with_slopes = True, True, False
    needs_symmetry = True

    def gradient(
        self, objective: Objective, directions: Directions, seeds: Sequence[int], slopes: Sequence[float]
    ) -> Seeded:
        gram = _gram(objective, directions, seeds)
        if gram is None:
            return Seeded(objective, directions, tuple(seeds), tuple(slopes))
        inverse = np.linalg.pinv(gram, rcond=1e-10, hermitian=True)
        rank = np.linalg.matrix_rank(gram, tol=1e-10 * float(np.abs(gram).max()), hermitian=True)
        coefficients = objective.dimension / max(int(rank), 1) * (inverse @ np.asarray(slopes))
        return Seeded(objective, directions, tuple(seeds), tuple(coefficients.tolist()))


def _gram(objective: Objective, directions: Directions, seeds: Sequence[int]) -> np.ndarray | None:
    """Return Z'Z, the inner products of the directions, in float64; None for fake tensors."""
    total = None
    for leaf in objective.leaves:
        for products in _products(directions, leaf, seeds):
            if not is_fake(products):
                array = products.cpu().numpy()
                total = array if total is None else total + array
    return total


def _products(directions: Directions, leaf: Leaf, seeds: Sequence[int]) -> Iterator[Tensor]:
    """Yield one parameter's terms of Z'Z, piece by piece; in float64: rounding in float32 would raise the rank."""
    rows = torch.stack([as_real(directions.draw(leaf, [seed], [1.0])).flatten() for seed in seeds])
    for columns in rows.split(_PIECE, dim=1):
        piece = columns.double()
        yield piece @ piece.T
        del piece  # before the next one is allocated


@value
class Sign(Combine):
    """g = sign of (1/n) sum_k s_k z_k, entry by entry: every weight moves by the same length.

    Biased: E g is not parallel to the gradient, and its length does not depend on the gradient's length.

    Source: Liu, Chen, Chen, Hong, "signSGD via zeroth-order oracle", ICLR 2019, algorithm 1.
    """

    unbiased, seeded, scales_with_slopes = False, False, False

    def gradient(
        self, objective: Objective, directions: Directions, seeds: Sequence[int], slopes: Sequence[float]
    ) -> Signed:
        return Signed(Mean().gradient(objective, directions, seeds, slopes))


@value
class Normalized(Combine):
    """g = (1/n) sum_k s_k z_k / sigma, where sigma is the standard deviation of the n slopes.

    The length of g does not depend on the scale of the loss. Biased: for Gaussian and Sphere directions E g is
    parallel to the gradient, but does not have its length. For Rademacher, as in FZOO, it is nearly parallel, unless
    a few weights have most of the gradient: for the gradient (4, 2, 1) it is parallel to (4, 0, 0) for n = 1, and to
    (4, 1.7, 0.8) for n = 2. If several slopes are all equal, sigma is 1. With one probe, sigma is the slope's
    absolute value.

    With one-sided differences this is FZOO, up to the unit of the learning rate:

    - Equations 3 and 4 of the paper: sigma is the standard deviation of the losses loss(theta + eps z_k), which is
      eps times the sigma here. The learning rate here is theirs divided by eps.
    - The authors' public code does not divide the loss differences by eps. Its standard deviation divides by n, ours
      by n - 1, so our g is shorter by the factor sqrt((n - 1) / n). Multiply the code's learning rate by
      sqrt(n / (n - 1)): with 8 probes, 5e-5 becomes 5.3e-5.

    Source: FZOO, arXiv 2506.09034 (2025), equations 3 and 4.
    """

    unbiased, seeded, scales_with_slopes = False, True, False

    def gradient(
        self, objective: Objective, directions: Directions, seeds: Sequence[int], slopes: Sequence[float]
    ) -> Seeded:
        mean = sum(slopes) / len(slopes)
        deviation = math.sqrt(sum((slope - mean) ** 2 for slope in slopes) / max(len(slopes) - 1, 1))
        sigma = (abs(mean) if len(slopes) == 1 else deviation) or 1.0
        return Mean().gradient(objective, directions, seeds, [slope / sigma for slope in slopes])
