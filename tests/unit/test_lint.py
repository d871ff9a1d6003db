"""Each fault of a study is found by its own rule and no other; a study without faults has no finding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import report_records
import torch

from gradcost import backprop, mezo
from gradcost.papers.rike2022 import audit as rike2022_audit
from gradcost.results.effort import TrainingEffort, TuningEffort
from gradcost.results.facts import (
    Environment,
    ScoreCoverage,
    TuningScores,
    UseOfTestSet,
    facts,
)
from gradcost.results.lint import ENOUGH, RULES, Finding, lint, unchecked
from gradcost.results.publication import Statement
from gradcost.results.records import read
from gradcost.results.statistics import SignFlip
from gradcost.studies import Comparison, costs
from gradcost.studies.executors import Local
from gradcost.studies.folder import open_folder
from gradcost.studies.processes import Work
from gradcost.studies.run import run_trials
from gradcost.studies.trial_log import score_record
from gradcost.tasks import Digits
from gradcost.tasks.task import Score, Split

BACKPROP, MEZO = "backprop()", "mezo()"
ESTIMATORS = {BACKPROP: "Reverse(saving=Everything())", MEZO: "Probing(slope=CentralDifference(eps=0.001), probes=1)"}
CURVE = {0.01: 0.5, 0.03: 0.8, 0.1: 0.95, 0.3: 0.7, 1.0: None}  # validation accuracy at each rate; None: diverged
PLACE = {"python": "3.11.9", "torch": "2.9.0", "cpu": "an invented processor", "code": "0123abcd"}
Lines = list[dict[str, Any]]


def scores(accuracy: float, targets: int = 360) -> dict[str, Any]:
    return {"loss": 1 - accuracy, "accuracy": accuracy, "targets": targets, "of": 360}


def run(method: str, phase: str, lr: float, seed: int, accuracy: float | None, **changes: Any) -> dict[str, Any]:
    made = {"estimator": ESTIMATORS[method], "task": "Digits(batch=64)", "environment": dict(PLACE)}
    if accuracy is None:
        made |= {"status": "diverged", "steps": 17}
    else:
        made |= {"validation": scores(accuracy), "test": scores(accuracy) if phase == "final" else None}
    return report_records.trial(method, phase, lr, seed, **made | changes)


def clean() -> Lines:
    """Two methods with equal tuning, a clear winner inside each grid, and six seeds that differ little."""
    lines: Lines = []
    for method, flops in ((BACKPROP, 3_000_000), (MEZO, 2_000_000)):
        lines.append(report_records.cost(method, 1024, 1.0, ESTIMATORS[method], flops=flops))
        lines += [run(method, "tune", lr, 0, accuracy) for lr, accuracy in CURVE.items()]
        lines += [run(method, "final", 0.1, seed, 0.94 + 0.002 * seed) for seed in range(1, 7)]
    return lines


def of(lines: Lines, method: str, phase: str) -> Lines:
    return [line for line in lines if line.get("phase") == phase and line["method"] == method]


def found(folder: Path, lines: Lines, **study: Any) -> list[Finding]:
    return lint(facts(read(report_records.write_folder(folder, lines, **study))))


def edge(lines: Lines) -> None:
    lines[:] = [line for line in lines if (line["method"], line.get("phase")) != (MEZO, "tune") or line["lr"] <= 0.1]
    lines += [run(MEZO, "tune", lr, 0, 0.1) for lr in (0.001, 0.003)]  # as many points as the other


def unequal_points(lines: Lines) -> None:
    lines += [run(BACKPROP, "tune", 3.0, 0, None), run(BACKPROP, "tune", 0.003, 0, 0.2)]


def unequal_steps(lines: Lines) -> None:
    """Twice the steps of a method in tuning; in the final runs too, or a second rule would apply."""
    for line in of(lines, MEZO, "tune") + of(lines, MEZO, "final"):
        line["steps"] *= 1 if line["status"] == "diverged" else 2


def changed(what: str, to: Any) -> Callable[[Lines], None]:
    """A setting that differs between tuning and the final runs."""

    def change(lines: Lines) -> None:
        for line in of(lines, MEZO, "final"):
            line[what] = to

    return change


def longer_training(lines: Lines) -> None:
    for line in of(lines, MEZO, "final") + of(lines, BACKPROP, "final"):
        line["steps"] = 6000


def shorter_training(lines: Lines) -> None:
    for line in of(lines, BACKPROP, "final"):
        line["steps"] = 20


def not_trained(lines: Lines) -> None:
    lines[:] = [line for line in lines if (line["method"], line.get("phase")) != (MEZO, "final")]


def customary(lines: Lines) -> None:
    for line in lines:
        if line["method"] == BACKPROP and line["kind"] == "trial":
            line["optimizer"] = f"AdamW(lr={line['lr']})"


def noise(lines: Lines) -> None:
    of(lines, MEZO, "tune")[1]["validation"] = scores(0.949)


def few_seeds(lines: Lines) -> None:
    lines[:] = [line for line in lines if line.get("phase") != "final" or line["seed"] <= 3]


def subset(lines: Lines) -> None:
    of(lines, MEZO, "final")[2]["test"]["targets"] = 8


def override(lines: Lines) -> None:
    for line in of(lines, MEZO, "final"):
        line["lr"], line["optimizer"] = 0.3, "SGD(lr=0.3)"


def early_test(lines: Lines) -> None:
    of(lines, MEZO, "tune")[1]["test"] = scores(0.8)


def second_test(lines: Lines) -> None:
    lines.append(of(lines, MEZO, "final")[0] | {"trial": "a second run"})


def all_diverged(lines: Lines) -> None:
    lines[:] = [line for line in lines if (line["method"], line.get("phase")) != (MEZO, "final")]
    for line in of(lines, MEZO, "tune"):
        line |= {"status": "diverged", "validation": None, "steps": 3}


def at_chance(lines: Lines) -> None:
    for line, accuracy in zip(of(lines, MEZO, "tune"), (0.05, 0.08, 0.13, 0.07), strict=False):
        line["validation"] = scores(accuracy)


def mixed_code(lines: Lines) -> None:
    for line in of(lines, MEZO, "final"):
        line["environment"]["code"] = "ffff0000"


def load(lines: Lines) -> None:
    lines[0]["doubt"] = "other programs used 1.2 cores during the timing; time it again on an idle machine"


def another(what: str, to: Any) -> Callable[[Lines], None]:
    """A setting that one method has alone, in tuning and in the final runs."""

    def change(lines: Lines) -> None:
        for line in of(lines, MEZO, "tune") + of(lines, MEZO, "final"):
            line[what] = to

    return change


def picked_seeds(lines: Lines) -> None:
    for line in of(lines, MEZO, "final"):
        line["seed"] += 10


def dropped_run(lines: Lines) -> None:
    lines.remove(of(lines, MEZO, "final")[2])
    lines += [run(method, "final", 0.1, 7, 0.95) for method in (BACKPROP, MEZO)]


def confirmed_on_the_tuning_seed(lines: Lines) -> None:
    lines += [
        run(method, "confirm", lr, 0, accuracy)
        for method in (BACKPROP, MEZO)
        for lr, accuracy in ((0.1, 0.95), (0.03, 0.8))
    ]
    lines += [
        run(method, "confirm", lr, 20, accuracy)
        for method in (BACKPROP, MEZO)
        for lr, accuracy in ((0.1, 0.96), (0.03, 0.79))
    ]


def published(lines: list[dict[str, Any]]) -> None:
    lines[:] = [line for line in lines if line.get("phase") not in ("tune", "confirm")]


def only_estimates_at_given_rates(lines: list[dict[str, Any]]) -> None:
    lines[:] = [line for line in lines if line.get("phase") != "tune" and line["method"] != "backprop()"]


def sparse(lines: Lines) -> None:
    rates = {0.01: 1e-7, 0.03: 1e-4, 0.1: 0.1, 0.3: 100.0, 1.0: 1e5}
    for line in of(lines, MEZO, "tune"):
        line["lr"] = rates[line["lr"]]


def cliff(lines: Lines) -> None:
    of(lines, MEZO, "tune")[3] |= {"status": "diverged", "validation": None}


def exploded(lines: Lines) -> None:
    of(lines, MEZO, "final")[0]["validation"]["loss"] = 1e30


def confirmed_next_to_a_cliff(lines: Lines) -> None:
    """The confirming seeds choose 0.3 instead of 0.1, and 1.0 diverged in tuning."""
    lines += [
        run(method, "confirm", lr, 20, accuracy)
        for method in (BACKPROP, MEZO)
        for lr, accuracy in (((0.1, 0.2), (0.3, 0.99)) if method == MEZO else ((0.1, 0.95), (0.3, 0.2)))
    ]
    for line in of(lines, MEZO, "final"):
        line["lr"], line["optimizer"] = 0.3, "SGD(lr=0.3)"


FAULTS = [
    ("E101", edge, "lr=0.1 is the largest of the 5 that were tried"),
    (
        "E102",
        unequal_points,
        "tuned on 5 points of 3,000 steps in all and 6e+09 FLOPs, but backprop() on 7 points of 4,200",
    ),
    ("E102 E106", unequal_steps, "of 3,000 steps in all"),
    ("E106 E205", shorter_training, "trained for 20 steps and 6e+07 FLOPs, but mezo() for 600 steps"),
    ("E205", changed("estimator", "Clipped(Probing())"), "estimator: tuned with Probing(slope=CentralDifference"),
    ("E205", changed("optimizer", "SGD(lr=0.1, momentum=0.9)"), "tuned with SGD(lr), trained with SGD(lr, momentum"),
    ("E205", longer_training, "steps: tuned with 600, trained with 6,000"),
    ("E205", changed("task", "Digits(batch=8)"), "task: tuned with Digits(batch=64), trained with Digits(batch=8)"),
    ("W110", noise, "lr=0.1, lr=0.03 lie within 0.1 points of accuracy, and the spread between seeds is 0.37 points"),
    ("W111", few_seeds, "3 seeds: a paired test cannot give p below 0.25"),
    ("E301", subset, "the test score is the mean over 8 of 360 examples"),
    ("E302", override, "trained at lr=0.3, but tuning chose lr=0.1"),
    ("E303", early_test, "1 test score before the final runs"),
    ("E303", second_test, "7 test scores of 6 seeds"),
    ("W120", all_diverged, "all 5 points diverged"),
    ("W120", at_chance, "the best point, lr=0.1, has 13.0% accuracy, and guessing gives 10.0%"),
    ("W401", mixed_code, "code was not the same in all runs: 0123abcd, ffff0000"),
    ("W402", load, "other programs used 1.2 cores during the timing"),
    ("E206", another("task", "Digits(batch=512)"), "task: Digits(batch=512), but backprop() has Digits(batch=64)"),
    ("E206", another("optimizer", "AdamW(lr=0.1)"), "optimizer: AdamW, but backprop() has SGD"),
    ("E304", picked_seeds, "final seeds 11, 12, 13, 14, 15, 16, but backprop() has 1, 2, 3, 4, 5, 6"),
    ("E304", dropped_run, "final seeds 1, 2, 4, 5, 6, 7, but backprop() has 1, 2, 3, 4, 5, 6, 7"),
    ("E305", confirmed_on_the_tuning_seed, "confirmed on seed 0, on which it was tuned"),
    ("W122 W110", not_trained, "tuning chose lr=0.1, and no final run has ended; backprop() has final runs"),
    ("W102", cliff, "the next rate, 3 times the winner, diverged"),
    ("W102", confirmed_next_to_a_cliff, "the next rate, 3.33 times the winner, diverged"),
    ("W104", published, "lr=0.1 was given, not tuned"),
    ("W104", only_estimates_at_given_rates, "was given, not tuned"),
    ("W105", customary, "trained by SGD, and backprop() by AdamW"),
    ("W103", sparse, "the rates next to the winner are up to 1e+03 times away, and 3.33 times for backprop()"),
    ("W121", exploded, "1 finished with a loss above 100 times that of guessing"),
]


def test_the_winner_beside_which_a_rate_diverged_is_the_confirmed_one(tmp_path: Path):
    lines = clean()
    for method in (BACKPROP, MEZO):  # the best rate of the tuning seed is 0.1, and 0.3 diverges in tuning
        of(lines, method, "tune")[3] |= {"status": "diverged", "validation": None}
        lines += [run(method, "confirm", lr, 20, accuracy) for lr, accuracy in ((0.03, 0.99), (0.1, 0.2))]
        for line in of(lines, method, "final"):
            line["lr"], line["optimizer"] = 0.03, "SGD(lr=0.03)"
    assert "W102" not in {finding.code for finding in found(tmp_path / "confirmed", lines)}


@pytest.mark.parametrize(("code", "spoil", "sentence"), FAULTS, ids=lambda part: getattr(part, "__name__", None))
def test_a_fault_is_found_by_its_rule_alone(tmp_path: Path, code: str, spoil: Any, sentence: str):
    lines = clean()
    spoil(lines)
    study = {"optimizer": "customary"} if code == "W105" else {}
    findings = found(tmp_path / "study", lines, **study)
    assert {finding.code for finding in findings} == set(code.split())
    assert any(sentence in finding.found for finding in findings), findings
    assert all(finding.remedy and finding.method for finding in findings)


def test_every_rule_has_a_fault_here():
    assert {code for codes, _, _ in FAULTS for code in codes.split()} == {
        rule.code for rule in RULES if rule.kind is not Statement
    }


def test_final_runs_have_equal_steps_or_flops_or_seconds():
    def codes(*efforts: TrainingEffort) -> list[str]:
        return [finding.code for finding in lint(efforts)]

    assert codes(TrainingEffort("a", 600)) == codes(TrainingEffort("a", 600), TrainingEffort("b", 600, 9e9)) == []
    assert codes(TrainingEffort("a", 600), TrainingEffort("b", 599)) == ["E106"]
    assert codes(TrainingEffort("a", 600, 6e9), TrainingEffort("b", 200, 6.1e9)) == []
    assert codes(TrainingEffort("a", 600, 6e9), TrainingEffort("b", 200, 9e9)) == ["E106"]
    assert codes(TrainingEffort("a", 600, 6e9, 10.0), TrainingEffort("b", 200, 9e9, 11.0)) == []
    assert codes(TrainingEffort("a", 600, 6e9, 10.0), TrainingEffort("b", 200, 9e9, None)) == ["E106"]


def test_a_publication_is_held_to_what_its_code_ran():
    (finding,) = lint([Statement("a", "clip", "1", "none"), Statement("b", "clip", "1", "1")])
    assert (finding.code, finding.method) == ("E207", "a")
    assert finding.found == "clip: the publication states 1, but its code ran none"


def test_a_study_without_a_fault_has_no_finding(tmp_path: Path):
    known = facts(read(report_records.write_folder(tmp_path / "study", clean())))
    assert lint(known) == []
    assert unchecked(known) == []  # every rule was checked


def test_equal_flops_are_a_fair_budget_and_so_are_equal_steps_and_equal_seconds():
    def codes(*efforts: TuningEffort) -> list[str]:
        return [finding.code for finding in lint(efforts)]

    assert codes(TuningEffort("a", 10, 6000, 6e9), TuningEffort("b", 20, 12_000, 6.1e9)) == []
    assert codes(TuningEffort("a", 10, 6000, 6e9), TuningEffort("b", 10, 6000, 9e9)) == []
    assert codes(TuningEffort("a", 10, 6000, 6e9), TuningEffort("b", 20, 12_000, 9e9)) == ["E102"]
    assert codes(TuningEffort("a", 10), TuningEffort("b", 10), TuningEffort("c", 9)) == ["E102"]
    assert codes(TuningEffort("a", 10, 6000, 6e9, 120.0), TuningEffort("b", 10, 3000, 9e9, 131.0)) == []
    assert codes(TuningEffort("a", 10, 6000, 6e9, 120.0), TuningEffort("b", 10, 3000, 9e9, 160.0)) == ["E102"]
    assert codes(TuningEffort("a", 10, 6000, 6e9, 120.0), TuningEffort("b", 12, 3600, 9e9, 120.0)) == ["E102"]
    assert codes(TuningEffort("a", 10, 6000, 6e9, 120.0), TuningEffort("b", 10, 3000, 9e9, None)) == ["E102"]


def test_confirming_runs_decide_and_their_spread_counts(tmp_path: Path):
    """The narrow winner of tuning loses on fresh seeds, so tuning chose the other rate."""
    lines = clean()
    of(lines, MEZO, "tune")[1]["validation"] = scores(0.951)
    better = {0.03: (0.90, 0.91), 0.1: (0.94, 0.95)}
    lines += [run(MEZO, "confirm", lr, seed, a) for lr, both in better.items() for seed, a in enumerate(both, 1)]
    assert found(tmp_path / "study", lines) == []


def test_a_final_run_at_the_rate_of_the_least_loss_is_no_override(tmp_path: Path):
    """A user's study may choose by the loss."""
    lines = clean()
    of(lines, MEZO, "tune")[1]["validation"]["loss"] = 0.001
    for line in of(lines, MEZO, "final"):
        line |= {"lr": 0.03, "optimizer": "SGD(lr=0.03)"}
    assert found(tmp_path / "study", lines) == []


