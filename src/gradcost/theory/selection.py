"""The bias of an estimate that selects one of several directions by its slope."""

from __future__ import annotations

import math

import numpy as np

from gradcost.core.errors import BadInput
from gradcost.estimators.adaptive import Choice, Flattest, Steepest


def selection_bias(choice: Choice, candidates: int) -> float:
    """Return m in E g = m grad, where g is the estimate of `Adaptive` with Gaussian directions and exact slopes.

    Law: m = E[w^2], where w is the one of k independent standard normal numbers with the largest (Steepest) or
    smallest (Flattest) absolute value. F(t) = erf(t / sqrt 2) is the probability that one number is in [-t, t].
        E[w^2] = integral of 2 t P(|w| > t) dt over t > 0,
        P(|w| > t) = 1 - F^k (Steepest) or (1 - F)^k (Flattest).
    Examples: m = 1 for k = 1; m = 1 + 2/pi (Steepest) or 1 - 2/pi (Flattest) for k = 2.
    Gauss-Legendre quadrature gives 12 digits of the integral.

    Args:
        choice: Steepest() or Flattest().
        candidates: k, the number of directions to choose from, 1 or more.
    Returns:
        The factor m.
    Raises:
        BadInput: candidates is below 1, or no formula is known for the choice.
    """
    if candidates < 1:
        raise BadInput(f"candidates must be 1 or more, not {candidates}.")
    nodes, weights = np.polynomial.legendre.leggauss(400)
    t_max = 12.0  # 1 - F(12) < 1e-32
    t = t_max * (nodes + 1) / 2
    above = np.array([math.erfc(point / math.sqrt(2)) for point in t])  # 1 - F(t)
    match choice:
        case Steepest():
            tail = -np.expm1(candidates * np.log1p(-above))  # 1 - F^k
        case Flattest():
            tail = above**candidates
        case _:
            raise BadInput(f"no formula is known for the bias of {choice}: measure it.")
    return float((weights * 2 * t * tail).sum() * t_max / 2)
