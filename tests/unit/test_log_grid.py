"""A grid of learning rates: evenly spaced in the logarithm, two digits, within its range."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from report_records import trial, write_folder

from gradcost.cli.quantities import lr_range
from gradcost.core.errors import BadInput
from gradcost.results.records import read
from gradcost.results.tuning import final_rate, log_grid

ENDS = st.tuples(st.floats(1e-8, 1e8), st.floats(1.01, 1e6)).map(lambda x: (x[0], x[0] * x[1]))


@settings(deadline=None)
@given(ENDS, st.integers(1, 30))
def test_a_grid_rises_evenly_in_the_logarithm_to_two_digits(ends: tuple[float, float], points: int):
    low, high = ends
    shares = [i / (points - 1) for i in range(points)] if points > 1 else [0.5]
    exact = [low * (high / low) ** share for share in shares]
    assume(len({f"{x:.2g}" for x in exact}) == points)
    values = log_grid(low, high, points)
    assert list(values) == sorted(values)
    assert values == pytest.approx(exact, rel=0.051)  # two digits: half a unit of the second
    assert all(float(f"{x:.2g}") == x for x in values)


def test_the_command_line_reads_a_range():
    low, high = lr_range("1e-4:10")
    assert (low, high) == (1e-4, 10.0)
    assert log_grid(low, high, 11)[:4] == (0.0001, 0.00032, 0.001, 0.0032)


@pytest.mark.parametrize(
    ("low", "high", "points", "reason"),
    [
        (1.0, 0.1, 3, "LOW:HIGH with 0 < LOW <= HIGH, not 1.0:0.1"),
        (0.0, 0.1, 3, "not 0.0:0.1"),
        (0.1, float("inf"), 3, "not 0.1:inf"),
        (1.0, 1.1, 11, "11 points between 1 and 1.1 are not distinct to two digits"),
        (0.1, 1.0, 0, "1 point or more, not 0"),
        (1e-300, 1e300, 10**12, "points are not distinct to two digits"),
    ],
)
def test_an_impossible_grid_is_refused(low: float, high: float, points: int, reason: str):
    with pytest.raises(BadInput, match=reason):
        log_grid(low, high, points)


def test_the_rate_of_the_final_runs_has_an_asterisk_at_an_edge_of_the_tried_ones(tmp_path: Path):
    lines = [trial("inside", "tune", lr) for lr in (0.01, 0.1, 1.0)] + [trial("inside", "final", 0.1)]
    lines += [trial("at the edge", "tune", lr) for lr in (0.01, 0.1)] + [trial("at the edge", "final", 0.1)]
    results = read(write_folder(tmp_path / "made", lines))
    found = [final_rate(results, method) for method in ("inside", "at the edge", "not run")]
    assert found == ["0.1", "0.1 *", "–"]
