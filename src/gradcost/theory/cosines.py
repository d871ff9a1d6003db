"""The expected cosine between an estimate and the gradient."""

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
    """Return E <g, grad> / (|g| |grad|) of an estimate g from n probes in d weights.

    Notation:
    - B(a, b) = Gamma(a + 1/2) Gamma(a + b) / (Gamma(a) Gamma(a + b + 1/2)), the mean square root of a Beta(a, b)
      variable;
    - c = sqrt(d/pi) Gamma(d/2) / Gamma((d + 1)/2), near sqrt(2/pi), the cosine between a vector and its signs.

    Law: the expected cosine is
    - Mean of Gaussian directions: B(n/2, (d - 1)/2), exact. Near sqrt(2/(pi d)) for n = 1, near sqrt(n/(n + d - 1))
      for large n.
    - Mean of Sphere or Rademacher directions: the same; exact for n = 1, else to a relative 1/d.
    - Projection on n <= d directions: B(n/2, (d - n)/2), exact; 1 for n > d.
    - Mean of Coordinates or Orthogonal directions: as Projection for n <= d, exact.
    - Normalized: as Mean, because it changes only the length.
    - Sign of Gaussian or Sphere directions: c times the cosine of Mean; exact if that of Mean is, because the
      distribution is invariant under rotation.
    - Sign of Rademacher directions: c sqrt(n/(n + d - 1)), to a relative 1/d; larger by sqrt(pi/2) for n = 1.
    - Sign of Coordinates, whose signs are 0 on all but n weights: c sqrt(n/d), exact for n <= d.
    - Sign of Orthogonal directions: not known.
    - Backprop: 1.
    Accumulated(e) has the cosine of e. Clipped(e) has it if no slope is clipped.

    Derivation, Gaussian: rotate the gradient to e_1. Write the n directions as a row a of first entries and a block W
    of the others. Then g_1 = |a|^2/n, and the rest of g is W a/n, whose length is |a|/n times that of d - 1
    independent normals. So cos^2 = |a|^2 / (|a|^2 + chi^2_{d-1}).

    Assumptions:
    - The direction of the gradient is uniform on the sphere. Gaussian and Sphere directions need this only for Sign.
      The others need it always: one Rademacher direction has cosine sqrt(1/d) with a gradient on a single weight, and
      sqrt(2/(pi d)) with one spread evenly. `cosine_along_coordinates` is for a known gradient.
    - Slopes are exact: rounding and the bias of a finite difference are not included.

    Args:
        estimator: how the gradient is obtained.
        dimension: d, the number of trainable weights, 1 or more.
    Returns:
        The expected cosine; None if no formula is known.
    Raises:
        BadInput: dimension is below 1.
    Source: derived here; the factor c and its arcsine law are from Sheppard (1899).
    """
    check_dimension(dimension)
    match unwrapped(estimator):
        case Reverse():
            return 1.0
        case Probing(directions=directions, probes=probes, combine=combine):
            return _of_probes(directions, probes, combine, dimension)
    return None


def cosine_along_coordinates(gradient: Tensor, probes: int) -> float:
    """Return the expected cosine between a known gradient and the mean over n Coordinates.

    Law: cos^2 = X, the share of |grad|^2 on the n selected weights. E X = n/d, so
        n/d <= E cos <= sqrt(n/d).
    The lower bound is reached by a gradient on one weight, the upper one by entries of equal size. In between
        E sqrt(X) = integral of (1 - E exp(-t X)) t^(-3/2) dt / (2 sqrt(pi)) over t > 0,
    with E exp(-t X) that of n weights sampled with replacement. For n = 1 this is exact, |grad|_1 / (d |grad|_2). For
    n > 1 the error comes from sampling a weight twice, with a chance of about n/(2 d) per weight.
    Computed in float64 by the trapezoidal rule in log t (relative error below 1e-6).

    Args:
        gradient: of any shape, not zero; d is its number of entries.
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
    d, width = gradient.numel(), 0.1
    # 1 - E exp(-t X) is of order t near 0 and tends to P(X > 0): beyond t = 1e-12 and 1e16 the rest is a millionth.
    logs = torch.arange(math.log(1e-12), math.log(1e16) + math.log(d), width, dtype=torch.float64)
    one = torch.stack([torch.expm1(-squares * math.exp(log)).sum() / d for log in logs.tolist()])
    complement = -torch.expm1(probes * torch.log1p(one.clamp(min=-1.0)))  # 1 - E exp(-t X)
    return float((complement * torch.exp(-logs / 2)).sum()) * width / (2 * math.sqrt(math.pi))


def _of_probes(
    directions: Directions | StatefulDirections, probes: int, combine: Combine, dimension: int
) -> float | None:
    match combine:
        case Mean() | Normalized():
            return _of_the_mean(directions, probes, dimension)
        case Projection():
            return _of_a_projection(directions, probes, dimension)
        case Sign():
            return _of_signs(directions, probes, dimension)
    return None


def _of_the_mean(directions: Directions | StatefulDirections, probes: int, dimension: int) -> float | None:
    match directions:
        case Gaussian() | Sphere() | Rademacher():
            return _root_of_beta(probes, dimension - 1)
        case Coordinates() | Orthogonal():
            return _in_rounds(probes, dimension)
    return None


def _in_rounds(probes: int, dimension: int) -> float:
    """Return the cosine of Mean for directions that are orthogonal within rounds of `dimension` directions."""
    rounds, rest = divmod(probes, dimension)
    if rounds == 0 or rest == 0:
        return _root_of_beta(min(probes, dimension), dimension - min(probes, dimension))
    # g is rounds * grad + grad on `rest` weights, whose share of |grad|^2 is rest/d, to about 1/sqrt(d).
    share = rest / dimension
    return (rounds + share) / math.sqrt(rounds * rounds + (2 * rounds + 1) * share)


def _of_a_projection(directions: Directions | StatefulDirections, probes: int, dimension: int) -> float | None:
    match directions:
        case Gaussian() | Sphere() | Rademacher() | Coordinates() | Orthogonal():
            return _root_of_beta(min(probes, dimension), max(dimension - probes, 0))
    return None


def _of_signs(directions: Directions | StatefulDirections, probes: int, dimension: int) -> float | None:
    of_a_vector = math.sqrt(dimension / math.pi) / _half_step(dimension / 2)
    match directions:
        case Gaussian() | Sphere():
            return of_a_vector * _root_of_beta(probes, dimension - 1)
        case Rademacher():
            return of_a_vector * math.sqrt(probes / (probes + dimension - 1))
        case Coordinates():
            return of_a_vector * math.sqrt(min(probes, dimension) / dimension)
    return None


def _root_of_beta(twice_a: int, twice_b: int) -> float:
    """Return E sqrt(X) of X ~ Beta(a, b); 1 for b = 0."""
    return _half_step(twice_a / 2) / _half_step((twice_a + twice_b) / 2)


def _half_step(x: float) -> float:
    """Return Gamma(x + 1/2) / Gamma(x), to 1e-12."""
    if x < 100:  # above, differences of lgamma lose digits and the asymptotic series is exact enough
        return math.exp(math.lgamma(x + 0.5) - math.lgamma(x))
    terms = (-1 / 8, 1 / 128, 5 / 1024, -21 / 32768, -399 / 262144)
    return math.sqrt(x) * (1 + sum(term / x**power for power, term in enumerate(terms, 1)))