def test_a_rival_that_was_never_tuned_and_rates_that_were_all_tested_are_found(tmp_path: Path):
    lines = [line for line in clean() if line.get("phase") != "tune" or line["method"] != MEZO]
    by_code = {finding.code: finding.found for finding in found(tmp_path / "untuned", lines)}
    assert by_code == {"E302": "trained at lr=0.1, but tuning chose none"}
    lines = clean() + [run(MEZO, "final", 0.03, seed, 0.8) for seed in range(1, 7)]
    by_code = {finding.code: finding.found for finding in found(tmp_path / "tested", lines)}
    assert set(by_code) == {"E302", "E303"}
    assert by_code["E303"] == "final runs at 2 learning rates"


def test_with_one_seed_the_noise_is_unknown():
    (finding,) = lint([TuningScores("a", (("lr=0.1", 0.9), ("lr=0.3", 0.8)))])
    assert finding.code == "W110"
    assert "leads lr=0.3 by 10 points of accuracy on one seed, so the noise between seeds is unknown" in finding.found


def test_rules_that_old_records_cannot_answer_are_listed_as_unchecked(tmp_path: Path):
    lines = clean()
    for line in lines:
        for name in ("task", "environment"):
            line.pop(name, None)
        for split in ("validation", "test"):
            if line.get(split):
                line[split] = {name: line[split][name] for name in ("loss", "accuracy")}
    known = facts(read(report_records.write_folder(tmp_path / "old", lines)))
    assert lint(known) == []
    assert [rule.code for rule in unchecked(known)] == ["E301", "W401"]


