"""Values measured over seeds, or their bounds: the median, its interval, and both in words."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf, isfinite, log, sqrt
from statistics import fmean, median, stdev
from typing import NamedTuple

from gradcost.core.units import count, number
from gradcost.results.statistics import LEVEL, Interval, interval

# Half the width of Student's 95% interval, in standard errors, for so few seeds that order statistics reach no 95%.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


class Between(NamedTuple):
    """A measured value of which only bounds are known, such as a ratio of steps to a loss that one run never reaches.

    Args:
        low: the least value that agrees with the records.
        high: the largest one; inf if there is none.
    """

    low: float
    high: float


Measured = float | Between


def measured_interval(
    values: Sequence[Measured], is_ratio: bool = False, bounds: tuple[float, float] = (-inf, inf)
) -> Interval:
    """Return the median over seeds with its interval.

    - From 6 values on: `statistics.interval`, which is free of assumptions on the distribution.
    - 2 to 5 values: Student's 95% interval of the mean, extended to all values and cut at `bounds`. Order statistics
      reach no 95% there. Of a ratio, the mean is the geometric one.
    - 1 value: the value itself, with confidence 0.
    - Bounds: from the low end of the interval of all low bounds to the high end of that of all high bounds.

    Args:
        values: one per seed, or its bounds; inf or -inf for a run that diverged.
        is_ratio: whether the values are ratios of two positive numbers.
        bounds: the least and the largest value that the quantity can have.
    Returns:
        Interval(median, low, high, confidence, n). The median is that of the low bounds. With an infinite value, or a
        ratio of 0, among 2 to 5: from the smallest to the largest.
    Raises:
        BadInput: there are no values.
    """
    lows, highs = _ends(values)
    if lows != highs:
        below, above = measured_interval(lows, is_ratio, bounds), measured_interval(highs, is_ratio, bounds)
        return Interval(below.median, below.low, above.high, min(below.confidence, above.confidence), below.n)
    values = lows
    plain = interval(values)
    scaled = [log_or_inf(x) for x in values] if is_ratio else values
    if plain.n not in STUDENT or not all(map(isfinite, scaled)):
        return plain
    margin = STUDENT[plain.n] * stdev(scaled) / sqrt(plain.n)
    low, high = fmean(scaled) - margin, fmean(scaled) + margin
    low, high = (_exp(low), _exp(high)) if is_ratio else (max(low, bounds[0]), min(high, bounds[1]))
    return Interval(plain.median, min(plain.low, low), max(plain.high, high), LEVEL, plain.n)


def _ends(values: Sequence[Measured]) -> tuple[list[float], list[float]]:
    """Return the low and the high bounds; a known value is both."""
    pairs = [value if isinstance(value, Between) else Between(value, value) for value in values]
    return [pair.low for pair in pairs], [pair.high for pair in pairs]


def log_or_inf(x: float) -> float:
    """Return the natural logarithm; -inf for 0."""
    return log(x) if x > 0 else -inf


def _exp(x: float) -> float:
    return exp(x) if x < 700 else inf


def format_interval(
    values: Sequence[Measured],
    missing: str = "not run",
    is_ratio: bool = False,
    bounds: tuple[float, float] = (-inf, inf),
) -> str:
    """Format the measured median and interval: `1.92 [1.85, 1.99], 5 seeds`; `missing` without values.

    With bounds, the median is a range too: `at least 66 [62, infinite], 3 seeds`.
    """
    if not values:
        return missing
    found = measured_interval(values, is_ratio, bounds)
    ends = f" [{number(found.low)}, {number(found.high)}]" if found.n > 1 else ""
    low, high = (median(each) for each in _ends(values))
    middle = number(low) if low == high else f"{number(low)} to {number(high)}"
    middle = f"at least {number(low)}" if low < high == inf else middle
    return f"{middle}{ends}, {count(found.n, 'seed')}"


def format_ratio(ratio: Interval) -> str:
    """Return "12.6 [4.21, 21.7]" for a ratio and its interval; an infinite number is "not reached"."""
    middle, *ends = (f"{x:.3g}" if isfinite(x) else "not reached" for x in (ratio.median, ratio.low, ratio.high))
    return middle if middle == "not reached" else f"{middle} [{', '.join(ends)}]"
