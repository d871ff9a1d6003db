"""Where an estimate points: the cosine of its angle with the gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradcost.core.errors import BadInput
from gradcost.directions import Coordinates, Directions, Gaussian, Rademacher, Sphere, StatefulDirections
from gradcost.directions.orthogonal import Orthogonal
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.combine import Combine, Mean, Normalized, Projection, Sign
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.theory.moments import check_dimension


def expected_cosine(estimator: Estimator, dimension: int) -> float | None:
    """E <g, grad> / (|g| |grad|) for n probes in d weights; None where unknown.

    Law: with B(a, b) the mean square root of a Beta(a, b) variable, Gamma(a + 1/2) Gamma(a + b) / (Gamma(a)
    Gamma(a + b + 1/2)), the cosine is
    - of the mean of Gaussian directions, B(n/2, (d - 1)/2): exact. (Turn the gradient to e_1 and write the n
      directions as a row a of first entries and a block W of the others: g_1 = |a|^2/n, and the rest of g is
      W a/n, of length |a|/n times that of d - 1 independent normals. So cos^2 = |a|^2 / (|a|^2 + chi^2_{d-1}).)
      It is near sqrt(2/(pi d)) for n = 1 and near sqrt(n/(n + d - 1)) for many;
    - of the mean on the sphere and of the mean of Rademacher directions the same, exactly for n = 1 and to a
      relative 1/d beyond;
    - of a projection on n <= d directions B(n/2, (d - n)/2), and 1 beyond; of the mean of Coordinates and of
      Orthogonal directions too: exact;
    - of Normalized that of Mean: it changes the length alone;
    - of Sign that of Mean times c = sqrt(d/pi) Gamma(d/2) / Gamma((d + 1)/2), near sqrt(2/pi), the cosine between a
      vector and its signs: exact given that of Mean for directions that may be turned (Gaussian, Sphere). For
      Rademacher ones it is c sqrt(n/(n + d - 1)), to a relative 1/d, and larger by sqrt(pi/2) for n = 1; for
      Coordinates, whose signs are zero but on n weights, c sqrt(n/d): exact for n <= d. Of Orthogonal ones it is
      not stated;
    - of backpropagation 1.

    Assumption: the gradient points in no preferred direction (uniform on the sphere). Gaussian and Sphere
    directions need it for Sign alone. The others do: `cosine_along_coordinates` is for a known gradient, and for one
    sign direction a gradient on a single weight has cosine sqrt(1/d), one spread evenly sqrt(2/(pi d)). Slopes are
    exact: the round-off and the bias of a difference are not in it. Accumulated(e) is e; Clipped(e) is e as long as
    it cuts nothing.

    Source: derived here; the factor c and the arcsine law behind it are Sheppard's (1899). Raises: ValueError when
    dimension < 1.
    """
    check_dimension(dimension)
    match estimator:
        case Accumulated(inner) | Clipped(inner):
            return expected_cosine(inner, dimension)
        case Reverse():
            return 1.0
        case Probing(directions=directions, probes=probes, combine=combine):
            return _of_probes(directions, probes, combine, dimension)
    return None


def cosine_along_coordinates(gradient: Tensor, probes: int) -> float:
    """E cos of the mean of `probes` Coordinates with this gradient (any shape), whatever its entries are.

    Law: cos^2 is the share of |grad|^2 that lies on the n weights looked at: n/d on average, so E cos <= sqrt(n/d),
    with equality where all entries are equally large; E cos >= n/d, with equality where one entry is all. Between
    them E sqrt(X) = integral of (1 - E exp(-t X)) t^(-3/2) dt / (2 sqrt(pi)) over t > 0, with E exp(-t X) that of n
    weights drawn with replacement: exact for n = 1, where it is |grad|_1 / (d |grad|_2), and otherwise up to
    the chance, about n/(2 d) a weight, of drawing one twice.

    Computed in float64 by the trapezoidal rule in log t (relative error below 1e-6).
    Raises: ValueError when the gradient is zero, or probes is not between 1 and its number of entries.
    """
    squares = gradient.detach().double().flatten().square()
    if not 1 <= probes <= len(squares):
        raise BadInput(f"of {len(squares)} weights 1 to {len(squares)} are looked at, not {probes}.")
    total = float(squares.sum())
    if total == 0:
        raise BadInput("a gradient of zero has no direction: take it where the loss is not at a minimum.")
    squares = squares / total
    squares = squares[squares > 0]
    d, width = gradient.numel(), 0.1
    # 1 - E exp(-t X) grows as t and ends as the chance that X > 0: where t is 1e-12 or 1e16 the rest is a millionth.
    logs = torch.arange(math.log(1e-12), math.log(1e16) + math.log(d), width, dtype=torch.float64)
    one = torch.stack([torch.expm1(-squares * math.exp(log)).sum() / d for log in logs.tolist()])
    lost = -torch.expm1(probes * torch.log1p(one.clamp(min=-1.0)))
    return float((lost * torch.exp(-logs / 2)).sum()) * width / (2 * math.sqrt(math.pi))


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
    """Of directions that are orthogonal within rounds of `dimension` of them."""
    rounds, rest = divmod(probes, dimension)
    if rounds == 0 or rest == 0:
        return _root_of_beta(min(probes, dimension), dimension - min(probes, dimension))
    # (rounds) grad + its part on `rest` weights, of which the share is rest/d, give or take 1/sqrt(d).
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
    """E sqrt(X) of X ~ Beta(a, b); 1 for b = 0."""
    return _half_step(twice_a / 2) / _half_step((twice_a + twice_b) / 2)


def _half_step(x: float) -> float:
    """Gamma(x + 1/2) / Gamma(x), to 1e-12: from 100 on by its series, where a difference of logarithms of large
    factorials would lose digits."""
    if x < 100:
        return math.exp(math.lgamma(x + 0.5) - math.lgamma(x))
    terms = (-1 / 8, 1 / 128, 5 / 1024, -21 / 32768, -399 / 262144)
    return math.sqrt(x) * (1 + sum(term / x**power for power, term in enumerate(terms, 1)))
