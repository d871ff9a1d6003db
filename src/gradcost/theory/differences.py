"""The error of a difference of losses against its eps, and what rounding leaves of a perturbation: laws of one weight
and one slope, which the tests hold against measured curves."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from gradcost.core.errors import BadInput
from gradcost.core.precision import best_eps, best_forward_eps, loss_roundoff, spacing

__all__ = ["Survival", "best_eps", "best_forward_eps", "central_error", "forward_error", "survives"]

_FINE = 16.0  # eps in units of the spacing, above which rounding is noise of variance spacing^2 / 12
_FAR = 9.0  # standard deviations beyond which a normal number is never


def central_error(eps: float, dtype: torch.dtype, loss: float, third: float) -> float:
    """How far (f(eps) - f(-eps)) / (2 eps) is off f'(0), at most, to leading order: a V in eps.

    Law: eps^2/6 |f'''| of truncation (Taylor) and u |f| / eps of rounding, where each end is off by u |f| at most,
    u the round-off of a loss computed in `dtype` (`loss_roundoff`). Assumptions: f has three derivatives near (a ReLU
    has not), and is as exact as one rounding makes it; a long computation is off by a few u. loss: |f|. third: |f'''|
    along the direction. Its least is at `best_eps(dtype, 1, loss, third)`, where truncation is half of the rounding.

    Source: Press et al., Numerical Recipes (3rd ed. 2007), section 5.7. Raises: ValueError when eps is not above 0.
    """
    _check(eps)
    return eps**2 / 6 * abs(third) + loss_roundoff(dtype) * abs(loss) / eps


def forward_error(eps: float, dtype: torch.dtype, loss: float, second: float) -> float:
    """How far (f(eps) - f(0)) / eps is off f'(0), at most, to leading order: eps/2 |f''| + 2 u |f| / eps.

    Its least is at `best_forward_eps(dtype, 1, loss, second)`, where both are equal. Assumptions, source and errors
    as for `central_error`.
    """
    _check(eps)
    return eps / 2 * abs(second) + 2 * loss_roundoff(dtype) * abs(loss) / eps


class Survival(NamedTuple):
    """What rounding to nearest leaves of a perturbation d of a weight; k is what is left.

    cosine: E[d k] / sqrt(E d^2 E k^2). ratio: E[d k] / E d^2, by which it multiplies a slope on average. lost: the
    probability that k is 0.
    """

    cosine: float
    ratio: float
    lost: float


def survives(eps: float, scale: float, dtype: torch.dtype) -> Survival:
    """What is left of eps N(0, 1) added to the weight `scale` and rounded to `dtype`.

    Law: upwards the numbers of the type lie h apart, h = `spacing(scale)`, and downwards h too, or h/2 where the
    scale is a power of two; k takes a step where d passes the middle between two. With b_j = (j - 1/2) h / eps, the
    normal density phi and upper tail Q, each side gives E[d k] = eps h sum phi(b_j),
    E k^2 = h^2 sum (2j - 1) Q(b_j) and P(k != 0) = Q(b_1). Where eps > 16 h rounding is noise of variance h^2 / 12
    instead (Widrow 1956).
    Assumption: eps is below the scale, so that the spacing stays.

    Raises: ValueError when eps is not above 0.
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
    """E[d k], E[k^2] and P(k != 0) over the half of the perturbations that go one way."""
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
        raise BadInput(f"eps is the length of a step along a direction and must be above 0, not {eps!r}.")