def test_enough_seeds_are_those_of_the_exact_test():
    assert SignFlip(1.0, 1).enough(0.05) == ENOUGH == 6


def test_every_fault_of_the_audited_paper_is_found():
    findings = {(finding.code, finding.method, finding.found) for finding in lint(rike2022_audit.FACTS)}
    both = rike2022_audit.BOTH
    assert findings == {
        ("E101", both, "8 of 14 winners lie on an edge of what was tried"),
        ("E102", "backprop", "tuned on 61 points, but forward gradient on 129 points"),
        ("E205", both, "epochs: tuned with 10 to 30, trained with 50 to 100"),
        ("E205", both, "clip: tuned with none in three of the grids, trained with one"),
        ("E205", "forward gradient", "decay of Adam: tuned with 0, trained with 5e-5 and 1e-4"),
        ("E205", "backprop", "decay on CIFAR-10: tuned with 1e-6, trained with 1e-4"),
        (
            "E207",
            "forward gradient",
            "cap on the slope: the publication states 1 in all rows, but its code ran none in 2 of 7 rows",
        ),
        ("E207", "forward gradient", "decay of NN Nesterov: the publication states 1e-5, but its code ran 1e-6"),
        (
            "E207",
            both,
            "test losses in the table: the publication states 0.270 and 1.685, but its code ran 0.268 and 1.684",
        ),
        ("E301", both, "the validation loss in the grids of Adam is the mean over 16 of 10,000 examples"),
        ("E301", both, "the test loss is the mean over 16 of 10,000 examples"),
        ("E302", both, "3 of 14 winners were replaced by hand"),
        ("W111", both, "one seed: the effect of the seed and of the method cannot be separated"),
    }


