"""Ratios to common targets and the planned comparison, on constructed runs."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
from report_records import PROBING, cost, trial, write_folder

from gradcost.report import targets as pages
from gradcost.results import verdict
from gradcost.results.contrast import planned_contrast
from gradcost.results.records import Results, read
from gradcost.results.targets import Target, best_estimated, common_targets, reaches, reference
from gradcost.results.verdict import certainty
from gradcost.results.wording import DASH

STEPS = [1, 2, 4, 8, 16, 32, 64, 100]
RISING = [0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.96]
EXACT = "Reverse(saving=Everything())"


def runs(
    method: str, late: list[int], estimator: str = PROBING, test: float = 0.9, flops: int = 10, **more: Any
) -> list[dict[str, Any]]:
    """A method that is tuned once, and one final run per entry of `late`: RISING, that many evaluations later."""
    lines = [cost(method, 1024, 1.0, estimator, flops=flops)]
    score = {"loss": 0.5, "accuracy": test}
    lines.append(trial(method, "tune", seed=0, estimator=estimator, validation=score, **more))
    for seed, shift in enumerate(late, 1):
        accuracies = [0.1] * shift + RISING[: len(RISING) - shift]
        curve: dict[str, Any] = {"validation_step": STEPS, "validation_accuracy": accuracies}
        curve["validation_loss"] = [2.3 * (1 - accuracy) for accuracy in accuracies]
        ends = {"curve": curve, "test": {"loss": 0.5, "accuracy": test + 0.001 * seed}, "steps": 100}
        lines.append(trial(method, "final", seed=seed, estimator=estimator, **{**ends, **more}))
    return lines


def results(folder: Path, *methods: list[dict[str, Any]]) -> Results:
    return read(write_folder(folder, [line for lines in methods for line in lines], seeds=[1, 2, 3], steps=100))


def test_a_ratio_is_paired_by_seed_and_priced(tmp_path: Path):
    found = results(tmp_path, runs("bp", [0, 1, 0], EXACT, 0.95, flops=30), runs("fg", [2, 3, 3], flops=10))
    assert reference(found) == "bp"
    assert best_estimated(found) == "fg"
    row = next(r for r in reaches(found, [Target("accuracy", 0.4)]) if r.method == "fg")
    # steps of bp: 4, 8, 4; of fg: 16, 32, 32
    assert (row.ratio["steps"].low, row.ratio["steps"].median, row.ratio["steps"].high) == (4, 4, 8)
    assert row.ratio["flops"].median == pytest.approx(4 / 3)
    assert row.median == {"steps": 32, "flops": 320, "seconds": pytest.approx(0.032)}


def test_a_run_that_does_not_reach_a_target_counts_as_later_than_all_others(tmp_path: Path):
    found = results(tmp_path, runs("bp", [0, 0, 0], EXACT, 0.95), runs("fg", [2, 2, 5]), runs("zo", [5, 6, 5]))
    by_method = {row.method: row for row in reaches(found, [Target("accuracy", 0.8)])}
    assert (by_method["fg"].reached, by_method["fg"].ratio["steps"].median) == (2, 4)
    assert by_method["fg"].ratio["steps"].high == inf
    assert (by_method["zo"].reached, by_method["zo"].median["steps"]) == (0, inf)
    table = pages.tables(found)["to-target-steps"]
    column = list(table.columns).index("80.0% accuracy")
    assert [row[column] for row in table.rows] == ["1 [1, 1]", "4 [4, no end]", "not reached (0 of 3)"]


def test_a_diverged_run_reaches_nothing_from_its_divergence_on(tmp_path: Path):
    diverged = runs("fg", [0], status="diverged")
    diverged[-1] |= {"steps": 10, "test": None}
    diverged[1] |= {"status": "finished"}
    found = results(tmp_path, runs("bp", [0], EXACT, 0.95), diverged)
    steps = [row.median["steps"] for row in reaches(found, [Target("accuracy", x) for x in (0.6, 0.8)])]
    assert steps == [8, 16, 8, inf]


def test_a_failed_seed_of_the_reference_is_left_out(tmp_path: Path):
    exact = runs("bp", [0] * 6, EXACT, 0.95)
    exact[-1] |= {"status": "failed", "curve": {}, "test": None, "steps": 0}
    found = results(tmp_path / "one", exact, runs("fg", [2] * 6))
    assert [target.value for target in common_targets(found) if target.quantity == "accuracy"][-1] == 0.95
    by_method = {row.method: row for row in reaches(found, [Target("accuracy", 0.8)])}
    assert (by_method["bp"].reached, by_method["bp"].runs) == (5, 5)
    assert (by_method["fg"].runs, by_method["fg"].ratio["steps"].n) == (6, 5)
    assert by_method["fg"].ratio["steps"].median == 4
    all_failed = [
        line | {"status": "failed", "curve": {}} if line.get("phase") == "final" else line for line in exact
    ]
    found = results(tmp_path / "all", all_failed, runs("cp", [0] * 6, EXACT, 0.9), runs("fg", [2] * 6))
    assert reference(found) == "cp"  # the best one with runs that ended


def test_the_tables_of_the_questions_show_what_is_known_without_a_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = Path(__file__).parents[2] / "docs" / "results" / "questions.py"
    spec = importlib.util.spec_from_file_location("questions_without_a_ratio", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    diverged = runs("bp", [0, 5, 0], EXACT, 0.95)
    diverged[-2] |= {"status": "diverged", "steps": 5, "test": None}  # before it reaches 60%
    folder = tmp_path / "questions-probes"
    results(folder, diverged, runs("fg", [2, 2, 2]))
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in module.table(folder).splitlines()[2:]]
    assert [(row[0], row[1], *row[4:]) for row in rows] == [
        ("bp", "100", "2 of 3", DASH, DASH),
        ("fg", "100", "3 of 3", DASH, DASH),
    ]


@pytest.mark.parametrize(("metric", "best"), [("mean absolute error", "fg 16"), ("accuracy", "fg 1")])
def test_only_accuracies_that_differ_little_are_alike(tmp_path: Path, metric: str, best: str):
    methods = [runs("bp", [0], EXACT)]
    for method, error in (("fg 1", 0.019), ("fg 16", 0.0012)):
        methods.append(runs(method, [0]))
        ranked = {"accuracy": None, "mean absolute error": error, "score": -error}
        methods[-1][1]["validation"] = {"loss": error} | (
            ranked if metric == "mean absolute error" else {"accuracy": 1 - error}
        )
    lines = [line for lines in methods for line in lines]
    lower = metric != "accuracy"
    found = read(write_folder(tmp_path, lines, seeds=[1], steps=100, metric=metric, lower_is_better=lower))
    assert best_estimated(found) == best


def test_common_targets_are_reached_by_the_reference_and_shared(tmp_path: Path):
    found = results(tmp_path / "shared", runs("bp", [0, 0, 0], EXACT, 0.95), runs("fg", [2, 2, 3]))
    targets = common_targets(found)
    accuracies = [target.value for target in targets if target.quantity == "accuracy"]
    assert accuracies == [0.5, 0.7, 0.8, 0.9, 0.95]  # fg ends at 0.9, 0.9 and 0.8; only bp reaches 0.95
    losses = [target.value for target in targets if target.quantity == "loss"]
    assert losses == sorted(losses, reverse=True)
    base = [run for run in found.trials if run.method == "bp" and run.phase == "final"]
    assert all(target.step(run) < inf for target in targets for run in base)
    assert common_targets(results(tmp_path / "none", runs("fg", [2, 2, 3]))) == []


def test_one_comparison_is_planned_and_tuning_chooses_its_methods(tmp_path: Path):
    lucky = runs("lucky", [0] * 3, test=0.5)
    for record in lucky[2:]:
        record["test"] = {"loss": 0.1, "accuracy": 0.99}  # the best on the test split, but not in tuning
    found = results(tmp_path / "three", runs("bp", [0] * 3, EXACT, 0.95), runs("fg", [0] * 3, test=0.8), lucky)
    contrast = planned_contrast(found)
    assert contrast is not None
    assert (contrast.exact, contrast.estimated, contrast.better) == ("bp", "fg", 1.0)
    assert contrast.difference.median == pytest.approx(0.15)
    assert contrast.test.p == 0.25
    assert "bp against fg, is not significant (p 0.25, 3 seeds; 6 can show a difference)" in verdict(found)
    six = results(tmp_path / "six", runs("bp", [0] * 6, EXACT, 0.95), runs("fg", [2] * 6, test=0.8))
    assert "bp against fg, is significant (p 0.0312, 6 seeds)" in verdict(six)
    assert "To 90.0% validation accuracy fg takes 3.1 [3.1, 3.1] times the FLOPs of bp." in verdict(six)


def test_one_seed_allows_no_verdict(tmp_path: Path):
    found = results(tmp_path, runs("bp", [0], EXACT, 0.95), runs("fg", [0], test=0.8))
    assert verdict(found).startswith("Nothing can be said yet: each method has one seed, and six can show")


def test_the_reference_does_not_depend_on_which_run_ended_first(tmp_path: Path):
    """The order of the records is that in which processes end. Of alike methods the first one in the study counts."""
    found = results(tmp_path, runs("bp", [0], EXACT), runs("a", [2]), runs("b", [3], test=0.91))
    for trials in itertools.permutations(found.trials):
        shuffled = replace(found, trials=trials)
        assert (reference(shuffled), best_estimated(shuffled)) == ("bp", "a")


def test_methods_that_study_json_lacks_follow_those_that_it_has(tmp_path: Path):
    folder = write_folder(tmp_path, [*runs("new", [0]), *runs("old", [0])])
    study = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(study | {"methods": ["old", "refused"]}))
    assert read(folder).study.methods == ("old", "refused", "new")


def test_a_target_that_the_model_has_before_it_learns_is_none(tmp_path: Path):
    """A pretrained model with a prompt had 37.5% after one step, and a forward gradient 1 times the FLOPs to 30%."""
    found = results(tmp_path, runs("bp", [0, 0, 0], EXACT, 0.95), runs("fg", [2, 2, 2]))
    chosen = [target.value for target in common_targets(found) if target.quantity == "accuracy"]
    assert chosen == [0.5, 0.7, 0.8, 0.9, 0.95]
    start = runs("fg", [2, 2, 2])
    for run in start[2:]:
        run["curve"]["validation_accuracy"][0] = 0.6
    found = results(tmp_path / "pretrained", runs("bp", [0, 0, 0], EXACT, 0.95), start)
    chosen = [target.value for target in common_targets(found) if target.quantity == "accuracy"]
    assert chosen == [0.7, 0.8, 0.9, 0.95]


def test_two_runs_that_diverged_in_opposite_ways_have_no_median(tmp_path: Path):
    exact, estimated = runs("bp", [0, 0], EXACT, 0.95), runs("fg", [2, 2])
    exact[-1] |= {"status": "diverged", "test": None}
    estimated[-2] |= {"status": "diverged", "test": None}
    (sentence,) = certainty(results(tmp_path, exact, estimated))
    assert sentence.endswith("their difference has no median, where a run that diverged is infinitely bad.")
