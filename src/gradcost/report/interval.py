"""The mean over seeds and Student's 95% interval about it."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt
from statistics import mean, stdev

# The 97.5% quantile of Student's t for 1 to 30 degrees of freedom: a table, so that no SciPy is needed.
_T = (
    *(12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139),
    *(2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963),
    *(2.079614, 2.073873, 2.068658, 2.063899, 2.059539, 2.055529, 2.051831, 2.048407, 2.045230, 2.042272),
)
_Z = 1.959964  # the same quantile of the normal law


@dataclass(frozen=True)
class Interval:
    """A mean over `n` seeds, [low, high] its 95% interval; one seed has a mean and no interval."""

    mean: float
    half: float | None
    low: float | None
    high: float | None
    n: int


def quantile(df: int) -> float:
    """Student's t at 97.5%: the table to 30 degrees of freedom, then its expansion about the normal law."""
    if df <= len(_T):
        return _T[df - 1]
    z = _Z
    return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)


def interval(values: list[float], least: float = -inf, greatest: float = inf) -> Interval | None:
    """The mean of `values` with Student's 95% interval, clipped to what can be: [least, greatest]."""
    if not values:
        return None
    middle = mean(values)
    if len(values) == 1:
        return Interval(middle, None, None, None, 1)
    half = quantile(len(values) - 1) * stdev(values) / sqrt(len(values))
    return Interval(middle, half, max(middle - half, least), min(middle + half, greatest), len(values))