def test_points_that_all_diverged_cost_as_many_steps_as_those_of_the_others(tmp_path: Path):
    score = {"loss": 0.5, "accuracy": 0.8}
    lines = [report_records.trial("a()", "tune", lr, status="diverged", steps=3) for lr in (0.1, 1.0)]
    lines += [report_records.trial("b()", "tune", lr, steps=100, validation=score) for lr in (0.1, 1.0)]
    lines += [
        report_records.trial("b()", "final", 0.1, seed, steps=1000, validation=score, test=score) for seed in (1, 2)
    ]
    assert [
        f for f in lint(facts(read(report_records.write_folder(tmp_path / "r", lines)))) if f.code == "E102"
    ] == []


def test_a_study_that_is_scored_by_its_loss_alone_is_judged_by_it(tmp_path: Path):
    def scored(lr: float, loss: float, phase: str = "tune") -> dict[str, Any]:
        return report_records.trial("a()", phase, lr, validation={"loss": loss, "accuracy": None})

    lines = [scored(0.01, 3.0), scored(0.1, 1.0), scored(1.0, 2.0), scored(1.0, 2.0, "final")]
    codes = {finding.code for finding in lint(facts(read(report_records.write_folder(tmp_path / "r", lines))))}
    assert "E302" in codes, "another rate was trained than tuning chose"
    assert "W120" not in codes


