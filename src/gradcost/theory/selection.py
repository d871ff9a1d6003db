"""What choosing a direction by its slope does to the mean of an estimate."""

from __future__ import annotations

import math

import numpy as np

from gradcost.core.errors import BadInput
from gradcost.estimators.adaptive import Choice, Flattest, Steepest


def selection_bias(choice: Choice, candidates: int) -> float:
    """m = E[w^2] of the one that `choice` keeps of `candidates` independent standard normal w: E g = m grad for
    `Adaptive` with Gaussian directions and exact slopes.

    Law: the integral of P(w^2 > x) over x > 0, with x = t^2 and F(t) = erf(t / sqrt 2) the distribution of |w|:
    of 2 t (1 - F^k) for Steepest and of 2 t (1 - F)^k for Flattest, by Gauss-Legendre quadrature to 12 digits.
    m = 1 for one candidate, 1 + 2/pi and 1 - 2/pi for two.

    Raises: ValueError when candidates < 1, or nothing is known of the choice.
    """
    if candidates < 1:
        raise BadInput(f"a direction is kept of 1 candidate or more, not of {candidates}.")
    nodes, weights = np.polynomial.legendre.leggauss(400)
    reach = 12.0  # beyond, even the largest of 10^15 normals is not found
    t = reach * (nodes + 1) / 2
    above = np.array([math.erfc(point / math.sqrt(2)) for point in t])  # P(|w| > t)
    match choice:
        case Steepest():
            tail = -np.expm1(candidates * np.log1p(-above))
        case Flattest():
            tail = above**candidates
        case _:
            raise BadInput(f"what {choice} does to the mean of an estimate is not known: measure it.")
    return float((weights * 2 * t * tail).sum() * reach / 2)
