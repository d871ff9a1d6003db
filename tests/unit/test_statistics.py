"""The statistics of few seeds against known truth: simulated, enumerated or published."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gradcost.results.statistics import (
    expected_best,
    interval,
    probability_best,
    probability_better,
    sign_flip,
    time_to_target,
)

LAWS = {
    "normal": (lambda r, n: r.normal(size=n), 0.0),
    "skewed": (lambda r, n: r.lognormal(sigma=1.0, size=n), 1.0),
    "exponential": (lambda r, n: r.exponential(size=n), math.log(2)),
    "accuracy": (lambda r, n: r.beta(18, 2, size=n), 0.9127414),
}


def draws(name: str, n: int, simulations: int) -> tuple[np.ndarray, float]:
    draw, truth = LAWS[name]
    generator = np.random.Generator(np.random.Philox(key=[n, sorted(LAWS).index(name)]))
    return np.stack([draw(generator, n) for _ in range(simulations)]), truth


@pytest.mark.parametrize("n", [5, 10])
@pytest.mark.parametrize("name", LAWS)
def test_intervals_cover_the_truth_as_often_as_stated(name: str, n: int):
    simulated, truth = draws(name, n, 10_000)
    covered = np.mean([(found := interval(list(row))).low <= truth <= found.high for row in simulated])
    assert 0.93 <= covered <= 0.97
    stated = interval(list(simulated[0])).confidence
    assert abs(covered - stated) <= 4 * math.sqrt(stated * (1 - stated) / 10_000) + 0.005  # for the interpolation


def test_a_percentile_bootstrap_of_five_would_not():
    simulated, truth = draws("normal", 5, 2000)
    picks = np.random.Generator(np.random.Philox(key=5)).integers(5, size=(400, 5))
    means = simulated[:, picks].mean(-1)
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    assert np.mean((low <= truth) & (truth <= high)) < 0.88


def test_few_values_have_a_low_confidence():
    assert interval([1.0]).confidence == 0
    assert interval([3.0, 1.0, 2.0]) == type(interval([1.0]))(2.0, 1.0, 3.0, 0.75, 3)
    assert interval([5.0, 4.0, 3.0, 2.0, 1.0]).confidence == pytest.approx(0.9375)
    with pytest.raises(ValueError, match="needs 1 value or more"):
        interval([])


def test_a_run_that_diverged_is_the_worst_one():
    found = interval([0.9, 0.8, -math.inf, 0.85, 0.7])
    assert (found.median, found.low, found.high) == (0.8, -math.inf, 0.9)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
@example([0.0] * 3 + [999999.9999999924] * 4)  # interpolation between equal values rounds
def test_an_interval_holds_its_median_whatever_the_order(values: list[float]):
    found = interval(values)
    assert found.low <= found.median <= found.high
    assert interval(values[::-1]) == found


@pytest.mark.parametrize("n", [5, 10])
@pytest.mark.parametrize("name", LAWS)
def test_the_sign_flip_test_finds_no_difference_where_there_is_none(name: str, n: int):
    one, _ = draws(name, n, 10_000)  # 50 of 1,024 flips lie in the 5% tails: 4.88%, plus 0.2% for the simulation
    other, _ = draws(name, n + 100, 10_000)
    false = np.mean([sign_flip(list(a), list(b[:n])).p <= 0.05 for a, b in zip(one, other, strict=True)])
    assert false <= 0.055
    if n == 10:
        assert false >= 0.03  # the test has power


def test_five_seeds_cannot_give_a_smaller_p_than_one_in_sixteen():
    found = sign_flip([9.0, 8.0, 9.0, 8.0, 9.0], [1.0, 1.0, 1.0, 1.0, 1.5])
    assert found.p == found.least == 0.0625
    assert found.enough() == 6
    assert sign_flip([1.0] * 6, [0.0] * 6).p == pytest.approx(2 / 64)


def test_the_sign_flip_test_is_wilcoxons_where_a_run_diverged():
    from scipy import stats

    one, other = [0.9, 0.8, 0.95, 0.7, 0.6, 0.91], [0.5, 0.6, -math.inf, 0.72, 0.1, 0.3]
    ranks = stats.wilcoxon([0.4, 0.2, 9.0, -0.02, 0.5, 0.61], method="exact").pvalue  # pyright: ignore[reportAttributeAccessIssue]
    assert sign_flip(one, other).p == pytest.approx(float(ranks))
    assert sign_flip([-math.inf], [-math.inf]).p == 1.0


def test_many_pairs_agree_with_students_test():
    generator = np.random.Generator(np.random.Philox(key=3))
    one, other = generator.normal(0.4, 1, 40), generator.normal(0, 1, 40)
    from scipy import stats

    assert sign_flip(list(one), list(other)).p == pytest.approx(stats.ttest_rel(one, other).pvalue, abs=0.02)


def test_who_is_better_and_who_is_best():
    assert probability_better([3.0, 2.0], [1.0, 2.0]) == pytest.approx(3.5 / 4)
    assert probability_better([1.0], [-math.inf]) == 1.0
    assert probability_best({"a": [1.0, 3.0], "b": [2.0, 3.0]}) == {"a": 0.25, "b": 0.75}


def test_a_time_to_a_target_counts_the_runs_that_never_reach_it():
    found = time_to_target([2.0, 5.0, None, 9.0], [10.0, 10.0, 7.0, 10.0])
    assert found.times == (2.0, 5.0, 9.0)
    assert found.share == pytest.approx((0.25, 0.5, 1.0))  # the run censored at 7 leaves one at risk
    assert all(low <= share <= high for low, share, high in zip(found.low, found.share, found.high, strict=True))
    assert found.median == 5.0
    assert time_to_target([None, None], [4.0, 4.0]).median == math.inf


def test_where_every_run_reaches_the_target_the_bound_is_exact():
    found = time_to_target([1.0, 2.0, 3.0, 4.0, 5.0], [9.0] * 5)
    assert list(found.low) == sorted(found.low)
    assert found.low[-1] == pytest.approx(0.025 ** (1 / 5))
    assert found.high[-1] == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_the_expected_best_of_all_points_is_the_best_of_one_the_mean(scores: list[float]):
    assert expected_best(scores, len(scores)) == pytest.approx(max(scores))
    assert expected_best(scores, 1) == pytest.approx(sum(scores) / len(scores))
    best = [expected_best(scores, budget) for budget in range(1, len(scores) + 1)]
    assert best == pytest.approx(sorted(best))
