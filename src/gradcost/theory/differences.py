"""Formulas for the error of a finite difference at a given eps, and for the effect of rounding on a perturbation.

Each law is for one slope or one weight. The tests compare them with measured curves.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from gradcost.core.errors import BadInput
from gradcost.core.precision import best_eps, best_forward_eps, loss_roundoff, spacing

__all__ = ["Survival", "best_eps", "best_forward_eps", "central_error", "forward_error", "survives"]

_NOISE_RATIO = 16.0  # eps / spacing; above this, rounding acts as independent noise of variance spacing^2 / 12
_MAX_DEVIATIONS = 9.0  # standard deviations; larger normal numbers are neglected


def central_error(eps: float, dtype: torch.dtype, loss: float, third: float) -> float:
    """Return a bound on |(f(eps) - f(-eps)) / (2 eps) - f'(0)|, the error of a central difference, to leading order.

    Law: error <= eps^2/6 |f'''| + u |f| / eps.
    - eps^2/6 |f'''| is the truncation error (Taylor).
    - u |f| / eps is the rounding error: f(eps) and f(-eps) each have an error of at most u |f|, with
      u = `loss_roundoff(dtype)`.
    - The bound is smallest at `best_eps(dtype, 1, loss, third)`, where the truncation error is half of the rounding
      error.

    Assumptions: f has three derivatives near 0, which is false at the kink of a ReLU. Each f has the error of one
    rounding; the loss of a long computation can have an error of a few u |f|.

    Args:
        eps: finite-difference step, above 0.
        dtype: the type of the loss.
        loss: f(0).
        third: f'''(0), the third derivative along the direction.
    Returns:
        The bound, in units of the slope.
    Raises:
        BadInput: eps is not above 0 and finite.
    Source: Press et al., Numerical Recipes (3rd ed. 2007), section 5.7.
    """
    _require_valid_eps(eps)
    return eps**2 / 6 * abs(third) + loss_roundoff(dtype) * abs(loss) / eps


def forward_error(eps: float, dtype: torch.dtype, loss: float, second: float) -> float:
    """Return a bound on |(f(eps) - f(0)) / eps - f'(0)|, the error of a forward difference, to leading order.

    Law: error <= eps/2 |f''| + 2 u |f| / eps, with u = `loss_roundoff(dtype)`. The bound is smallest at
    `best_forward_eps(dtype, 1, loss, second)`, where both terms are equal.

    Assumptions and source: as in `central_error`, but two derivatives are enough.

    Args:
        eps: finite-difference step, above 0.
        dtype: the type of the loss.
        loss: f(0).
        second: f''(0), the second derivative along the direction.
    Returns:
        The bound, in units of the slope.
    Raises:
        BadInput: eps is not above 0 and finite.
    """
    _require_valid_eps(eps)
    return eps / 2 * abs(second) + 2 * loss_roundoff(dtype) * abs(loss) / eps


class Survival(NamedTuple):
    """How much of a perturbation d of a weight remains as k, the change of the weight after rounding to nearest.

    Args:
        cosine: E[d k] / sqrt(E d^2 E k^2), the cosine between d and k.
        ratio: E[d k] / E d^2, the mean factor by which rounding scales a slope.
        lost: P(k = 0), the probability that the weight does not change.
    """

    cosine: float
    ratio: float
    lost: float


def survives(eps: float, scale: float, dtype: torch.dtype) -> Survival:
    """Return how much of the perturbation d ~ eps N(0, 1) of a weight remains after rounding to `dtype`.

    Law: k is the change of the rounded weight. The spacing of the type on the side away from zero is
    h = `spacing(scale, dtype)`. On the side towards zero it is h, or h/2 if |scale| is a power of two. k jumps where
    d passes the middle between two neighbouring numbers. With b_j = (j - 1/2) h / eps, the normal density phi and its
    upper tail Q, each side contributes
        E[d k] = eps h sum_j phi(b_j),   E k^2 = h^2 sum_j (2j - 1) Q(b_j),   P(k != 0) = Q(b_1).
    If eps > 16 h, rounding is treated as independent noise of variance h^2 / 12 instead (Widrow 1956).

    Assumption: eps < |scale|, so h does not change over the perturbation.

    Args:
        eps: standard deviation of the perturbation, above 0.
        scale: the weight.
        dtype: the type of the weight.
    Returns:
        Survival(cosine, ratio, lost).
    Raises:
        BadInput: eps is not above 0 and finite.
    """
    _require_valid_eps(eps)
    above = spacing(scale, dtype)
    exponent = math.log2(abs(scale)) if scale else 0.5
    below = (
        above / 2 if exponent == math.floor(exponent) and abs(scale) > torch.finfo(dtype).smallest_normal else above
    )
    products, squares, moved = map(sum, zip(*(_contributions(eps, step) for step in (above, below)), strict=True))
    return Survival(products / (eps * math.sqrt(squares)) if squares else 0.0, products / eps**2, 1 - moved)


def _contributions(eps: float, step: float) -> tuple[float, float, float]:
    """Return the contributions of one side to E[d k], E[k^2] and P(k != 0)."""
    if eps > _NOISE_RATIO * step:
        return eps**2 / 2, (eps**2 + step**2 / 12) / 2, _upper_tail(step / 2 / eps)
    count = math.ceil(_MAX_DEVIATIONS * eps / step) + 1
    middles = [(j - 0.5) * step / eps for j in range(1, count + 1)]
    product = eps * step * sum(math.exp(-(b**2) / 2) for b in middles) / math.sqrt(2 * math.pi)
    square = step**2 * sum((2 * j - 1) * _upper_tail(b) for j, b in enumerate(middles, 1))
    return product, square, _upper_tail(middles[0])


def _upper_tail(b: float) -> float:
    """Return P(N(0, 1) > b)."""
    return math.erfc(b / math.sqrt(2)) / 2


def _require_valid_eps(eps: float) -> None:
    if not 0 < eps < math.inf:
        raise BadInput(f"eps, the finite-difference step, must be above 0 and finite, not {eps!r}.")
