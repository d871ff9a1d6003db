"""What a handful of seeds can say: exact where few numbers allow it, and a sentence where they do not.

A run that diverged is the worst result, never a missing one: -inf where more is better. So everything here goes
by ranks and order where it must, and no value is dropped.
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
FLIPS = 20  # pairs up to which all sign vectors are gone through: 2^20 of them


@dataclass(frozen=True)
class Interval:
    """A median over `n` values with [low, high] about it; confidence: the chance that such an interval covers the
    median of what was drawn from: see `interval` for how nearly."""

    median: float
    low: float
    high: float
    confidence: float
    n: int


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The median with a distribution-free interval between order statistics.

    [x_(k), x_(n+1-k)] covers the median with probability 1 - 2 P(B <= k - 1), B ~ Binomial(n, 1/2), exactly, for
    every continuous distribution. Between two k it is interpolated, which is close to that for most: of seeds that
    either learn or fail seven or ten cover 91 to 93% (simulated with Beta(0.1, 0.1)). With n = 5 the widest one,
    least to greatest, covers 93.75%; with fewer it covers less, and `confidence` says so. A percentile bootstrap of
    five values covers about 83%, and Student's interval of the mean fails for skewed ones.

    Source: Hettmansperger and Sheather 1986 (Statistics and Probability Letters 4), equation 2.2. Raises: ValueError
    without values.
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
    """A paired test's two-sided p over `n` pairs; least: the smallest p that so many pairs can give."""

    p: float
    n: int

    @property
    def least(self) -> float:
        return min(1.0, 2.0 ** (1 - self.n))

    def enough(self, alpha: float = 0.05) -> int:
        """How many pairs could give p < alpha: with fewer, no difference is large enough."""
        return math.floor(1 - math.log2(alpha)) + 1 if 2.0 ** (1 - self.n) >= alpha else self.n


def sign_flip(one: Sequence[float], other: Sequence[float]) -> SignFlip:
    """Are two methods alike? The exact test over all sign vectors of the paired differences.

    Under the null hypothesis each difference is as likely as its negative, so all 2^n flips are alike likely: p is
    the share of them whose sum is at least as far from 0 as the one that was seen. Its false positive rate is at
    most alpha, without an assumption on the distribution. Where a run diverged, the sizes of the differences are
    replaced by their ranks (Wilcoxon's signed-rank test). Above 20 pairs the sum of the
    flips is taken for normal, which it nearly is by then.

    Source: Fisher 1935, section 21; Wilcoxon 1945. Raises: ValueError where the lists are not of one length or empty.
    """
    if len(one) != len(other) or not one:
        raise BadInput(f"a paired test needs as many values of each, and 1 or more: not {len(one)} and {len(other)}.")
    differences = np.array([_difference(a, b) for a, b in zip(one, other, strict=True)])
    if not np.isfinite(differences).all():
        differences = np.sign(differences) * _scipy().rankdata(np.abs(differences))
    seen = abs(differences.sum())
    slack = 1e-12 * np.abs(differences).sum()  # sums of the same numbers in another order
    n = len(differences)
    if n <= FLIPS:
        sums = np.zeros(1)
        for difference in differences:
            sums = np.concatenate([sums + difference, sums - difference])
        return SignFlip(float(np.mean(np.abs(sums) >= seen - slack)), n)
    scale = float(np.sqrt(np.square(differences).sum()))
    return SignFlip(2 * float(_scipy().norm.sf(seen / scale)) if scale else 1.0, n)


