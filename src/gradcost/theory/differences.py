"""The error of a finite difference as a function of eps, and the effect of rounding on a perturbation.

The laws are about one slope and one weight. The tests compare them with measured curves.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from gradcost.core.errors import BadInput
from gradcost.core.precision import best_eps, best_forward_eps, loss_roundoff, spacing

__all__ = ["Survival", "best_eps", "best_forward_eps", "central_error", "forward_error", "survives"]

_FINE = 16.0  # eps / spacing above which rounding is noise of variance spacing^2 / 12
_FAR = 9.0  # standard deviations; a normal number is never beyond


def central_error(eps: float, dtype: torch.dtype, loss: float, third: float) -> float:
    """Return the error bound of a central difference, |(f(eps) - f(-eps)) / (2 eps) - f'(0)|, to leading order.

    Law: error <= eps^2/6 |f'''| + u |f| / eps.
    - eps^2/6 |f'''| is the truncation error (Taylor).
    - u |f| / eps is the rounding error: each end is off by at most u |f|, with u = `loss_roundoff(dtype)`.
    - The minimum is at `best_eps(dtype, 1, loss, third)`, where truncation is half of the rounding error.

    Assumptions: f has three derivatives near 0 (a ReLU has not). f has the error of one rounding; a long computation
    has a few u.

    Args:
        eps: finite-difference step, above 0.
        dtype: the type of the loss.
        loss: f.
        third: f''' along the direction.
    Returns:
        The bound, in units of the slope.
    Raises:
        BadInput: eps is not above 0 and finite.
    Source: Press et al., Numerical Recipes (3rd ed. 2007), section 5.7.
    """
    _check(eps)
    return eps**2 / 6 * abs(third) + loss_roundoff(dtype) * abs(loss) / eps


def forward_error(eps: float, dtype: torch.dtype, loss: float, second: float) -> float:
    """Return the error bound of a forward difference, |(f(eps) - f(0)) / eps - f'(0)|, to leading order.

    Law: error <= eps/2 |f''| + 2 u |f| / eps, with u = `loss_roundoff(dtype)`. The minimum is at
    `best_forward_eps(dtype, 1, loss, second)`, where both terms are equal.

    Assumptions and source: as `central_error`.

    Args:
        eps: finite-difference step, above 0.
        dtype: the type of the loss.
        loss: f.
        second: f'' along the direction.
    Returns:
        The bound, in units of the slope.
    Raises:
        BadInput: eps is not above 0 and finite.
    """
    _check(eps)
    return eps / 2 * abs(second) + 2 * loss_roundoff(dtype) * abs(loss) / eps


class Survival(NamedTuple):
    """The effect of rounding to nearest on a perturbation d of a weight; k is the rounded weight's change.

    Args:
        cosine: E[d k] / sqrt(E d^2 E k^2).
        ratio: E[d k] / E d^2, the mean factor on a slope.
        lost: P(k = 0).
    """

    cosine: float
    ratio: float
    lost: float


def survives(eps: float, scale: float, dtype: torch.dtype) -> Survival:
    """Return how much of the perturbation eps N(0, 1) of a weight survives rounding to `dtype`.

    Law: the spacing of the type above the weight is h = `spacing(scale, dtype)`. Below it is h, or h/2 if `scale` is
    a power of two. k steps where d passes the middle between two numbers of the type. With b_j = (j - 1/2) h / eps,
    the normal density phi and the upper tail Q, each side contributes
        E[d k] = eps h sum_j phi(b_j),   E k^2 = h^2 sum_j (2j - 1) Q(b_j),   P(k != 0) = Q(b_1).
    If eps > 16 h, rounding is noise of variance h^2 / 12 instead (Widrow 1956).

    Assumption: eps < |scale|, so the spacing is constant.

    Args:
        eps: standard deviation of the perturbation, above 0.
        scale: the weight.
        dtype: its type.
    Returns:
        Survival(cosine, ratio, lost).
    Raises:
        BadInput: eps is not above 0 and finite.
    """
    _check(eps)
    above = spacing(scale, dtype)
    exponent = math.log2(abs(scale)) if scale else 0.5
    below = (
        above / 2 if exponent == math.floor(exponent) and abs(scale) > torch.finfo(dtype).smallest_normal else above
    )
    products, squares, moved = map(sum, zip(*(_side(eps, step) for step in (above, below)), strict=True))
    return Survival(products / (eps * math.sqrt(squares)) if squares else 0.0, products / eps**2, 1 - moved)


def _side(eps: float, step: float) -> tuple[float, float, float]:
    """Return E[d k], E[k^2] and P(k != 0) over the perturbations of one sign."""
    if eps > _FINE * step:
        return eps**2 / 2, (eps**2 + step**2 / 12) / 2, _tail(step / 2 / eps)
    count = math.ceil(_FAR * eps / step) + 1
    middles = [(j - 0.5) * step / eps for j in range(1, count + 1)]
    product = eps * step * sum(math.exp(-(b**2) / 2) for b in middles) / math.sqrt(2 * math.pi)
    square = step**2 * sum((2 * j - 1) * _tail(b) for j, b in enumerate(middles, 1))
    return product, square, _tail(middles[0])


def _tail(b: float) -> float:
    return math.erfc(b / math.sqrt(2)) / 2


def _check(eps: float) -> None:
    if not 0 < eps < math.inf:
        raise BadInput(f"eps, the finite-difference step, must be above 0 and finite, not {eps!r}.")
