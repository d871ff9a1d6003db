"""Claims of a paper: each rule of the verdicts at its edge, and the page."""

from __future__ import annotations

from dataclasses import replace
from math import exp, inf, log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradcost.papers.claims import RULES, Claim, Evidence, Glance, Published, Verdict, claims_page, outcome, verdict
from gradcost.papers.intervals import format_interval, measured_interval
from gradcost.results.records import Results, StudyRecord, trial_record
from gradcost.results.statistics import interval

HOLDS, DIRECTION, FAILS, INCONCLUSIVE = Verdict


def claim(published: Published, reference: float | None = 1.0, name: str = "speed", is_ratio: bool = False) -> Claim:
    return Claim(name, "It is twice as fast.", "section 3", "ratio of seconds", published, reference, is_ratio)


def around(low: float, high: float) -> tuple[float, ...]:
    """Six values, so that their 95% interval is close to [low, high] and inside it."""
    return (low, low, low, high, high, high)


TWICE = claim(Published(2.0))
TWO_TO_FOUR = claim(Published(2.0, 4.0))
FASTER = claim(Published(1.0, inf))
LOSS = claim(Published(0.3, rounding=0.05), reference=2.303)  # below guessing
NOISY = claim(Published(0.3, error=0.2), reference=0.1)  # 0.3 - 1.96 * 0.2 is below the reference
EQUAL = claim(Published(0.5), reference=None)


@pytest.mark.parametrize(
    ("claimed", "values", "expected"),
    [
        (TWICE, around(1.5, 2.5), HOLDS),
        (TWICE, around(1.5, 1.99), DIRECTION),
        (TWICE, around(2.01, 2.5), DIRECTION),  # more than published is not as published
        (TWICE, around(0.9, 1.9), FAILS),
        (TWICE, around(0.5, 0.9), FAILS),
        (TWICE, around(0.9, 2.0), INCONCLUSIVE),
        (TWICE, around(1.0, 2.0), INCONCLUSIVE),  # touches the reference
        (TWICE, around(1.1, 2.1), HOLDS),
        (TWICE, around(1.1, 2.2), INCONCLUSIVE),  # wider than the effect, which is 1
        (TWICE, (2.0, 2.0), INCONCLUSIVE),  # two seeds
        (TWICE, (2.0, 2.0, 2.0), HOLDS),
        (TWICE, (1.5, 2.0, 2.5), INCONCLUSIVE),  # Student's interval is 0.76 to 3.24
        (TWICE, (), INCONCLUSIVE),
        (TWICE, (*around(1.5, 1.9), inf), INCONCLUSIVE),
        (TWO_TO_FOUR, around(3.0, 3.5), HOLDS),
        (TWO_TO_FOUR, around(3.9, 5.0), HOLDS),
        (TWO_TO_FOUR, around(4.1, 5.0), DIRECTION),
        (TWO_TO_FOUR, around(100, 200), DIRECTION),
        (TWO_TO_FOUR, around(0.9, 1.1), FAILS),
        (FASTER, around(1.001, 100), HOLDS),
        (FASTER, around(0.99, 100), INCONCLUSIVE),
        (FASTER, around(0.5, 1.0), FAILS),  # no faster is not faster
        (FASTER, (inf,) * 6, HOLDS),
        (FASTER, (5.0, 5.1, inf), HOLDS),
        (LOSS, around(0.3, 0.31), HOLDS),
        (LOSS, around(0.35, 0.36), HOLDS),
        (LOSS, around(0.351, 0.36), DIRECTION),
        (LOSS, around(0.2, 0.249), DIRECTION),
        (LOSS, around(2.2, 2.4), FAILS),
        (LOSS, (0.3, 0.31, 0.32, 0.33, 0.34, inf), INCONCLUSIVE),
        (LOSS, (inf,) * 6, FAILS),
        (NOISY, around(0.5, 0.6), DIRECTION),  # the published number is not above the reference itself
        (NOISY, around(0.7, 0.8), DIRECTION),
        (NOISY, around(0.05, 0.09), INCONCLUSIVE),
        (NOISY, around(-0.2, -0.1), FAILS),
        (EQUAL, around(0.4, 0.6), HOLDS),
        (EQUAL, around(0.51, 0.6), FAILS),
        (EQUAL, around(0.1, 0.7), INCONCLUSIVE),  # wider than the number
        (claim(Published(0.0), reference=None), around(-0.1, 0.1), HOLDS),
        (claim(Published(-1.0), reference=0.0), around(-1.2, -0.9), HOLDS),
        (claim(Published(-1.0), reference=0.0), around(-0.9, -0.8), DIRECTION),
        (claim(Published(-inf, 0.0), reference=0.0), around(-0.9, -0.8), HOLDS),
        (claim(Published(-inf, 0.0), reference=0.0), around(0.0, 0.1), FAILS),
    ],
)
def test_the_verdict_follows_the_rules_to_the_edge(claimed: Claim, values: tuple[float, ...], expected: Verdict):
    assert verdict(claimed, values) == expected


