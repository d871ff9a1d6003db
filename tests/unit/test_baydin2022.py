"""Baydin et al. 2022: the published numbers, the study, paired times, and the evidence for each claim."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import inf, log
from pathlib import Path
from typing import Any

import pytest
import torch

from gradcost.core.key import Key
from gradcost.instruments import timing
from gradcost.instruments.timing import time_in_turn
from gradcost.papers.baydin2022 import speed, study
from gradcost.papers.baydin2022.claims import claims, loss_gap, pairs, step_ratio
from gradcost.papers.baydin2022.page import page
from gradcost.papers.baydin2022.speed import StepTimes
from gradcost.papers.baydin2022.study import MODELS, Reproduction, task_of
from gradcost.papers.baydin2022.table import EXPERIMENTS, experiments
from gradcost.papers.claims import Evidence, outcome
from gradcost.results import ledger
from gradcost.results.records import Results, StudyRecord, TrialRecord, read, trial_record
from gradcost.tasks import Digits
from gradcost.tasks.architectures import Mlp
from in_process import inside

GUESSING = log(10)
MNIST_NN = "Mnist(model=Mlp(hidden=(1024, 1024)), batch=64)"


def test_the_ratios_are_those_that_the_figures_print():
    printed = {each.name: round(each.times[0] / each.times[1], 3) for each in EXPERIMENTS if each.times is not None}
    assert printed == {"logistic": 0.553, "nn 2e-5": 0.567, "nn 2e-4": 0.229}
    costs = {each.name: each.costs for each in EXPERIMENTS if each.costs is not None}
    assert list(costs) == ["nn 2e-5", "nn 2e-4"]
    assert all(abs(forward / backprop - ratio) < 0.001 for forward, backprop, ratio in costs.values())


# ---- the study


def test_both_gradients_share_the_published_rate_its_decay_and_the_seeds():
    stage = Reproduction("nn", seeds=2).shared_trials()
    assert [(trial.method, trial.optimizer.lr, trial.seed) for trial in stage[:4]] == [
        ("forward nn 2e-5", 2e-5, 1),
        ("forward nn 2e-5", 2e-5, 2),
        ("backprop nn 2e-5", 2e-5, 1),
        ("backprop nn 2e-5", 2e-5, 2),
    ]
    assert len(stage) == 8
    assert {trial.steps for trial in stage} == {20_000}
    assert {trial.optimizer.decay for trial in stage} == {1e-4}
    assert {repr(trial.task) for trial in stage} == {MNIST_NN}
    assert [Reproduction(rows).length for rows in MODELS] == [25_000, 20_000, 20_000]


def test_the_tuning_gives_both_gradients_the_same_grid_and_steps():
    reproduction = Reproduction("nn", steps=9, seeds=1, is_tuned=True, tuned_steps=7, task=Digits(Mlp((4,))))
    stages = reproduction.study.trials()
    next(stages)
    tuned = stages.send([])
    by_gradient = {
        name: [trial.optimizer.lr for trial in tuned if trial.method == name]
        for name in ("forward nn, tuned", "backprop nn, tuned")
    }
    rates = [1e-4, 3.2e-4, 1e-3, 3.2e-3, 0.01, 0.032, 0.1, 0.32, 1.0]
    assert by_gradient["forward nn, tuned"] == by_gradient["backprop nn, tuned"] == rates
    assert {trial.steps for trial in tuned} == {7}
    assert {trial.steps for trial in reproduction.shared_trials()} == {9}
    assert reproduction.run_counts() == [(2, 9, "final"), (9 + 2 + 6, 7, "tune"), (1, 7, "final")]


def test_a_folder_can_get_seeds_and_tuning_later_but_no_other_number_of_steps():
    def question(**settings: Any) -> str:
        return Reproduction("nn", steps=7, task=Digits(Mlp((4,))), **settings).study.question

    assert question() == question(seeds=2, is_tuned=True, points=3) == question(tuned_steps=7)
    assert question() != question(tuned_steps=5)


def test_the_hours_are_those_of_the_steps_and_of_the_evaluations(monkeypatch: pytest.MonkeyPatch):
    times = {"forward": timing.Timing((3.0,)), "backprop": timing.Timing((2.0,)), "loss": timing.Timing((1.0,))}
    monkeypatch.setattr(study, "time_steps_in_turn", lambda task, seed, rounds: times)
    task = Digits(Mlp((4,)))
    validation, test = (2 * len(split.y) / 64 for split in (task.splits().validation, task.splits().test))
    shared = 2 * (5.0 * 4 + 4 * validation + test)  # two experiments of four steps; each step is evaluated
    assert Reproduction("nn", steps=4, seeds=1, task=task).hours() * 3.6e6 == pytest.approx(shared)
    tuned = (3 + 2 + 6) * (5.0 * 8 + 4 * validation) + 5.0 * 8 + 8 * validation + test
    found = Reproduction("nn", steps=4, seeds=1, is_tuned=True, points=3, tuned_steps=8, task=task)
    assert found.hours() * 3.6e6 == pytest.approx(shared + tuned)


@pytest.mark.parametrize("wrong", [{"rows": "rnn"}, {"steps": 0}, {"seeds": 0}, {"points": 0}, {"tuned_steps": 0}])
def test_an_impossible_reproduction_is_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=r"Rows: logistic, nn, cnn|seeds, points and steps >= 1"):
        Reproduction(**wrong)


# ---- paired times


def test_the_functions_take_turns_and_each_starts_equally_often(monkeypatch: pytest.MonkeyPatch):
    order: list[str] = []
    monkeypatch.setattr(timing, "_milliseconds", lambda step, gpus: step())

    def logged(name: str, milliseconds: float) -> float:
        order.append(name)
        return milliseconds

    steps = {name: lambda name=name: logged(name, float(ord(name))) for name in "abc"}
    times = time_in_turn(steps, rounds=6, warmup=1)
    assert order[:9] == [*"abc", *"bca", *"cab"]
    rounds = [order[start : start + 3] for start in range(0, 21, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert [sum(names[0] == name for names in rounds[1:]) for name in "abc"] == [2, 2, 2]
    assert {name: set(each.samples) for name, each in times.items()} == {"a": {97.0}, "b": {98.0}, "c": {99.0}}
    assert len(times["a"].samples) == 6
    assert times["a"].first == 97.0


def test_the_times_of_a_seed_are_paired_and_recorded_once(tmp_path: Path):
    task = Digits(Mlp((8,)))
    (tmp_path / ledger.RECORDS).touch()
    first = list(speed.time_seeds(task, tmp_path, seeds=2, rounds=3))
    assert [times.seed for times in first] == [1, 2]
    assert list(speed.time_seeds(task, tmp_path, seeds=3, rounds=3)) == [speed.recorded(tmp_path)[3]]
    assert speed.recorded(tmp_path)[1] == first[0]
    assert all(times.ratio > 0 and min(times.costs) > 0 and times.rounds == 3 for times in first)


def test_a_load_that_doubles_all_times_of_a_round_does_not_change_the_ratio(monkeypatch: pytest.MonkeyPatch):
    def in_turn(task: object, seed: int, rounds: int) -> dict[str, timing.Timing]:
        load = (1.0, 1.0, 2.0, 4.0, 8.0)
        base = {"forward": 3.0, "backprop": 2.0, "loss": 1.0}
        return {name: timing.Timing(tuple(ms * factor for factor in load)) for name, ms in base.items()}

    monkeypatch.setattr(speed, "time_steps_in_turn", in_turn)
    times = speed.time_seed(Digits(), 1)
    assert times.ratio == 1.5
    assert times.costs == (3.0, 2.0)


# ---- the evidence


def run(method: str, seed: int, losses: list[float | None], **changed: Any) -> TrialRecord:
    steps = [0, 100, 200, 400][: len(losses)]
    curve = {"validation_step": steps, "validation_loss": losses, "validation_accuracy": [0.5] * len(losses)}
    record = {"trial": f"{method}{seed}", "method": method, "estimator": "-", "optimizer": "-", "phase": "final"}
    record |= {"lr": 2e-4, "seed": seed, "status": "finished", "steps": 20_000, "curve": curve, "seconds": 36.0}
    scores = {"loss": losses[-1], "accuracy": 0.9, "targets": 10_000, "of": 10_000}
    return trial_record(record | {"validation": scores, "test": scores} | changed)


def gathered(*runs: TrialRecord, task: str = MNIST_NN) -> Results:
    study = StudyRecord(task, "mnist", "nn", (), (1,), 0, 20_000, 0.9, "SGD", 64, chance=0.1)
    return Results(study, {"cpu": "a processor", "threads": 1, "torch": "2"}, runs, (), ())


SLOW = [2.3, 2.0, 1.5, 1.0]
QUICK = [2.3, 1.0, 0.8, 0.5]


@pytest.mark.parametrize(
    ("forward", "backprop", "expected"),
    [
        (QUICK, SLOW, 100 / 400),  # both reach 1.0
        (SLOW, QUICK, 400 / 100),
        (SLOW, SLOW, 1.0),
        ([2.3, 1.2, 0.9, 1.1], SLOW, 200 / 400),  # the lowest loss counts, not the last one
        ([2.3, None, 1.5, 1.0], SLOW, 1.0),
    ],
)
def test_the_common_loss_is_the_higher_of_the_two_lowest(
    forward: list[float | None], backprop: list[float | None], expected: float
):
    assert step_ratio((run("f", 1, forward), run("b", 1, backprop)), GUESSING) == expected


def test_a_diverged_run_never_reaches_the_common_loss():
    fine, gone = run("f", 1, list(QUICK)), run("b", 1, list(SLOW), status="diverged")
    assert step_ratio((gone, fine), GUESSING) == inf
    assert step_ratio((fine, gone), GUESSING) == 0.0
    assert step_ratio((gone, gone), GUESSING) is None
    assert (loss_gap((gone, fine)), loss_gap((fine, gone))) == (inf, -inf)
    assert loss_gap((gone, gone)) is None
    assert loss_gap((fine, run("b", 1, list(SLOW)))) == -0.5


def test_a_run_that_is_never_better_than_guessing_never_reaches_the_common_loss():
    fine, lost = run("f", 1, list(QUICK)), run("b", 1, [2.3, 6.0, 90.0, 121.0])
    assert step_ratio((lost, fine), GUESSING) == inf
    assert step_ratio((fine, lost), GUESSING) == 0.0
    assert step_ratio((lost, lost), GUESSING) is None
    found = evidence(gathered(*nn_runs([2.3, 6.0, 90.0], [2.3, 6.0, 90.0])), 1.9)
    assert found["nn 2e-5: time to a common loss"][1].values == ()
    assert "seed 1, 2, 3" in found["nn 2e-5: time to a common loss"][1].note


def test_only_the_seeds_of_both_are_paired():
    results = gathered(run("f", 1, [1.0]), run("f", 2, [1.0]), run("b", 2, [1.0]), run("b", 3, [1.0]))
    assert list(pairs(results, "f", "b")) == [2]
    failed = gathered(run("f", 1, [1.0], status="failed"), run("b", 1, [1.0]))
    assert pairs(failed, "f", "b") == {}


def evidence(results: Results, ratio: float, rows: str = "nn") -> dict[str, tuple[str, Evidence]]:
    times = {seed: StepTimes(seed, 30.0 * ratio, 30.0, 10.0, ratio, 30) for seed in (1, 2, 3)}
    return {
        claim.name: (outcome(claim, shown), shown) for claim, shown in claims(results, times, rows, "run", "there")
    }


def nn_runs(forward: list[float], backprop: list[float], **changed: Any) -> list[TrialRecord]:
    return [
        run(f"{gradient} {name}", seed, list(losses), **changed)
        for name in ("nn 2e-5", "nn 2e-4")
        for gradient, losses in (("forward", forward), ("backprop", backprop))
        for seed in (1, 2, 3)
    ]


def test_the_claims_hold_where_the_runs_are_as_published():
    found = evidence(gathered(*nn_runs(SLOW, SLOW)), 0.567)
    assert found["nn 2e-5: time to a common loss"][0] == "holds"
    assert found["nn 2e-4: time to a common loss"][0] == "holds in direction only"
    assert found["nn 2e-5: loss"][0] == "holds"
    assert found["nn 2e-4: loss"][0] == "does not hold"
    assert found["nn: time of a step"][0] == "holds in direction only"  # published: 0.586 to 0.598
    assert found["nn: time to a common loss, each tuned"][0] == "inconclusive (not run)"
    found = evidence(gathered(*nn_runs(QUICK, SLOW)), 0.916)
    assert found["nn 2e-4: time to a common loss"][0] == "holds"  # 100 / 400 * 0.916 = 0.229
    assert found["nn 2e-4: loss"][0] == "holds in direction only"  # -0.5; published: -0.36


def test_a_slower_step_refutes_the_claims_about_time():
    runs = nn_runs(SLOW, SLOW)
    runs += [
        run(f"{gradient} nn, tuned", seed, list(SLOW)) for gradient in ("forward", "backprop") for seed in (1, 2, 3)
    ]
    found = evidence(gathered(*runs), 1.9)
    for name in ("nn 2e-5: time to a common loss", "nn: time of a step", "nn: time to a common loss, each tuned"):
        assert found[name][0] == "does not hold"
    assert found["nn: time of a step"][1].note == "Here R_f = 5.70 and R_b = 3.00, means over seeds."
    assert found["nn: time to a common loss, each tuned"][1].values == (1.9, 1.9, 1.9)


def test_fewer_steps_and_another_task_are_a_reduced_scale():
    shorter = evidence(gathered(*nn_runs(SLOW, SLOW, steps=400)), 1.9)["nn 2e-5: loss"]
    assert shorter[0] == "holds (reduced scale)"
    assert shorter[1].scale == f"400 of 20,000 steps, `{MNIST_NN}`"
    for task in ("Digits(batch=64)", MNIST_NN.replace("Mnist", "FashionMnist")):
        found = evidence(gathered(*nn_runs(SLOW, SLOW), task=task), 1.9)
        assert all(verdict.endswith(("(reduced scale)", "(not run)")) for verdict, _ in found.values())


@pytest.mark.parametrize("rows", ["logistic", "cnn"])
def test_every_model_has_its_claims(rows: str):
    names = [claim.name for claim, _ in claims(gathered(), {}, rows, "-", "-")]
    assert names[0] == f"{experiments(rows)[0].name}: time to a common loss"
    assert names[-1] == f"{rows}: time to a common loss, each tuned"
    assert len(set(names)) == len(names) == {"logistic": 4, "cnn": 3}[rows]


def test_the_page_has_the_claims_the_runs_and_the_assumptions():
    runs = [*nn_runs(SLOW, SLOW), run("forward nn, tuned", 1, [9.0], status="diverged")]
    written = page(gathered(*runs), {1: StepTimes(1, 3.0, 2.0, 1.0, 1.5, 30)}, "nn", "gradcost reproduce", "`there`")
    assert "| *nn 2e-5: loss* | **holds** |" in written
    assert "| hardware | cpu a processor, threads 1, torch 2 |" in written
    assert "| core-hours | 0.13 |" in written  # 13 runs of 36 s
    assert "| forward nn 2e-5 | 0.0002 | 3 | 1.000 | 1.000 | 90.0% | 3 |" in written
    assert "| forward nn, tuned | 0.0002 | 1 | 1 of 1 diverged | - | - | 3 |" in written
    assert "| padding of the convolutions | none |" in written


# ---- the command


ON_DIGITS = ("reproduce", "baydin2022", "--task", "digits")


def here(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return inside(*ON_DIGITS, *options, folder=folder)


def reproduce(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gradcost.cli.main", *ON_DIGITS, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_the_command_runs_times_and_judges_and_resumes(tmp_path: Path):
    options = ["--rows", "logistic", "--steps", "20", "--seeds", "3", "--tuned", "--tuning-points", "3"]
    options += ["--tuned-steps", "10", "-o", "out"]
    first = reproduce(tmp_path, *options, "--json", "-j", "2")
    assert first.returncode == 0, first.stderr
    output = json.loads(first.stdout)
    assert output["ran"] == 6 + 2 * (3 + 2 + 6 + 3)
    verdicts = {claim["claim"]: claim["verdict"] for claim in output["claims"]}
    assert len(verdicts) == 4
    assert all(verdict.endswith("(reduced scale)") for verdict in verdicts.values())
    assert [line["method"] for line in output["runs"]] == [
        "forward logistic",
        "backprop logistic",
        "forward logistic, tuned",
        "backprop logistic, tuned",
    ]
    again = here(tmp_path, *options, "--page", "page.md")
    assert again.returncode == 0, again.stderr
    written = (tmp_path / "page.md").read_text()
    assert "20 steps per run with the shared rate, 10 with the tuned rates." in written
    shown = "--steps 20 --seeds 3 --tuned --tuning-points 3 --tuned-steps 10 --task digits --page page.md"
    assert shown in written
    assert written == page_of(tmp_path / "out", written)
    kinds = [record["kind"] for record in ledger.records(tmp_path / "out")]
    assert kinds.count("paired times") == 3
    assert kinds.count("trial") == output["ran"]


def page_of(folder: Path, written: str) -> str:
    """Write the page of some records again, with the rows and the command of a page."""
    command = next(line.split("`")[1] for line in written.splitlines() if line.startswith("| command |"))
    words = command.split()
    return page(read(folder), speed.recorded(folder), words[words.index("--rows") + 1], command, f"`{folder.name}`")


def test_a_page_in_the_docs_is_that_of_the_records_beside_it():
    docs = Path(__file__).parents[2] / "docs" / "results"
    for folder in docs.glob("baydin2022-*"):
        written = (docs / f"{folder.name.replace('-', '_')}.md").read_text()
        assert page_of(folder, written) == written


@pytest.mark.slow
def test_the_steps_can_be_timed_alone_and_the_same_folder_trains_later(tmp_path: Path):
    options = ["--rows", "logistic", "--steps", "2", "--seeds", "3", "-o", "out"]
    timed = here(tmp_path, *options, "--times-only", "--page", "page.md")
    assert timed.returncode == 0, timed.stderr
    written = (tmp_path / "page.md").read_text()
    assert "only the times of a step; no run was trained" in written
    assert "| *logistic: time to a common loss* | **inconclusive (not run)** |" in written
    assert written == page_of(tmp_path / "out", written)
    assert [record["kind"] for record in ledger.records(tmp_path / "out")] == ["paired times"] * 3
    trained = reproduce(tmp_path, *options, "-j", "1")
    assert trained.returncode == 0, trained.stderr
    assert len(read(tmp_path / "out").trials) == 6
    other = here(tmp_path, *options, "--times-only", "--steps", "3")
    assert other.returncode == 2
    assert "holds another study" in other.stderr


def test_the_dry_run_shows_the_runs_and_their_hours(tmp_path: Path):
    shown = here(tmp_path, "--rows", "nn", "--seeds", "1", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "backprop nn 2e-4" in shown.stdout
    assert not list(tmp_path.iterdir())
    assert "hours of one core" in shown.stdout


def test_the_command_explains_what_it_refuses(tmp_path: Path):
    for options, message in (
        (["--rows", "rnn"], "Rows: logistic, nn, cnn"),
        (["--epochs", "3"], "write --steps"),
        (["--protocol", "code"], "--protocol is an option of rike2022"),
        (["--times-only", "--records"], "choose one"),
    ):
        refused = here(tmp_path, *options)
        assert refused.returncode == 2
        assert message in " ".join(refused.stderr.split())


def test_another_data_set_keeps_the_model():
    tried = Reproduction("nn", steps=5, task=task_of("nn", Digits)).training_task
    assert (tried.model, tried.batch) == (MODELS["nn"], 64)
    with torch.no_grad():
        assert tried.objective(Key(0)).model(tried.batch_at(Key(0), 0).x).shape == (64, 10)
