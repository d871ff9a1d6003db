"""Two results folders side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from report_records import results_of

from gradcost.core.metric import ACCURACY, Metric
from gradcost.results.difference import COLUMNS, differences, settings
from gradcost.results.records import Results, read
from in_process import inside

FOLDER = Path(__file__).parents[2] / "docs" / "results" / "equal-flops-1"
METHODS = 10


@pytest.fixture(scope="module")
def first() -> Results:
    return read(FOLDER)


def shifted(results: Results, by: float, without: str = "") -> Results:
    """Return results whose final scores are better by `by`, without the final runs of one seed."""
    trials = [
        replace(run, test=replace(run.test, score=(run.test.score or 0.0) + by * run.seed)) if run.test else run
        for run in results.trials
        if f"{run.phase} {run.seed}" != without
    ]
    return replace(results, trials=tuple(trials))


def test_a_folder_differs_from_itself_in_nothing(first: Results):
    assert settings(first, first) == []
    rows = differences(first, first)
    assert len(rows) == METHODS
    for row in rows:
        cells = dict(zip(COLUMNS, row.cells(ACCURACY), strict=True))
        assert cells["first"] == cells["second"]
        assert cells["second - first"] == "0 [0, 0] points"
        assert {cells[name] for name in ("memory", "FLOPs", "ms")} == {"same"}


def test_scores_are_paired_by_seed(first: Results):
    """Seed s is better by s/1000 in the second folder, which lacks seed 8: the middle of 1 to 7 is 4."""
    second = shifted(first, 0.001, without="final 8")
    rows = {row.method: row for row in differences(first, second)}
    change = rows["backprop, SGD"].paired
    assert change is not None
    assert change.n == 7
    assert change.median == pytest.approx(0.004)
    assert change.low < change.median < change.high
    assert rows["backprop, SGD"].cells(ACCURACY)[3].startswith("+0.4 [+0.1")


def test_a_metric_that_is_better_when_lower_has_its_own_sign(first: Results):
    loss = Metric("loss", lower_is_better=True)
    (row, *_) = differences(first, shifted(first, 0.001))
    assert row.cells(loss)[3].startswith("-0.0045 [")  # a greater score is a lower loss


def test_what_differs_is_named_and_one_sided_methods_are_listed(first: Results):
    other = replace(
        first,
        study=replace(first.study, steps=7, methods=("backprop, SGD",)),
        environment=first.environment | {"torch": "9.9"},
        trials=tuple(run for run in first.trials if run.method == "backprop, SGD"),
        costs=tuple(replace(cost, peak_bytes=2 * (cost.peak_bytes or 0)) for cost in first.costs[:1]),
    )
    named = {name: (one, two) for name, one, two in settings(first, other)}
    assert set(named) == {"methods", "steps", "torch"}
    assert named["torch"][1] == "9.9"
    rows = {row.method: row.cells(ACCURACY) for row in differences(first, other)}
    assert len(rows) == METHODS
    assert rows["MeZO, SGD, decay"][2:] == ["–", "–", "–", "–", "–"]


def test_on_the_command_line(tmp_path: Path):
    ran = inside("diff", str(FOLDER), str(FOLDER), folder=tmp_path)
    assert ran.returncode == 0
    assert "The settings and versions of both are the same." in ran.stdout
    found = json.loads(inside("diff", str(FOLDER), str(FOLDER), "--json", folder=tmp_path).stdout)
    assert len(found["methods"]) == METHODS
    assert inside("diff", str(FOLDER), "nothing", folder=tmp_path).returncode == 2


def test_a_run_that_diverged_is_no_improvement(tmp_path: Path):
    """Five of six runs of the second folder diverged, and the sixth was 10 points better: once "+10 points"."""
    before = results_of(tmp_path / "a", {"method": "mezo()", "accuracies": [0.8, 0.81, 0.82, 0.83, 0.84, 0.85]})
    after = results_of(tmp_path / "b", {"method": "mezo()", "accuracies": [0.9, None, None, None, None, None]})
    ((row,), (back,)) = differences(before, after), differences(after, before)
    assert row.cells(ACCURACY)[3] == "-infinite [-infinite, +10] points"
    assert back.cells(ACCURACY)[3] == "+infinite [-10, +infinite] points"
    loss = Metric("loss", lower_is_better=True)
    assert row.cells(loss)[3] == "+infinite [-0.1, +infinite]"
