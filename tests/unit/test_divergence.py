"""The rule of divergence: one for training, tuning, final runs, reports and the linter; a diverged run ranks last."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from report_records import trial, write_folder

from gradcost.core.divergence import PATIENCE, RISE, DivergenceMonitor
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.estimators.presets import backprop
from gradcost.results import ledger, status
from gradcost.results.facts import TuningScores, facts
from gradcost.results.outcome import judged, last_old_line
from gradcost.results.records import read, trial_record
from gradcost.results.summary import summarise
from gradcost.results.tuning import best, chosen, scores
from gradcost.studies.trial import Trial
from gradcost.studies.worker import perform
from gradcost.tasks.digits import Digits
from gradcost.training.optimizers import SGD

STEPS = [10 * (i + 1) for i in range(20)]


def monitor(losses: list[float]) -> DivergenceMonitor:
    found = DivergenceMonitor()
    for step, loss in enumerate(losses):
        found.add(step, loss)
    return found


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([2.0, 1.0, math.nan, 1.0], 2),
        ([math.inf], 0),
        ([2.0] + [2.0 * RISE + 1] * PATIENCE, None),
        ([2.0] + [2.0 * RISE + 1] * (PATIENCE + 1), 1),
        ([2.0] + [2.0 * RISE + 1] * PATIENCE + [2.0] + [2.0 * RISE + 1] * PATIENCE, None),
        ([2.0] + [1e30] * 1000, 1),
        ([2.0] + [2.0 * RISE] * 1000, None),
        ([0.0] + [1e30] * 1000, None),
        ([-1.0] + [RISE - 1.9] * 1000, 1),
        ([-1.0] + [RISE - 2.1] * 1000, None),
    ],
)
def test_the_rule(losses: list[float], diverged: int | None):
    assert monitor(losses).diverged == diverged


def curve(losses: Sequence[float | None]) -> dict[str, Any]:
    return {
        "step": STEPS,
        "loss": losses,
        "slope": [],
        "validation_step": [100, 200],
        "validation_loss": [1.0, 1e30],
        "validation_accuracy": [0.5, 0.99],
    }


EXPLODED = curve([2.0] * 9 + [1e30] * 11)


def test_a_finished_run_of_an_older_version_is_judged_by_its_curve():
    record = trial("a()", "tune", 0.1, curve=EXPLODED, steps=200)
    found = judged(record)
    assert (found["status"], found["steps"]) == ("diverged", 150)
    assert found["reason"] == "the loss stayed above 200, 100 times the first loss, from step 100 to step 150"
    assert found["curve"]["step"] == STEPS[:15]
    assert found["curve"]["validation_step"] == [100]
    assert record["status"] == "finished"
    assert judged(found) == found
    for kept in (curve([2.0] * 20), curve([2.0] * 9 + [1e30] * 5 + [2.0] * 6), curve([2.0] * 19 + [1e30])):
        record = trial("a()", "tune", 0.1, curve=kept, steps=200)
        assert judged(record) is record


def test_a_run_whose_own_monitor_had_the_rule_is_believed(tmp_path: Path):
    """The points of a curve are means over several steps, so the rule cannot be applied to them step by step."""
    kept, lost = (trial("a()", "tune", lr, curve=EXPLODED, steps=200) for lr in (0.1, 1.0))
    folder = write_folder(tmp_path, [lost])  # as an older version wrote it, without a checksum
    ledger.append(folder, kept)
    assert last_old_line(folder / ledger.RECORDS) == 1
    assert {run.lr: (run.status, run.steps) for run in read(folder).trials} == {
        0.1: ("finished", 200),
        1.0: ("diverged", 150),
    }
    assert status.record(folder, kept["trial"])["status"] == "finished"
    assert status.record(folder, lost["trial"])["status"] == "diverged"
    assert trial_record(kept).status == "finished"  # as a study sees it that has just run it
    assert last_old_line(tmp_path / "missing") == math.inf


def test_a_mean_that_is_not_finite_is_a_divergence_of_an_older_version(tmp_path: Path):
    """A monitor that has seen each step knows better: the sum of finite losses can overflow."""
    overflow = {"curve": curve([2.0] * 9 + [None] + [2.0] * 10), "steps": 200}
    folder = write_folder(tmp_path, [trial("a()", "tune", 0.1, **overflow)])
    ledger.append(folder, trial("a()", "tune", 1.0, **overflow))
    old, new = read(folder).trials
    assert (old.status, old.steps, old.reason) == ("diverged", 100, "the loss was nan at step 100")
    assert (new.status, new.steps) == ("finished", 200)


def test_the_committed_records_keep_the_status_that_their_version_can_know():
    """Those of mnist-mlp are older than the rule. Those of questions-probes have a monitor that saw every step."""
    folder = Path(__file__).parents[2] / "docs" / "results"
    found = [run for run in read(folder / "questions-probes").trials if run.lr == 0.2]
    assert [(run.method, run.phase, run.status, run.steps) for run in found] == [
        ("forward gradient 4", "tune", "finished", 1561)
    ]
    ended = [run.steps for run in read(folder / "mnist-mlp").trials if run.reason and "stayed above" in run.reason]
    assert ended == [54, 54, 232, 54]


def test_such_a_run_is_the_worst_in_tuning_the_report_and_the_linter(tmp_path: Path):
    good = {"loss": 0.5, "accuracy": 0.6}
    best_by_accuracy = {"loss": 0.1, "accuracy": 0.99}
    lines = [
        trial("a()", "tune", 0.1, validation=good, curve=curve([2.0] * 20), steps=200),
        trial("a()", "tune", 1.0, validation=best_by_accuracy, curve=EXPLODED, steps=200),
        trial("a()", "final", 0.1, seed=1, curve=curve([2.0] * 20), steps=200, test=good),
        trial("a()", "final", 0.1, seed=2, curve=EXPLODED, steps=200, test=best_by_accuracy),
    ]
    folder = write_folder(tmp_path, lines)
    results = read(folder)
    tuned = scores((run for run in results.trials if run.phase == "tune"), "a()")
    assert best(tuned, 2) == [0.1]
    assert chosen(results.trials, "a()") == 0.1
    (row,) = [row for row in summarise(results) if row.method == "a()"]
    assert row.diverged == 1
    assert sorted(row.accuracies) == [-math.inf, 0.6]
    (fact,) = [fact for fact in facts(results) if isinstance(fact, TuningScores)]
    assert fact.diverged == 1
    name = next(line["trial"] for line in lines if line.get("lr") == 1.0)
    assert any(sentence.startswith("It diverged: the loss stayed above 200") for sentence in status.why(folder, name))


class Exploding(Digits):
    """A task whose loss becomes 1e30, and stays finite, after 20 steps."""

    def objective(self, key: Key) -> Objective:
        objective = super().objective(key)
        return objective.with_loss(lambda model, batch: objective.loss(model, batch[0]) * batch[1])

    def batch_at(self, key: Key, step: int) -> Any:
        return super().batch_at(key, step), 1.0 if step < 20 else 1e30


def test_a_trial_stops_where_it_diverges_and_its_record_says_so(tmp_path: Path):
    record = perform(Trial(Exploding(), "a", backprop(), SGD(1e-40), steps=200), "code", tmp_path)
    assert (record["status"], record["steps"], record["test"]) == ("diverged", 21 + PATIENCE, None)
    assert "100 times the first loss, from step 21 to step 71" in record["reason"]
    assert trial_record(json.loads(json.dumps(record))).status == "diverged"


def test_a_short_run_that_ends_above_the_limit_has_diverged(tmp_path: Path):
    """A run of fewer than 50 steps could not diverge unless its loss was not finite: tuning chose losses of 1e12."""
    record = perform(Trial(Exploding(), "a", backprop(), SGD(1e-40), steps=30), "code", tmp_path)
    assert (record["status"], record["steps"], record["test"]) == ("diverged", 30, None)
    assert record["reason"].startswith("the loss ended above")
    assert "100 times the first loss, at step 30" in record["reason"]


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [([2.0, 1e30, 1e30], 1), ([2.0, 1e30, 2.0], None), ([2.0], None), ([0.0, 1e30], None), ([2.0, math.inf], 1)],
)
def test_the_rule_at_the_end(losses: list[float], diverged: int | None):
    ended = monitor(losses)
    ended.end(len(losses) - 1)
    assert ended.diverged == diverged
