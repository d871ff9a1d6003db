"""The bias of an estimate whose direction is chosen by its slope."""

from __future__ import annotations

import math

import numpy as np

from gradcost.core.errors import BadInput
from gradcost.estimators.adaptive import Choice, Flattest, Steepest


def selection_bias(choice: Choice, candidates: int) -> float:
    """Return m in E g = m grad, for `Adaptive` with Gaussian directions and exact slopes.

    Law: m = E[w^2], where w is the one that `choice` keeps of k independent standard normal numbers. With x = t^2 and
    F(t) = erf(t / sqrt 2), the distribution function of |w|, E[w^2] = integral of P(w^2 > x) dx over x > 0 is
        Steepest: integral of 2 t (1 - F^k) dt,      Flattest: integral of 2 t (1 - F)^k dt,      over t > 0.
    m = 1 for k = 1; m = 1 + 2/pi (Steepest) and 1 - 2/pi (Flattest) for k = 2.
    Computed by Gauss-Legendre quadrature to 12 digits.

    Args:
        choice: Steepest() or Flattest().
        candidates: k, 1 or more.
    Returns:
        The factor m.
    Raises:
        BadInput: candidates is below 1, or no formula is known for the choice.
    """
    if candidates < 1:
        raise BadInput(f"candidates must be 1 or more, not {candidates}.")
    nodes, weights = np.polynomial.legendre.leggauss(400)
    reach = 12.0  # the largest of 10^15 normal numbers is below
    t = reach * (nodes + 1) / 2
    above = np.array([math.erfc(point / math.sqrt(2)) for point in t])  # P(|w| > t)
    match choice:
        case Steepest():
            tail = -np.expm1(candidates * np.log1p(-above))
        case Flattest():
            tail = above**candidates
        case _:
            raise BadInput(f"no formula is known for the bias of {choice}: measure it.")
    return float((weights * 2 * t * tail).sum() * reach / 2)