def test_facts_and_findings_are_values():
    for fact in (
        *rike2022_audit.FACTS,
        Environment("torch", ("2.9.0",)),
        ScoreCoverage("a", "test", 1, 2),
        UseOfTestSet("a", 1, 1),
    ):
        assert eval(repr(fact), {type(fact).__name__: type(fact)}) == fact
    findings = lint(rike2022_audit.FACTS)
    assert findings[0] == eval(repr(findings[0]), {"Finding": Finding})
    assert [finding.severity for finding in findings] == ["error"] * 12 + ["warning"]


# ---- the command


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "gradcost.cli.main", *arguments]
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_command_shows_what_is_found_and_strict_fails_on_errors_alone(tmp_path: Path):
    lines = clean()
    edge(lines)
    few_seeds(lines)
    report_records.write_folder(tmp_path / "bad", lines)
    shown = command("lint", "bad", folder=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "E101" in shown.stdout
    assert "lr=0.1 is the largest of the 5 that were tried" in shown.stdout
    assert "1 error, 1 warning" in shown.stdout
    strict = command("lint", "bad", "--strict", "--json", folder=tmp_path)
    assert strict.returncode == 3
    answer = json.loads(strict.stdout)
    assert (answer["errors"], answer["warnings"], answer["unchecked"]) == (1, 1, [])
    first = answer["findings"][0]
    assert {name: first[name] for name in ("code", "severity", "rule", "method")} == {
        "code": "E101",
        "severity": "error",
        "rule": "edge",
        "method": MEZO,
    }
    assert command("lint", "nowhere", folder=tmp_path).returncode == 2
    warned = clean()
    few_seeds(warned)
    report_records.write_folder(tmp_path / "warned", warned)
    assert command("lint", "warned", "--strict", folder=tmp_path).returncode == 0


def test_what_a_real_comparison_records_is_all_looked_at(tmp_path: Path):
    """Two points and two seeds: an edge and few seeds, but no fault of the library."""
    folder = tmp_path / "real"
    methods = ((BACKPROP, backprop()), (MEZO, mezo()))
    made = Comparison(Digits(), methods, (0.001, 0.01), 60, (1, 2), target=0.9)
    folder.mkdir()
    open_folder(folder, made.document("digits", "mlp"), made.code)
    ran = list(run_trials(made.study([BACKPROP, MEZO]), Local(2), Work(made.code, folder)))
    assert [trial.status for trial in ran] == ["finished"] * 8
    surveyed = dict(costs.forecast_methods(made.task, made.with_optimizers, None))
    forecasts = {label: cost for label, cost in surveyed.items() if not isinstance(cost, str)}
    assert list(costs.time_methods(made.task, made.with_optimizers, None, folder, forecasts)) == [BACKPROP, MEZO]
    known = facts(read(folder))
    assert unchecked(known) == []
    scored = [fact for fact in known if isinstance(fact, ScoreCoverage)]
    assert {fact.what for fact in scored} == {"validation score", "test score"}
    assert {fact.targets == fact.of > 100 for fact in scored} == {True}
    codes = {finding.code for finding in lint(known)}
    assert {"E101", "W111"} <= codes <= {"E101", "W111", "W110", "W120", "W121", "W402"}


def test_a_score_goes_on_record_with_how_many_it_is_the_mean_over():
    split = Split(torch.zeros(3, 5), torch.zeros(3, 7, dtype=torch.int64))
    assert score_record(Score(0.5, 0.25, 6), split) == {"loss": 0.5, "accuracy": 0.25, "targets": 6, "of": 21}
    assert score_record(Score(0.5, float("nan")), split) == {"loss": 0.5, "accuracy": None}

    class More(NamedTuple):
        loss: float
        accuracy: float
        last: float

    assert score_record(More(0.5, 0.25, 2.0), split) == {"loss": 0.5, "accuracy": 0.25, "last": 2.0}


def test_the_page_on_fairness_lists_every_rule():
    page = (Path(__file__).parents[2] / "docs" / "fairness.md").read_text("utf-8")
    listed = [line for line in page.splitlines() if line.startswith(("| E", "| W")) and line[3:6].isdigit()]
    assert listed == [f"| {rule.code} | {rule.name} | {rule.remedy} |" for rule in RULES]