def test_the_error_of_the_published_number_decides_what_is_consistent_with_it():
    values = around(0.47, 0.5)
    assert verdict(claim(Published(0.332, rounding=0.0005), 2.303), values) == DIRECTION
    assert verdict(claim(Published(0.332, error=0.2), 2.303), values) == HOLDS
    assert Published(0.332, error=0.001, rounding=0.0005).interval == pytest.approx((0.33004, 0.33396))
    assert Published(0.332, error=0.0001, rounding=0.0005).interval == pytest.approx((0.3315, 0.3325))


def test_few_seeds_have_students_interval_extended_to_all_values():
    found = measured_interval((1.0, 2.0, 3.0))
    assert (found.median, found.n, found.confidence) == (2.0, 3, 0.95)
    assert (found.low, found.high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert (measured_interval((1, 1, 1, 1, 9)).low, measured_interval((1, 1, 1, 1, 9)).high)[1] == 9
    assert measured_interval((1.0, 2.0, inf)).high == inf
    assert measured_interval((1.5,)) == interval([1.5])
    assert measured_interval(range(8)) == interval(range(8))


@pytest.mark.parametrize("values", [(0.9, 1.0, 1.1), (0.8, 0.9, 1.0, 1.1), (1.0, 1.1, 0.9, 1.2, 0.8)])
def test_students_interval_is_that_of_scipy(values: tuple[float, ...]):
    stats = pytest.importorskip("scipy.stats")
    n, mean = len(values), sum(values) / len(values)
    low, high = stats.t.interval(0.95, n - 1, loc=mean, scale=stats.sem(values))
    found = measured_interval(values)
    assert (found.low, found.high) == pytest.approx((min(low, min(values)), max(high, max(values))), rel=1e-3)


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=5))
def test_the_interval_of_a_ratio_is_that_of_its_inverse(values: list[float]):
    found, inverse = (measured_interval(each, is_ratio=True) for each in (values, [1 / x for x in values]))
    assert (found.low, found.high) == pytest.approx((1 / inverse.high, 1 / inverse.low))
    assert 0 <= found.low <= min(values) <= max(values) <= found.high


def test_the_interval_of_a_ratio_is_students_of_its_logarithm():
    stats = pytest.importorskip("scipy.stats")
    logs = [log(x) for x in (4.0, 18.0, 30.0)]
    ends = [exp(x) for x in stats.t.interval(0.95, 2, loc=sum(logs) / 3, scale=stats.sem(logs))]
    found = measured_interval((4.0, 18.0, 30.0), is_ratio=True)
    assert (found.low, found.median, found.high) == pytest.approx((ends[0], 18.0, ends[1]), rel=1e-3)
    assert measured_interval((0.0, 2.0), is_ratio=True).low == 0  # as with an infinite value: all values
    assert measured_interval((1e-300, 1e300), is_ratio=True).high == inf


def test_an_interval_has_no_values_that_the_quantity_cannot_have():
    found = measured_interval((60.0, 90.0), bounds=(0.0, 100.0))
    assert (found.low, found.high) == (0.0, 100.0)
    assert measured_interval((60.0, 61.0, 60.0), bounds=(0.0, 100.0)) == measured_interval((60.0, 61.0, 60.0))


@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=5), st.floats(1.1, 9))
def test_the_verdict_on_a_ratio_is_that_on_its_inverse(values: list[float], published: float):
    one = claim(Published(published), is_ratio=True)
    other = claim(Published(1 / published), is_ratio=True)
    assert verdict(one, values) == verdict(other, [1 / x for x in values])


