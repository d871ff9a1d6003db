"""Statistics of few seeds: exact intervals and tests, and what so few seeds cannot show.

A run that diverged is the worst result, never a missing one: -inf where more is better. Statistics that cannot take
an infinite value use ranks instead, and no value is dropped.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from statistics import median
from typing import Any

import numpy as np

from gradcost.core.errors import BadInput, require

LEVEL = 0.95
FLIPS = 20  # pairs up to which the test enumerates all sign vectors: 2^20 of them


@dataclass(frozen=True)
class Interval:
    """A median over `n` values, and the interval [low, high].

    confidence: the probability that an interval made like this covers the median of the distribution.
    """

    median: float
    low: float
    high: float
    confidence: float
    n: int


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Return the median with a distribution-free interval between order statistics.

    Law: [x_(k), x_(n+1-k)] covers the median with probability 1 - 2 P(B <= k - 1), B ~ Binomial(n, 1/2), exactly,
    for every continuous distribution.

    - Between two k the interval is interpolated; the coverage is then approximate. For seeds that either learn or
      fail (Beta(0.1, 0.1)), seven or ten seeds cover 91 to 93% in simulation.
    - With n = 5 the widest interval, least to greatest, covers 93.75%. With fewer values it covers less, as
      `confidence` states.
    - A percentile bootstrap of five values covers about 83%. Student's interval of the mean fails for skewed values.

    Args:
        values: one per seed; -inf or inf for a run that diverged.
        level: the confidence to aim for.
    Returns:
        Interval. Its `confidence` is below `level` where n is too small.
    Raises:
        BadInput: there are no values.
    Source: Hettmansperger and Sheather 1986 (Statistics and Probability Letters 4), equation 2.2.
    """
    if not values:
        raise BadInput("an interval needs 1 value or more.")
    x, n = sorted(values), len(values)
    middle = float(median(x))
    depth = max((k for k in range(1, n // 2 + 1) if _covers(k, n) >= level), default=0)
    if depth == 0:
        return Interval(middle, x[0], x[-1], _covers(1, n), n)
    if depth + 1 > n // 2:
        return Interval(middle, x[depth - 1], x[n - depth], _covers(depth, n), n)
    outer, inner = _covers(depth, n), _covers(depth + 1, n)
    part = (outer - level) / (outer - inner)
    weight = (n - depth) * part / (depth + (n - 2 * depth) * part)
    low, high = (_between(x[a], x[b], weight) for a, b in ((depth - 1, depth), (n - depth, n - depth - 1)))
    return Interval(middle, low, high, level, n)


@cache
def _covers(depth: int, n: int) -> float:
    return max(0.0, 1 - sum(math.comb(n, k) for k in range(depth)) / 2 ** (n - 1))


def _between(outer: float, inner: float, weight: float) -> float:
    return outer if math.isinf(outer) or math.isinf(inner) else (1 - weight) * outer + weight * inner


@dataclass(frozen=True)
class SignFlip:
    """Two-sided p of a paired test over `n` pairs."""

    p: float
    n: int

    @property
    def least(self) -> float:
        """The smallest p that `n` pairs can give."""
        return min(1.0, 2.0 ** (1 - self.n))

    def enough(self, alpha: float = 0.05) -> int:
        """Return the number of pairs from which p < alpha is possible."""
        return math.floor(1 - math.log2(alpha)) + 1 if 2.0 ** (1 - self.n) >= alpha else self.n


def sign_flip(one: Sequence[float], other: Sequence[float]) -> SignFlip:
    """Test whether two methods differ: the exact test over all sign vectors of the paired differences.

    Law: under the null hypothesis each difference is as likely as its negative, so all 2^n sign flips are equally
    likely. p is the share of flips whose sum is at least as far from 0 as the observed sum. The false positive rate
    is at most alpha, for every distribution.

    - Where a run diverged, ranks replace the sizes of the differences (Wilcoxon's signed-rank test).
    - Above 20 pairs a normal distribution approximates the sum of the flips.

    Args:
        one: values of one method, a value per seed.
        other: values of the other method on the same seeds.
    Returns:
        SignFlip(p, n).
    Raises:
        BadInput: the lists are empty or differ in length.
        MissingExtra: a run diverged, or there are more than 20 pairs, and scipy is not installed.
    Source: Fisher 1935, section 21; Wilcoxon 1945.
    """
    if len(one) != len(other) or not one:
        raise BadInput(
            f"a paired test needs equally many values of both, 1 or more, not {len(one)} and {len(other)}."
        )
    differences = np.array([_difference(a, b) for a, b in zip(one, other, strict=True)])
    if not np.isfinite(differences).all():
        differences = np.sign(differences) * _scipy().rankdata(np.abs(differences))
    observed = abs(differences.sum())
    slack = 1e-12 * np.abs(differences).sum()  # the order of a sum changes its rounding
    n = len(differences)
    if n <= FLIPS:
        sums = np.zeros(1)
        for difference in differences:
            sums = np.concatenate([sums + difference, sums - difference])
        return SignFlip(float(np.mean(np.abs(sums) >= observed - slack)), n)
    scale = float(np.sqrt(np.square(differences).sum()))
    return SignFlip(2 * float(_scipy().norm.sf(observed / scale)) if scale else 1.0, n)


def _difference(a: float, b: float) -> float:
    return 0.0 if a == b else a - b  # two diverged runs are equal


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Return adjusted p-values: with them, the probability of any false positive is at most alpha (Holm 1979)."""
    adjusted, worst = {}, 0.0
    for place, (name, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        worst = max(worst, min(1.0, (len(p) - place) * value))
        adjusted[name] = worst
    return {name: adjusted[name] for name in p}


def probability_better(one: Sequence[float], other: Sequence[float]) -> float:
    """Return P(A > B) + P(A = B) / 2 over all pairs of runs: 0.5 for equal methods.

    Args:
        one: values of A.
        other: values of B.
    Returns:
        A probability.
    Raises:
        BadInput: one of them is empty.
    Source: Mann and Whitney 1947; Agarwal et al. 2021 (arXiv 2108.13264), section 4.3.
    """
    if not one or not other:
        raise BadInput("the probability that one method is better needs 1 run or more of each.")
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in product(one, other)) / (len(one) * len(other))


def probability_best(results: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return for each method the share of seeds on which it is the best; ties are shared. Seeds are paired."""
    share = dict.fromkeys(results, 0.0)
    rounds = list(zip(*results.values(), strict=True))
    for values in rounds:
        best = [name for name, value in zip(results, values, strict=True) if value == max(values)]
        for name in best:
            share[name] += 1 / (len(best) * len(rounds))
    return share


@dataclass(frozen=True)
class Reaching:
    """The Kaplan-Meier estimate of the share of runs that have reached a target by each of `times`, with bounds."""

    times: tuple[float, ...]
    share: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def median(self) -> float:
        """The time by which half of the runs have reached the target; inf where fewer ever do."""
        return next(
            (time for time, share in zip(self.times, self.share, strict=True) if share >= 0.5 - 1e-12), math.inf
        )


def time_to_target(times: Sequence[float | None], ends: Sequence[float]) -> Reaching:
    """Estimate how long runs take to reach a target, counting those that never do.

    Args:
        times: when each run reached the target; None where it did not.
        ends: when each run ended. A run that ended before the target is censored there. A run that diverged would
            never have reached it: give it the longest end of all.
    Returns:
        Reaching, with log-log intervals of Greenwood's variance. At a share of 1 that variance is 0; the lower
        bound there is Clopper and Pearson's (1934).
    Raises:
        BadInput: there are no runs.
        MissingExtra: scipy is not installed.
    Source: Kaplan and Meier 1958.
    """
    if not times:
        raise BadInput("a time to a target needs 1 run or more.")
    reached = [time for time in times if time is not None]
    censored = [end for time, end in zip(times, ends, strict=True) if time is None]
    if not reached:
        return Reaching((), (), (), ())
    stats = _scipy()
    cdf = stats.ecdf(stats.CensoredData(uncensored=reached, right=censored)).cdf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no variance at a share of 0 or 1: filled in below
        bounds = cdf.confidence_interval(LEVEL, method="log-log")
    steps = [i for i, time in enumerate(cdf.quantiles) if time in reached]

    def column(values: np.ndarray, missing: float) -> tuple[float, ...]:
        return tuple(float(np.nan_to_num(values[i], nan=missing)) for i in steps)

    share, low = column(cdf.probabilities, 0.0), column(bounds.low.probabilities, 0.0)
    # At a share of 1 the log-log interval is undefined: use the exact lower bound of n successes in n runs.
    at_one = max([*low, ((1 - LEVEL) / 2) ** (1 / len(reached))])
    low = tuple(at_one if part >= 1 else bound for part, bound in zip(share, low, strict=True))
    times_reached = tuple(float(cdf.quantiles[i]) for i in steps)
    return Reaching(times_reached, share, low, column(bounds.high.probabilities, 1.0))


def expected_best(scores: Sequence[float], budget: int) -> float:
    """Return the expected best validation score of `budget` points, drawn without replacement from `scores`.

    Law: sum_i x_(i) [C(i, b) - C(i-1, b)] / C(n, b), x_(1) <= ... <= x_(n).

    Args:
        scores: one per point that was tried.
        budget: number of points drawn.
    Returns:
        The expectation.
    Raises:
        BadInput: the budget is not between 1 and the number of scores.
    Source: Dodge et al. 2019 (arXiv 1909.03004), in the unbiased form of Tang et al. 2020 (arXiv 2004.14333).
    """
    if not 1 <= budget <= len(scores):
        raise BadInput(f"a budget of tuning points is 1 to {len(scores)}, the number tried, not {budget}.")
    ways = math.comb(len(scores), budget)
    best = 0.0
    for place, score in enumerate(sorted(scores), start=1):
        share = (math.comb(place, budget) - math.comb(place - 1, budget)) / ways
        best += share * score if share else 0.0
    return best


def guessing_limit(chance: float, targets: int | None = None) -> float:
    """Return the accuracy up to which a result may be luck: `chance` plus the larger of two margins.

    - A twentieth of the way from guessing to 100%.
    - Three standard deviations of a mean over `targets` guesses, if that number is known.
    """
    spread = 3 * math.sqrt(chance * (1 - chance) / targets) if targets else 0.0
    return chance + max(0.05 * (1 - chance), spread)


def _scipy() -> Any:
    return require("scipy.stats", "This statistic", "study")
