"""Searches spend the points they declare, within their spans, and are functions of their seed and what was tried."""

from __future__ import annotations

import builtins
import math
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gradcost.cli.compare import rates
from gradcost.results.search import TPE, Grid, Search, Sobol

ENDS = st.tuples(st.floats(1e-8, 1e8), st.floats(1.01, 1e6)).map(lambda x: (x[0], x[0] * x[1]))
SPANS = st.lists(ENDS, min_size=1, max_size=4).map(
    lambda ends: tuple((f"h{i}", low, high) for i, (low, high) in enumerate(ends))
)


def spent(search: Search, merits: Any = lambda point: 0.0) -> list[dict[str, float]]:
    tried = []
    while (point := search.ask(tried)) is not None:
        tried.append((point, merits(point)))
    return [point for point, _ in tried]


@settings(deadline=None)
@given(ENDS, st.integers(1, 30))
def test_a_grid_rises_evenly_in_the_logarithm_to_two_digits(ends: tuple[float, float], points: int):
    low, high = ends
    shares = [i / (points - 1) for i in range(points)] if points > 1 else [0.5]
    exact = [low * (high / low) ** share for share in shares]
    assume(len({f"{x:.2g}" for x in exact}) == points)
    grid = Grid(low, high, points)
    values = grid.values()
    assert spent(grid) == [{"lr": x} for x in values]
    assert list(values) == sorted(values)
    assert values == pytest.approx(exact, rel=0.051)  # two digits: half a unit of the second
    assert all(float(f"{x:.2g}") == x for x in values)


def test_the_command_line_and_a_study_have_one_grid():
    assert rates("1e-4:10", 11) == Grid(1e-4, 10, 11).values()
    assert rates("1e-4:10", 11)[:4] == (0.0001, 0.00032, 0.001, 0.0032)
    assert rates("1:1", 5) == (1.0,)


@settings(max_examples=30, deadline=None)
@given(SPANS, st.integers(1, 40), st.integers(0, 2**31))
def test_sobol_spends_its_points_within_its_spans(spans: Any, points: int, seed: int):
    search = Sobol(points, seed, spans)
    found = spent(search)
    assert len(found) == points
    assert found == list(search.design()) == list(Sobol(points, seed, spans).design())
    for point in found:
        assert list(point) == [name for name, _, _ in spans]
        assert all(low <= point[name] <= high for name, low, high in spans)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5), st.integers(0, 2**31), st.integers(1, 4))
def test_each_equal_part_of_a_span_holds_one_of_sobols_points(power: int, seed: int, spans: int):
    """Each span is so wide that three digits do not carry a point over the border of its part: but for those near."""
    n = 2**power
    found = Sobol(n, seed, tuple((f"h{i}", 1e-30, 1e30) for i in range(spans))).design()
    for name in found[0]:
        places = [(math.log10(point[name]) + 30) / 60 * n for point in found]
        near = [place for place in places if abs(place - round(place)) < 1e-3 * n]
        assume(not near)
        assert sorted(int(place) for place in places) == list(range(n))


def test_seeds_give_other_points():
    spans = (("lr", 1e-4, 1.0), ("eps", 1e-5, 1e-2))
    assert Sobol(8, 0, spans).design() != Sobol(8, 1, spans).design()
    pytest.importorskip("optuna", reason="Optuna is not installed: gradcost[optuna]")
    assert spent(TPE(8, 0, spans)) != spent(TPE(8, 1, spans))


@settings(max_examples=8, deadline=None)
@given(SPANS, st.integers(1, 15), st.integers(0, 2**31), st.lists(st.floats(), min_size=15, max_size=15))
def test_tpe_spends_its_points_within_its_spans_whatever_came_of_them(
    spans: Any, points: int, seed: int, merits: list[float]
):
    """NaN and infinities among the merits, too: runs diverge."""
    pytest.importorskip("optuna", reason="Optuna is not installed: gradcost[optuna]")
    search, tried = TPE(points, seed, spans, startup=3), []
    while (point := search.ask(tried)) is not None:
        assert point == search.ask(list(tried))
        assert all(low <= point[name] <= high for name, low, high in spans)
        tried.append((point, merits[len(tried)]))
    assert len(tried) == points


def test_tpe_learns():
    """A parabola in log lr with its top at 0.01: the points it chooses itself lie nearer than those it drew."""
    pytest.importorskip("optuna", reason="Optuna is not installed: gradcost[optuna]")
    far = []
    for seed in range(5):
        points = spent(
            TPE(40, seed, (("lr", 1e-6, 1e2),), startup=10), lambda point: -(math.log10(point["lr"] / 0.01) ** 2)
        )
        far.append([abs(math.log10(point["lr"] / 0.01)) for point in points])
    drawn = sum(sum(run[:10]) for run in far) / 50
    chosen = sum(sum(run[20:]) for run in far) / 100
    assert chosen < drawn / 2


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Grid(1.0, 0.1, 3), "the span of lr goes from above 0 to as much or more"),
        (lambda: Grid(0.0, 0.1, 3), "the span of lr goes from above 0"),
        (lambda: Grid(1.0, 1.1, 11), "11 points between 1 and 1.1 are alike to two digits"),
        (lambda: Grid(0.1, 1.0, 0), "1 point or more, not 0"),
        (lambda: Sobol(4, 0, (("a", 1.0, 1.0),)), "three digits tell nothing apart between 1.0 and 1.0"),
        (lambda: Sobol(4, 0, ()), "over 1 span or more"),
        (lambda: Sobol(4, 0, (("a", 1.0, 2.0), ("a", 1.0, 2.0))), "each of a name of its own, not a, a"),
        (lambda: Sobol(4, -1, (("a", 1.0, 2.0),)), "a seed is 0 or more, not -1"),
        (lambda: TPE(4, 0, (("a", 1.0, math.inf),)), "the span of a goes"),
        (lambda: TPE(4, 0, (("a", 1.0, 2.0),), startup=0), "startup is 1 point or more"),
    ],
)
def test_a_search_that_cannot_be_is_refused(make: Any, told: str):
    with pytest.raises(ValueError, match=told):
        make()


@pytest.mark.parametrize(
    ("search", "missing", "extra"),
    [(TPE(4, 0, (("a", 1.0, 2.0),)), "optuna", "optuna"), (Sobol(4, 0, (("a", 1.0, 2.0),)), "scipy", "study")],
)
def test_what_is_not_installed_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, search: Search, missing: str, extra: str
):
    imported = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == missing:
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf"gradcost\[{extra}\]"):
        search.ask([])