def test_a_claim_is_a_value_that_its_repr_creates():
    assert eval(repr(TWO_TO_FOUR)) == TWO_TO_FOUR
    assert [str(each.published) for each in (TWICE, TWO_TO_FOUR, FASTER)] == ["2", "2 to 4", "above 1"]
    assert str(Published(0.332, error=0.2)) == "0.332 (standard error 0.2)"
    assert str(Published(-inf, 0.5)) == "below 0.5"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Published(2.0, 1.0), "low <= high"),
        (lambda: Published(2.0, error=-1.0), "0 or more"),
        (lambda: claim(Published(0.5, 2.0)), "on one side"),
        (lambda: claim(Published(1.0)), "no effect has no direction"),
        (lambda: claims_page("P", Glance("", "", 0), [(TWICE, evidence()), (FASTER, evidence())]), "different names"),
    ],
)
def test_a_claim_that_cannot_be_judged_is_refused(wrong: object, message: str):
    with pytest.raises(ValueError, match=message):
        wrong()  # type: ignore[operator]


def evidence(*values: float, is_reduced: bool = False) -> Evidence:
    return Evidence(values, "gradcost reproduce p", "records", "10 steps", is_reduced)


def test_the_outcome_has_the_mark_of_a_reduced_scale():
    assert outcome(TWICE, evidence(2.0, 2.0, 2.0)) == "holds"
    assert outcome(TWICE, evidence(2.0, 2.0, 2.0, is_reduced=True)) == "holds (reduced scale)"
    assert outcome(TWICE, evidence()) == "inconclusive (not run)"
    assert format_interval((2.0,)) == "2, 1 seed"
    assert format_interval((1.0, 2.0, inf)) == "2 [1, infinite], 3 seeds"


def test_the_first_lines_of_a_page_have_the_threads_of_the_runs():
    runs = [{"trial": str(seed), "seed": seed, "seconds": 900.0, "environment": {"threads": 1}} for seed in (1, 2)]
    common = {"method": "a", "estimator": "-", "optimizer": "-", "phase": "final", "lr": 0.1, "steps": 3}
    trials = tuple(trial_record(common | {"status": "finished"} | run) for run in runs)
    environment: dict[str, str | int | float] = {"cpu": "fast", "threads": 2, "command": "gradcost study"}
    results = Results(
        StudyRecord("Digits()", "digits", "mlp", (), (1, 2), 1, 3, 0.8, "SGD", 32), environment, trials, (), ()
    )
    assert Glance.of("everything", results) == Glance("everything", "cpu fast, threads 1", 0.5)
    assert Glance.of("", replace(results, trials=())).hardware == "cpu fast, threads 2"
    assert Glance.of("", replace(results, environment={}, trials=())).hardware == "not recorded"


def test_the_page_has_every_claim_at_a_glance_and_in_full():
    fast = claim(Published(1.0, inf), name="always faster")
    claims = [(TWICE, evidence(1.9, 2.0, 2.1)), (fast, evidence(0.5, 0.5, 0.6, is_reduced=True))]
    page = claims_page("A paper", Glance("the MNIST rows", "2 cores", 1.234), claims, ["## More\n\ntext"])
    lines = page.splitlines()
    assert lines[:2] == ["# A paper", ""]
    assert "| scope | the MNIST rows |" in lines
    assert "| hardware | 2 cores |" in lines
    assert "| core-hours | 1.2 |" in lines
    assert "| *speed* | **holds** |" in lines
    assert "| *always faster* | **does not hold (reduced scale)** |" in lines
    assert page.index("## At a glance") < page.index("### speed") < page.index("### always faster")
    assert page.index("### always faster") < page.index("## More") < page.index("## Rules of the verdicts")
    for expected in (
        "section 3",
        "ratio of seconds",
        "| published | above 1 |",
        "| command | `gradcost reproduce p` |",
    ):
        assert expected in page
    assert "| measured here | 2 [1.75, 2.25], 3 seeds |" in lines
    assert "| scale | 10 steps (reduced) |" in lines
    assert all(f"- {rule}" in lines for rule in RULES)
    assert all(each.value in page for each in Verdict)
