"""Formulas for the expected cosine between an estimate and the gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradcost.core.errors import BadInput
from gradcost.directions import Coordinates, Directions, Gaussian, Rademacher, Sphere, StatefulDirections
from gradcost.directions.orthogonal import Orthogonal
from gradcost.estimators.combine import Combine, Mean, Normalized, Projection, Sign
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.estimators.structure import unwrapped
from gradcost.theory.moments import check_dimension


def expected_cosine(estimator: Estimator, dimension: int) -> float | None:
    """Return the expected cosine E[<g, grad> / (|g| |grad|)] of an estimate g from n probes of d weights.

    Notation:
    - B(a, b) = Gamma(a + 1/2) Gamma(a + b) / (Gamma(a) Gamma(a + b + 1/2)), which is E sqrt(X) for X ~ Beta(a, b);
    - c = sqrt(d/pi) Gamma(d/2) / Gamma((d + 1)/2), near sqrt(2/pi): the expected cosine between a vector of uniform
      direction and the vector of its signs.

    Law, expected cosine:
    - Mean of Gaussian directions: B(n/2, (d - 1)/2), exact. This is near sqrt(2/(pi d)) for n = 1 and near
      sqrt(n/(n + d - 1)) for large n.
    - Mean of Sphere or Rademacher directions: the same formula; exact for n = 1, else with a relative error of 1/d.
    - Projection on n <= d directions: B(n/2, (d - n)/2), exact; 1 for n >= d. Less for Rademacher and small d,
      where sign vectors can be dependent: 0.92 for n = d = 5.
    - Mean of Coordinates or Orthogonal directions: the formula of Projection, exact for n <= d.
    - Normalized: as Mean, because Normalized changes only the length of g.
    - Sign of Gaussian or Sphere directions: c times the cosine of Mean, because the distribution of g is invariant
      under rotation. Exact where the cosine of Mean is exact.
    - Sign of Rademacher directions: c sqrt(n/(n + d - 1)), with a relative error of 1/d; exact for n = 1, where the
      signs of g are those of z or of -z.
    - Sign of Coordinates: c sqrt(n/d), exact for n <= d. The signs are 0 on all but n weights.
    - Sign of Orthogonal directions: not known.
    - Backprop: 1.
    - Accumulated(e): as e. Clipped(e): as e if no slope is clipped.

    Derivation for Mean of Gaussian directions: rotate a unit gradient to e_1. Let the vector a contain the first
    entries of the n directions, and the (d - 1) x n matrix W the other entries. Then g_1 = |a|^2/n. The other entries
    of g are W a/n, whose length is |a|/n times that of d - 1 independent normals. So
    cos^2 = |a|^2 / (|a|^2 + chi^2_{d-1}).

    Assumptions:
    - The direction of the gradient is uniform on the sphere. Gaussian and Sphere directions need this only for Sign;
      the other directions always need it. Example: the expected cosine of one Rademacher direction is sqrt(1/d) for a
      gradient that is nonzero on one weight only, and sqrt(2/(pi d)) for a gradient with entries of equal size.
      `cosine_along_coordinates` is for Coordinates and a known gradient.
    - Slopes are exact: rounding and the bias of a finite difference are not included.

    Args:
        estimator: how the gradient is obtained.
        dimension: d, the number of trainable weights, 1 or more.
    Returns:
        The expected cosine; None if no formula is known.
    Raises:
        BadInput: dimension is below 1.
    Source: derived here. c is sqrt(d) E|u_1| for u uniform on the sphere, where u_1^2 ~ Beta(1/2, (d - 1)/2).
    """
    check_dimension(dimension)
    match unwrapped(estimator):
        case Reverse():
            return 1.0
        case Probing(directions=directions, probes=probes, combine=combine):
            return _cosine_of_combined(directions, probes, combine, dimension)
    return None


def cosine_along_coordinates(gradient: Tensor, probes: int) -> float:
    """Return the expected cosine between a known gradient and its estimate, the mean over n Coordinates.

    Law: cos^2 = X, where X is the fraction of |grad|^2 on the n selected weights. E X = n/d, so
        n/d <= E cos <= sqrt(n/d).
    A gradient on one weight reaches the lower bound, one with entries of equal size the upper bound. In general
        E sqrt(X) = integral of (1 - E exp(-t X)) t^(-3/2) dt / (2 sqrt(pi)) over t > 0,
    This function uses the E exp(-t X) of n weights sampled with replacement. For n = 1 that is exact:
    |grad|_1 / (d |grad|_2). For n > 1 it is approximate, because a weight can be sampled twice (probability about
    n/(2 d) per weight); the result is kept between the two bounds. The integral is a trapezoidal rule in log t, in
    float64 (relative error below 1e-6).

    Args:
        gradient: a tensor of any shape, not all zero; d is its number of entries.
        probes: n, from 1 to d.
    Returns:
        The expected cosine.
    Raises:
        BadInput: the gradient is zero, or probes is out of its range.
    """
    squares = gradient.detach().double().flatten().square()
    if not 1 <= probes <= len(squares):
        raise BadInput(f"probes must be 1 to {len(squares)}, the entries of the gradient, not {probes}.")
    total = float(squares.sum())
    if total == 0:
        raise BadInput("a gradient of zero has no direction: evaluate it away from a minimum of the loss.")
    squares = squares / total
    squares = squares[squares > 0]
    d, log_step = gradient.numel(), 0.1
    # 1 - E exp(-t X) is of order t near 0 and at most P(X > 0). So all t below 1e-12 or above 1e16 d add a millionth.
    logs = torch.arange(math.log(1e-12), math.log(1e16) + math.log(d), log_step, dtype=torch.float64)
    # E exp(-t X) - 1 for one draw, n = 1
    one_draw = torch.stack([torch.expm1(-squares * math.exp(log)).sum() / d for log in logs.tolist()])
    complement = -torch.expm1(probes * torch.log1p(one_draw.clamp(min=-1.0)))  # 1 - E exp(-t X)
    integral = float((complement * torch.exp(-logs / 2)).sum()) * log_step / (2 * math.sqrt(math.pi))
    return min(max(integral, probes / d), math.sqrt(probes / d))


def _cosine_of_combined(
    directions: Directions | StatefulDirections, probes: int, combine: Combine, dimension: int
) -> float | None:
    match combine:
        case Mean() | Normalized():
            return _cosine_of_mean(directions, probes, dimension)
        case Projection():
            return _cosine_of_projection(directions, probes, dimension)
        case Sign():
            return _cosine_of_sign(directions, probes, dimension)
    return None


def _cosine_of_mean(directions: Directions | StatefulDirections, probes: int, dimension: int) -> float | None:
    match directions:
        case Gaussian() | Sphere() | Rademacher():
            return _mean_root_of_beta(probes, dimension - 1)
        case Coordinates() | Orthogonal():
            return _cosine_in_rounds(probes, dimension)
    return None


def _cosine_in_rounds(probes: int, dimension: int) -> float:
    """Return the cosine of Mean for directions in rounds of `dimension`, orthogonal within each round."""
    rounds, rest = divmod(probes, dimension)
    if rounds == 0 or rest == 0:
        return _mean_root_of_beta(min(probes, dimension), dimension - min(probes, dimension))
    # g is proportional to rounds * grad + P grad, where P projects on the last `rest` directions. |P grad|^2 is near
    # rest/d of |grad|^2; the deviation, about 1/sqrt(d), is neglected.
    fraction = rest / dimension
    return (rounds + fraction) / math.sqrt(rounds * rounds + (2 * rounds + 1) * fraction)


def _cosine_of_projection(directions: Directions | StatefulDirections, probes: int, dimension: int) -> float | None:
    match directions:
        case Gaussian() | Sphere() | Rademacher() | Coordinates() | Orthogonal():
            return _mean_root_of_beta(min(probes, dimension), max(dimension - probes, 0))
    return None


def _cosine_of_sign(directions: Directions | StatefulDirections, probes: int, dimension: int) -> float | None:
    sign_factor = math.sqrt(dimension / math.pi) / _half_step(dimension / 2)
    match directions:
        case Gaussian() | Sphere():
            return sign_factor * _mean_root_of_beta(probes, dimension - 1)
        case Rademacher():
            return sign_factor * math.sqrt(probes / (probes + dimension - 1))
        case Coordinates():
            return sign_factor * math.sqrt(min(probes, dimension) / dimension)
    return None


def _mean_root_of_beta(twice_a: int, twice_b: int) -> float:
    """Return E sqrt(X) for X ~ Beta(a, b), from the integers 2 a and 2 b; 1 for b = 0."""
    return _half_step(twice_a / 2) / _half_step((twice_a + twice_b) / 2)


def _half_step(x: float) -> float:
    """Return Gamma(x + 1/2) / Gamma(x), with a relative error of 1e-12."""
    if x < 100:  # from 100 on, a difference of lgamma loses digits and the asymptotic series is accurate enough
        return math.exp(math.lgamma(x + 0.5) - math.lgamma(x))
    terms = (-1 / 8, 1 / 128, 5 / 1024, -21 / 32768, -399 / 262144)
    return math.sqrt(x) * (1 + sum(term / x**power for power, term in enumerate(terms, 1)))