def _difference(a: float, b: float) -> float:
    return 0.0 if a == b else a - b  # two runs that diverged are alike


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted so that the chance of any false positive among them is at most alpha. (Holm 1979.)"""
    adjusted, worst = {}, 0.0
    for place, (name, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        worst = max(worst, min(1.0, (len(p) - place) * value))
        adjusted[name] = worst
    return {name: adjusted[name] for name in p}


def probability_better(one: Sequence[float], other: Sequence[float]) -> float:
    """P(A > B) + P(A = B) / 2 over all pairs of runs: 0.5 for methods that are alike.

    Source: Mann and Whitney 1947; Agarwal et al. 2021 (arXiv 2108.13264), section 4.3. Raises: ValueError when empty.
    """
    if not one or not other:
        raise BadInput("the probability that one is better needs 1 run or more of each.")
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in product(one, other)) / (len(one) * len(other))


def probability_best(results: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """For each method the share of seeds on which it is the best of all, ties shared: seeds are paired."""
    share = dict.fromkeys(results, 0.0)
    rounds = list(zip(*results.values(), strict=True))
    for values in rounds:
        best = [name for name, value in zip(results, values, strict=True) if value == max(values)]
        for name in best:
            share[name] += 1 / (len(best) * len(rounds))
    return share


@dataclass(frozen=True)
class Reaching:
    """The Kaplan-Meier estimate of the share of runs that have reached a target by each of `times`."""

    times: tuple[float, ...]
    share: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def median(self) -> float:
        """The time by which half of the runs have reached it; inf where they never did."""
        return next(
            (time for time, share in zip(self.times, self.share, strict=True) if share >= 0.5 - 1e-12), math.inf
        )


def time_to_target(times: Sequence[float | None], ends: Sequence[float]) -> Reaching:
    """How long runs take to a target, counting those that never came there.

    times: when each reached it, None where it did not; ends: when each run's watch ended. One that stopped early and
    well is censored at its end; one that diverged never would have come there: give it the longest end of all.

    Source: Kaplan and Meier 1958; the log-log interval of Greenwood's variance, and at a share of 1, where there is
    none, Clopper and Pearson's lower end (1934). Raises: ValueError when empty.
    """
    if not times:
        raise BadInput("a time to a target needs 1 run or more.")
    reached = [time for time in times if time is not None]
    censored = [end for time, end in zip(times, ends, strict=True) if time is None]
    if not reached:
        return Reaching((), (), (), ())
    stats = _scipy()
    found = stats.ecdf(stats.CensoredData(uncensored=reached, right=censored)).cdf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no variance at a share of 0 or 1: filled in below
        bounds = found.confidence_interval(LEVEL, method="log-log")
    steps = [i for i, time in enumerate(found.quantiles) if time in reached]

    def column(values: np.ndarray, missing: float) -> tuple[float, ...]:
        return tuple(float(np.nan_to_num(values[i], nan=missing)) for i in steps)

    share, low = column(found.probabilities, 0.0), column(bounds.low.probabilities, 0.0)
    # Where all have reached it the log-log interval is undefined: the exact one of so many of so many stands there.
    everyone = max([*low, ((1 - LEVEL) / 2) ** (1 / len(reached))])
    low = tuple(everyone if part >= 1 else bound for part, bound in zip(share, low, strict=True))
    times_reached = tuple(float(found.quantiles[i]) for i in steps)
    return Reaching(times_reached, share, low, column(bounds.high.probabilities, 1.0))


def expected_best(scores: Sequence[float], budget: int) -> float:
    """The expected best validation score of `budget` points drawn without replacement from those that were tried.

    Law: sum_i x_(i) [C(i, b) - C(i-1, b)] / C(n, b), x_(1) <= ... <= x_(n).

    Source: Dodge et al. 2019 (arXiv 1909.03004), in the unbiased form of Tang et al. 2020 (arXiv 2004.14333). Raises:
    ValueError when the budget is not between 1 and the number of scores.
    """
    if not 1 <= budget <= len(scores):
        raise BadInput(f"{len(scores)} points were tried: a budget is 1 to that many, not {budget}.")
    ways = math.comb(len(scores), budget)
    best = 0.0
    for place, score in enumerate(sorted(scores), start=1):
        share = (math.comb(place, budget) - math.comb(place - 1, budget)) / ways
        best += share * score if share else 0.0
    return best


def _scipy() -> Any:
    return require("scipy.stats", "This statistic", "study")
