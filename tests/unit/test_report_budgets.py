"""Rankings at equal memory, FLOPs, seconds and steps, on constructed runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_records import cost, trial, write_folder

from gradcost.report import budgets, html
from gradcost.results.rankings import Ranking, Standing, final_curves, rankings
from gradcost.results.records import Results, read
from gradcost.results.statistics import interval
from gradcost.results.wording import size

STEPS = 100


def runs(method: str, curves: list[dict[int, float] | None], **costs: Any) -> list[dict[str, Any]]:
    """A method whose final runs have these accuracies by step; None is a run that diverged at step 40."""
    lines = [cost(method, costs.pop("peak", 1024), costs.pop("ms", 1.0), "Probing()", **costs)] if costs else []
    for seed, curve in enumerate(curves):
        points = {20: 0.5} if curve is None else curve
        seen = {"validation_step": list(points), "validation_accuracy": list(points.values())}
        status, steps = ("finished", STEPS) if curve is not None else ("diverged", 40)
        lines.append(trial(method, seed=seed, curve=seen, status=status, steps=steps))
    return lines


def results(tmp_path: Path, *methods: list[dict[str, Any]], **changes: Any) -> Results:
    lines = [line for lines in methods for line in lines]
    return read(write_folder(tmp_path, lines, **{"steps": STEPS, "seeds": [0, 1, 2, 3, 4], **changes}))


def by_name(found: Results) -> dict[str, Ranking]:
    return {ranking.name: ranking for ranking in rankings(found)}


def rising(end: float) -> dict[int, float]:
    return {50: end / 2, 100: end}


def test_an_accuracy_is_read_between_evaluations_from_guessing_on(tmp_path: Path):
    (curves,) = final_curves(results(tmp_path, runs("a", [{50: 0.5, 100: 0.9}], flops=1)))
    read_off = {step: curves.at(step)[0] for step in (0, 25, 50, 75, 100, 1000)}
    assert read_off == pytest.approx({0: 0.1, 25: 0.3, 50: 0.5, 75: 0.7, 100: 0.9, 1000: 0.9})


def test_a_run_that_diverged_is_the_worst_from_there_on(tmp_path: Path):
    (curves,) = final_curves(results(tmp_path, runs("a", [None], flops=1)))
    assert [curves.at(step)[0] for step in (20, 39.9, 40, 90)] == [0.5, 0.5, float("-inf"), float("-inf")]


def test_the_budget_is_what_every_method_covers_and_buys_steps_at_each_ones_price(tmp_path: Path):
    cheap = runs("cheap", [rising(0.6)] * 5, flops=10, ms=2.0)
    dear = runs("dear", [rising(0.9)] * 5, flops=40, ms=1.0)
    found = by_name(results(tmp_path, cheap, dear))
    bought = {name: {s.method: s.steps for s in found[name].standings} for name in ("flops", "seconds", "steps")}
    assert bought == {
        "flops": {"cheap": 100, "dear": 25},
        "seconds": {"cheap": 50, "dear": 100},
        "steps": {"cheap": 100, "dear": 100},
    }
    assert {name: ranking.winner.method for name, ranking in found.items()} == {
        "memory": "dear",
        "flops": "cheap",
        "seconds": "dear",
        "steps": "dear",
    }
    assert found["flops"].margin == pytest.approx(0.6 - (0.1 + 0.35 * 0.5))
    assert found["flops"].budget == "1 kFLOP each"


def test_where_the_answer_flips(tmp_path: Path):
    """Two straight lines and a bend: `quick` leads until `late` passes it at step 75."""
    quick = runs("quick", [{50: 0.7, 100: 0.7}] * 5, flops=1)
    late = runs("late", [{50: 0.5, 100: 0.9}] * 5, flops=1)
    found = by_name(results(tmp_path, quick, late))["steps"]
    assert [method for method, *_ in found.leaders] == ["quick", "late"]
    assert found.leaders[0][2] == found.leaders[1][1] == pytest.approx(75, rel=0.02)
    (flip,) = budgets.other_leaders(found)
    assert flip.startswith("Below 7")
    assert flip.endswith(" steps quick leads.")


def test_memory_ranks_those_that_fit_and_keeps_the_others_with_their_bytes(tmp_path: Path):
    big = runs("big", [rising(0.9)] * 5, peak=4096, flops=1)
    mid = runs("mid", [rising(0.8)] * 5, peak=2048, flops=1)
    low = runs("low", [rising(0.7)] * 5, peak=1024, flops=1)
    refused = {"schema": 1, "kind": "refused", "method": "no", "estimator": "", "reason": "9,999 bytes over."}
    found = by_name(results(tmp_path, big, mid, low, [refused], memory=3000))["memory"]
    assert [s.method for s in found.standings] == ["mid", "low"]
    assert found.out == (("big", "needs 4 KiB, more than 2.93 KiB"), ("no", "9,999 bytes over."))
    assert budgets.other_leaders(found) == ["Below 2 KiB low leads and below 1 KiB nothing fits."]
    assert by_name(results(tmp_path, big, mid, low))["memory"].winner.method == "big"


def test_methods_that_diverge_are_ranked_last_and_never_missing(tmp_path: Path):
    calm = runs("calm", [rising(0.5)] * 5, flops=1)
    wild = runs("wild", [rising(0.9), None, None, None, rising(0.9)], flops=1)
    found = by_name(results(tmp_path, wild, calm))["steps"]
    assert [s.method for s in found.standings] == ["calm", "wild"]
    assert found.best == pytest.approx({"calm": 0.6, "wild": 0.4})
    assert found.worse["wild"] == pytest.approx(0.6)
    assert found.standings[1].accuracy.n == 5
    assert "wild, the runner-up, diverged" in budgets.lead_of(found)
    (panel,) = [panel for panel in budgets.panels(results(tmp_path, wild, calm)) if panel["name"] == "steps"]
    assert panel["rows"][1]["cells"][0] == "diverged [diverged, 90.0]"
    assert panel["rows"][1]["strip"]["dots"] == ["90.00", "0.00", "0.00", "0.00", "90.00"]


def test_a_method_that_was_not_measured_is_a_row_with_the_reason(tmp_path: Path):
    known, bare = runs("known", [rising(0.6)], flops=1), runs("bare", [rising(0.9)])
    found = by_name(results(tmp_path, known, bare))
    assert found["steps"].winner.method == "bare"
    assert found["flops"].winner.method == "known"
    assert found["flops"].out == (("bare", "the FLOPs of a step were not measured"),)
    assert found["memory"].out == (("bare", "its peak was not measured"),)


def test_an_unreliable_timing_is_noted_where_seconds_are_ranked(tmp_path: Path):
    sure, vague = runs("sure", [rising(0.6)], flops=1), runs("vague", [rising(0.9)], flops=1, doubt="it was busy")
    last = {panel["name"]: panel["sentences"][-1] for panel in budgets.panels(results(tmp_path, sure, vague))}
    assert last["seconds"] == "The timing of vague is not reliable: see the notes marked ~ below."
    assert "reliable" not in last["flops"] + last["steps"] + last["memory"]


def test_an_old_folder_without_evaluations_has_no_panel(tmp_path: Path):
    lines = [trial("a", test={"loss": 0.1, "accuracy": 0.9}), cost("a", 1024, 1.0, "Reverse()")]
    assert rankings(read(write_folder(tmp_path, lines))) == []
    assert "equal budget" not in html.page(read(tmp_path))


def test_there_is_no_winner_where_every_median_run_diverged(tmp_path: Path):
    assert rankings(results(tmp_path, runs("a()", [None, None, None], ms=1.0))) == []


def test_leaders_that_differ_by_a_few_bytes_are_no_clause_each():
    """Before: below 4.79 MiB c leads, below 4.5 MiB b leads, below 4.5 MiB a leads and below 4.5 MiB nothing fits."""
    names = ("a", "b", "c", "d")
    ends = (4_722_692, 4_722_716, 4_722_812, 5_025_840, 5_509_248)
    leaders = tuple((name, float(low), float(high)) for name, low, high in zip(names, ends, ends[1:], strict=False))
    standing = Standing("d", {0: 0.9}, interval([0.9]), 1.0)
    ranking = Ranking("memory", "memory", "", (standing,), {}, {}, 1, leaders, size, ())
    assert budgets.other_leaders(ranking) == ["Below 4.79 MiB c leads and below 4.5 MiB nothing fits."]
