"""Statistics for few seeds: exact confidence intervals, exact tests, and the smallest p-value that n seeds allow.

A diverged run has the worst value: -inf if higher is better, inf if lower is better. No run is dropped; `sign_flip`
uses ranks when a value is infinite.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

import numpy as np

from gradcost.core.errors import BadInput, require

LEVEL = 0.95  # default confidence of intervals
_EXACT_PAIRS = 20  # `sign_flip` enumerates all 2^n sign vectors up to this n


@dataclass(frozen=True)
class Interval:
    """The median of `n` values with its confidence interval [low, high].

    confidence: the probability that an interval computed in this way contains the median of the distribution.
    """

    median: float
    low: float
    high: float
    confidence: float
    n: int


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Return the median with a distribution-free interval between order statistics.

    Law: x_(k) is the k-th smallest of n values. For every continuous distribution, [x_(k), x_(n+1-k)] contains the
    median with probability (coverage) 1 - 2 P(B <= k - 1), where B ~ Binomial(n, 1/2).

    - If no k has a coverage of exactly `level`, the intervals of two neighbouring k are interpolated. The coverage is
      then approximate: 91 to 93% in a simulation of 7 or 10 seeds that learn or fail (Beta(0.1, 0.1), level 95%).
    - The widest interval is [minimum, maximum]. Its coverage is 93.75% for n = 5, and lower for fewer values.
    - Not used: the percentile bootstrap (coverage 83% for n = 5) and Student's interval (wrong for skewed values).

    Args:
        values: one per seed; -inf or inf for a run that diverged.
        level: the confidence to aim for.
    Returns:
        Interval. Its `confidence` is below `level` if n is too small.
    Raises:
        BadInput: there are no values.
    Source: Hettmansperger and Sheather 1986 (Statistics and Probability Letters 4), equation 2.2.
    """
    if not values:
        raise BadInput("an interval needs 1 value or more.")
    x, n = sorted(values), len(values)
    middle = float(median(x))
    # depth: the largest k with a coverage of `level` or more; 0 if there is none
    depth = max((k for k in range(1, n // 2 + 1) if _coverage(k, n) >= level), default=0)
    if depth == 0:
        return Interval(middle, x[0], x[-1], _coverage(1, n), n)
    if depth + 1 > n // 2:
        return Interval(middle, x[depth - 1], x[n - depth], _coverage(depth, n), n)
    outer, inner = _coverage(depth, n), _coverage(depth + 1, n)
    part = (outer - level) / (outer - inner)
    weight = (n - depth) * part / (depth + (n - 2 * depth) * part)
    low, high = (_between(x[a], x[b], weight) for a, b in ((depth - 1, depth), (n - depth, n - depth - 1)))
    return Interval(middle, low, high, level, n)


def _coverage(depth: int, n: int) -> float:
    """Return the probability that [x_(k), x_(n+1-k)] contains the median, for k = depth."""
    return _coverages(n)[depth - 1]


@cache
def _coverages(n: int) -> tuple[float, ...]:
    """Return `_coverage` for the depths 1 to n // 2; for 1 if n is 1."""
    found, total, ways = [], 0, 1  # ways: n over k
    for k in range(max(n // 2, 1)):
        total += ways
        ways = ways * (n - k) // (k + 1)
        found.append(max(0.0, 1 - total / 2 ** (n - 1)))
    return tuple(found)


def _between(outer: float, inner: float, weight: float) -> float:
    """Interpolate. The result lies between both values, also after rounding."""
    if math.isinf(outer) or math.isinf(inner):
        return outer
    return min(max((1 - weight) * outer + weight * inner, min(outer, inner)), max(outer, inner))


@dataclass(frozen=True)
class SignFlip:
    """Two-sided p-value of the sign-flip test over `n` pairs."""

    p: float
    n: int

    @property
    def least(self) -> float:
        """The smallest p that `n` pairs can give."""
        return min(1.0, 2.0 ** (1 - self.n))

    def enough(self, alpha: float = 0.05) -> int:
        """Return the smallest number of pairs that can give p < alpha, or `n` if that is larger."""
        return math.floor(1 - math.log2(alpha)) + 1 if 2.0 ** (1 - self.n) >= alpha else self.n


def sign_flip(one: Sequence[float], other: Sequence[float]) -> SignFlip:
    """Test whether two methods differ, with the exact sign-flip test of the paired differences.

    Law: under the null hypothesis each difference is as likely as its negative, so all 2^n sign flips are equally
    likely. p is the fraction of flips whose sum is at least as far from 0 as the observed sum. If p <= alpha counts
    as significant, the false positive rate is at most alpha, for every distribution.

    - If a run diverged, each absolute difference is replaced by its rank (Wilcoxon's signed-rank test).
    - Above 20 pairs the distribution of the sum is approximated by a normal distribution.

    Args:
        one: values of one method, one per seed.
        other: values of the other method on the same seeds.
    Returns:
        SignFlip(p, n).
    Raises:
        BadInput: the lists are empty or differ in length.
        MissingExtra: there are more than 20 pairs, and scipy is not installed.
    Source: Fisher 1935, section 21; Wilcoxon 1945.
    """
    if len(one) != len(other) or not one:
        raise BadInput(
            f"a paired test needs equally many values of both methods, 1 or more, not {len(one)} and {len(other)}."
        )
    differences = np.array([score_difference(a, b) for a, b in zip(one, other, strict=True)])
    if not np.isfinite(differences).all():
        differences = np.sign(differences) * _ranks(np.abs(differences))
    observed = abs(differences.sum())
    slack = 1e-12 * np.abs(differences).sum()  # tolerance for rounding, which depends on the order of a sum
    n = len(differences)
    if n <= _EXACT_PAIRS:
        sums = np.zeros(1)
        for difference in differences:
            sums = np.concatenate([sums + difference, sums - difference])
        return SignFlip(float(np.mean(np.abs(sums) >= observed - slack)), n)
    scale = float(np.sqrt(np.square(differences).sum()))
    return SignFlip(2 * float(_scipy().norm.sf(observed / scale)) if scale else 1.0, n)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value, from 1; equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def score_difference(a: float, b: float) -> float:
    """Return a - b; 0 for equal scores, also if both are infinite: two runs that diverged are equal."""
    return 0.0 if a == b else a - b


def probability_better(one: Sequence[float], other: Sequence[float]) -> float:
    """Return P(A > B) + P(A = B) / 2 over all pairs of runs: 0.5 for equal methods.

    Args:
        one: values of A.
        other: values of B.
    Returns:
        A probability.
    Raises:
        BadInput: `one` or `other` is empty.
    Source: Mann and Whitney 1947; Agarwal et al. 2021 (arXiv 2108.13264), section 4.3.
    """
    if not one or not other:
        raise BadInput("the probability that one method is better needs 1 run or more of each.")
    ordered = sorted(other)
    twice = sum(
        bisect_left(ordered, a) + bisect_right(ordered, a) for a in one
    )  # the smaller ones, and those not larger
    return twice / 2 / (len(one) * len(other))


def probability_best(results: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the fraction of seeds on which each method is best. A seed with k best methods counts 1/k for each.

    The values of all methods must be in the same order of seeds.
    """
    fractions = dict.fromkeys(results, 0.0)
    by_seed = list(zip(*results.values(), strict=True))
    for values in by_seed:
        best = [name for name, value in zip(results, values, strict=True) if value == max(values)]
        for name in best:
            fractions[name] += 1 / (len(best) * len(by_seed))
    return fractions


@dataclass(frozen=True)
class Reaching:
    """Kaplan-Meier estimate: the fraction `share[i]` of runs reaches a target by `times[i]`; bounds `low`, `high`."""

    times: tuple[float, ...]
    share: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def median(self) -> float:
        """The time by which half of the runs have reached the target; inf if fewer than half reach it."""
        return next(
            (time for time, share in zip(self.times, self.share, strict=True) if share >= 0.5 - 1e-12), math.inf
        )


def time_to_target(times: Sequence[float | None], ends: Sequence[float]) -> Reaching:
    """Estimate how long runs take to reach a target. Runs that do not reach it count as censored.

    Args:
        times: when each run reached the target; None where it did not.
        ends: when each run ended. A run that did not reach the target is censored at its end. For a diverged run
            give the latest end of all runs, because more time would not have helped.
    Returns:
        Reaching. Its bounds are log-log intervals with Greenwood's variance. If the share is 1, this variance
        is 0; the lower bound is then that of Clopper and Pearson (1934).
    Raises:
        BadInput: there are no runs.
        MissingExtra: scipy is not installed.
    Source: Kaplan and Meier 1958.
    """
    if not times:
        raise BadInput("the time to a target needs 1 run or more, and `times` is empty.")
    reached = [time for time in times if time is not None]
    censored = [end for time, end in zip(times, ends, strict=True) if time is None]
    if not reached:
        return Reaching((), (), (), ())
    stats = _scipy()
    cdf = stats.ecdf(stats.CensoredData(uncensored=reached, right=censored)).cdf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the bounds are NaN at a share of 0 or 1; replaced below
        bounds = cdf.confidence_interval(LEVEL, method="log-log")
    is_reached = set(reached).__contains__
    steps = [i for i, time in enumerate(cdf.quantiles) if is_reached(time)]

    def column(values: np.ndarray, missing: float) -> tuple[float, ...]:
        return tuple(float(np.nan_to_num(values[i], nan=missing)) for i in steps)

    share, low = column(cdf.probabilities, 0.0), column(bounds.low.probabilities, 0.0)
    # Lower bound at a share of 1: the exact one for n successes in n runs, or an earlier bound if that is higher.
    at_one = max([*low, ((1 - LEVEL) / 2) ** (1 / len(reached))])
    low = tuple(at_one if fraction >= 1 else bound for fraction, bound in zip(share, low, strict=True))
    times_reached = tuple(float(cdf.quantiles[i]) for i in steps)
    return Reaching(times_reached, share, low, column(bounds.high.probabilities, 1.0))


def expected_best(scores: Sequence[float], budget: int) -> float:
    """Return the expected maximum of `budget` validation scores, drawn without replacement from `scores`.

    Law: sum_i x_(i) C(i-1, b-1) / C(n, b), with b = budget, the n scores sorted as x_(1) <= ... <= x_(n), and the
    binomial coefficient C.

    Args:
        scores: one per hyperparameter setting that was tried.
        budget: number of scores drawn.
    Returns:
        The expectation.
    Raises:
        BadInput: the budget is not between 1 and the number of scores.
    Source: Dodge et al. 2019 (arXiv 1909.03004), in the unbiased form of Tang et al. 2020 (arXiv 2004.14333).
    """
    if not 1 <= budget <= len(scores):
        raise BadInput(f"budget must be between 1 and {len(scores)}, the number of scores, not {budget}.")
    ways = math.comb(len(scores), budget)
    best = 0.0
    for rank, score in enumerate(sorted(scores), start=1):
        probability = math.comb(rank - 1, budget - 1) / ways
        best += probability * score if probability else 0.0
    return best


def _scipy() -> Any:
    return require("scipy.stats", "This statistic", "study")
