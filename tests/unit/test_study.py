"""A study runs each trial once and only once, whatever is killed meanwhile, and its numbers are those of quiet."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gradcost.results import ledger
from gradcost.results.records import Scores, TrialRecord
from gradcost.results.tuning import best, chosen, confirmed_scores, next_rate, scores
from gradcost.studies.trial_log import evaluated_steps
from in_process import inside

STUDY = """
from gradcost import SGD, Trial, backprop, forward_gradient, mezo, study
from gradcost.tasks.digits import Digits

METHODS = {{"backprop": backprop(), "forward_gradient": forward_gradient(), "mezo": mezo()}}
RATES, SEEDS, STEPS = {rates}, {seeds}, {steps}


@study("Which one learns digits?")
def small():
    tuned = yield [
        Trial(Digits(), name, METHODS[name], SGD(lr), STEPS, "tune", 0) for name in METHODS for lr in RATES
    ]
    for name, estimator in METHODS.items():
        runs = [run for run in tuned if run.method == name]
        lr = max(runs, key=lambda run: run.validation.accuracy if run.status == "finished" else -1.0).lr
        yield [Trial(Digits(), name, estimator, SGD(lr), STEPS, "final", seed) for seed in SEEDS]
"""


NOT_COMPARED = ("seconds", "note", ledger.CHECKSUM)


def write_study(folder: Path, rates: tuple[float, ...], seeds: tuple[int, ...], steps: int) -> None:
    (folder / "small.py").write_text(STUDY.format(rates=rates, seeds=seeds, steps=steps))


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "gradcost.cli.main", "study", str(folder / "small.py"), *more]


def call(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *more), cwd=folder, capture_output=True, text=True, timeout=600)


def call_inside(folder: Path, *more: str, name: str = "small.py") -> subprocess.CompletedProcess[str]:
    return inside("study", str(folder / name), *more, folder=folder)


def refused(folder: Path, *more: str, name: str = "small.py") -> str:
    """Return the message of a study that is refused before anything runs."""
    ran = call_inside(folder, *more, name=name)
    assert ran.returncode == 2
    return ran.stderr


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of trials that ended, each once, without how long they took and what they had to work around."""
    found: dict[str, dict[str, Any]] = {}
    for line in (folder / "records.jsonl").read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        if record["kind"] == "trial" and record["status"] != "failed":
            assert record["trial"] not in found, "a trial was run twice"
            found[record["trial"]] = {name: value for name, value in record.items() if name not in NOT_COMPARED}
    return found


def test_a_dry_run_of_a_folder_tells_what_is_missing_there(tmp_path: Path):
    write_study(tmp_path, (0.01, 0.1), (1,), 3)
    assert call_inside(tmp_path, "-o", "out").returncode == 0
    ran = call_inside(tmp_path, "-o", "out", "--dry-run")
    assert "out has 9 trials on record, 6 of the first 6." in ran.stdout
    assert "The steps of the 0 missing ones of the first 6 trials take about 0" in ran.stdout
    as_json = json.loads(call_inside(tmp_path, "-o", "out", "--dry-run", "--json").stdout)
    assert (as_json["on record"], as_json["seconds"]) == (9, 0)
    (tmp_path / "small.py").write_text((tmp_path / "small.py").read_text().replace("learns digits", "is best"))
    assert "out holds another study" in refused(tmp_path, "-o", "out", "--dry-run")


SPOILT = """
@value
class Spoilt(Digits):
    def splits(self):
        train, *others = super().splits()
        return Splits(Split(train.x, train.y[:-1]), *others)
"""


@pytest.mark.parametrize("way", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_spoilt_data_are_refused_by_a_dry_run_as_by_a_run(tmp_path: Path, way: tuple[str, ...]):
    write_study(tmp_path, (0.01,), (1,), 3)
    text = (tmp_path / "small.py").read_text().replace("Trial(Digits()", "Trial(Spoilt()")
    imports = "from gradcost.core.value import value\nfrom gradcost.tasks.task import Split, Splits\n"
    (tmp_path / "small.py").write_text(text.replace("\nMETHODS", f"{imports}{SPOILT}\nMETHODS", 1))
    assert "the train split of Spoilt has 1,197 inputs and 1,196 targets" in refused(tmp_path, "-o", "out", *way)
    assert not (tmp_path / "out" / "study.json").exists()


def kill_again_and_again(folder: Path, kills: int, workers: str, longest: float, chance: random.Random) -> int:
    """Start the study, kill it or one of its workers at a random moment, and so on; how often that was."""
    done = 0
    while done < kills:
        running = subprocess.Popen(
            command(folder, "-j", workers, "-o", "killed", "--every", "0.2"),
            cwd=folder,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        while running.poll() is None and done < kills:
            if not workers_of(running.pid):  # what is killed before anything runs shows nothing
                time.sleep(0.02)
                continue
            time.sleep(chance.uniform(0.0, longest))
            workers_now = workers_of(running.pid)
            if running.poll() is not None:
                break
            done += 1
            if workers_now and chance.random() < 0.5:
                kill(chance.choice(workers_now))
            else:
                kill(running.pid)
                break
        if running.wait() == 0:  # nothing was left to be killed
            break
    return done


def workers_of(pid: int) -> list[int]:
    return [below for below, kind in descendants(pid) if kind == "worker"]


def descendants(pid: int) -> list[tuple[int, str]]:
    """The processes below one, with what they were started as: a worker is a child of the fork server."""
    below = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            below.setdefault(parent, []).append(int(path.name))
        except OSError:
            continue
    found, todo = [], [(pid, 0)]
    while todo:
        at, depth = todo.pop()
        for child in below.get(at, []):
            found.append((child, "worker" if depth >= 1 else "forkserver"))
            todo.append((child, depth + 1))
    return found


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def assert_survives(
    tmp_path: Path, kills: int, longest: float, rates: tuple[float, ...], seeds: tuple[int, ...], steps: int
) -> None:
    write_study(tmp_path, rates, seeds, steps)
    quiet = call_inside(tmp_path, "-j", "2", "-o", "quiet")
    assert quiet.returncode == 0, quiet.stderr
    expected = finished(tmp_path / "quiet")
    assert len(expected) == 3 * (len(rates) + len(seeds))
    assert kill_again_and_again(tmp_path, kills, "2", longest, random.Random(8)) == kills
    lines = (tmp_path / "killed" / "records.jsonl").read_text()
    assert "its process was killed by signal 9" in lines, "none of the kills met a worker whose parent lived to tell"
    last = call(tmp_path, "-j", "2", "-o", "killed", "--every", "0.2")
    assert last.returncode == 0, last.stderr
    assert finished(tmp_path / "killed") == expected
    assert list((tmp_path / "killed" / "trials").glob("*")) == []


@pytest.mark.slow
def test_a_study_survives_kills_of_its_parent_and_its_workers(tmp_path: Path):
    assert_survives(tmp_path, kills=4, longest=0.4, rates=(0.01, 0.1), seeds=(1,), steps=400)


@pytest.mark.slow
def test_a_study_of_24_trials_survives_20_kills(tmp_path: Path):
    assert_survives(tmp_path, kills=20, longest=2.0, rates=(0.001, 0.01, 0.1, 1.0), seeds=(1, 2, 3, 4), steps=4000)


def test_a_study_that_is_not_there_or_not_alone_is_refused(tmp_path: Path):
    assert "there is no file" in refused(tmp_path)
    (tmp_path / "small.py").write_text("x = 1\n")
    assert "must hold one study" in refused(tmp_path)
    write_study(tmp_path, (0.1,), (1,), 20)
    assert "holds no study 'smal'. Did you mean small?" in refused(tmp_path, name="small.py:smal")
    assert "no executor 'rey'. Did you mean ray?" in refused(tmp_path, "--executor", "rey")


def test_a_dry_run_runs_nothing(tmp_path: Path):
    write_study(tmp_path, (0.1, 0.2), (1,), 20)
    shown = call_inside(tmp_path, "--dry-run", "-o", "none")
    assert shown.returncode == 0
    assert re.search(r"the first 6 trials take about [0-9.]+ s with -j \d", shown.stdout)
    assert not (tmp_path / "none").exists()


def test_the_trials_of_a_study_run_on_the_device_that_is_named(tmp_path: Path):
    """The question names it, so that a folder has the runs of one device."""
    write_study(tmp_path, (0.1,), (1,), 20)
    ran = call_inside(tmp_path, "-o", "results", "--device", "cpu", "-j", "1")
    assert ran.returncode == 0, ran.stderr
    study = json.loads((tmp_path / "results" / "study.json").read_text())
    assert study["question"] == "Which one learns digits? Trials run on cpu."
    found = [json.loads(line) for line in (tmp_path / "results" / "records.jsonl").read_text().splitlines()]
    trials = [record for record in found if record["kind"] == "trial"]
    assert {record["task"] for record in trials} == {study["task"]}
    assert re.match(r"Placed\(task=Digits\(.*device='cpu'", study["task"])
    plain = call_inside(tmp_path, "-o", "plain", "-j", "1")
    assert plain.returncode == 0, plain.stderr
    assert numbers(tmp_path / "plain") == numbers(tmp_path / "results")
    other = " ".join(call_inside(tmp_path, "-o", "results").stderr.split())
    assert "It holds: Which one learns digits? Trials run on cpu. Now: Which one learns digits?" in other


def test_a_study_of_a_language_model_prints_and_ranks_losses(tmp_path: Path):
    (tmp_path / "text.py").write_text(
        "from gradcost import SGD, Trial, backprop, study\n"
        "from gradcost.tasks import CharLm\n"
        "from gradcost.tasks.architectures import Gpt\n\n"
        "@study('Which rate learns?')\n"
        "def text():\n"
        "    task = CharLm(Gpt(layers=1, width=8, heads=2), batch=2, length=16)\n"
        "    yield [Trial(task, 'backprop', backprop(), SGD(lr), 3, 'tune', 0, 3.0) for lr in (1e-3, 1e-2)]\n"
    )
    ran = call_inside(tmp_path, "-o", "results", "-j", "1", name="text.py")
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"tune lr 0\.001 seed 0: 4\.\d+ validation loss", ran.stderr)
    assert "accuracy" not in ran.stderr
    assert json.loads((tmp_path / "results" / "study.json").read_text())["metric"] == "loss"


def numbers(folder: Path) -> list[Any]:
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return [(record["method"], record["phase"], record["test"]) for record in records if record["kind"] == "trial"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_here_is_refused_before_the_runs(tmp_path: Path):
    write_study(tmp_path, (0.1,), (1,), 20)
    assert "torch finds no CUDA device here" in refused(tmp_path, "--device", "cuda")


def test_the_next_rate_lies_beyond_an_edge_or_beside_the_winner():
    def found(*scores: float) -> dict[float, tuple[float, float, float]]:
        return {10.0**place: (score, min(score, 0.0), 0.0) for place, score in enumerate(scores)}

    assert next_rate(found(3, 2, 1), 10) == 0.1
    assert next_rate(found(1, 2, 3), 10) == 1000.0
    assert next_rate(found(1, 3, 2), 10) == 32.0
    assert next_rate(found(2, 3, 1), 10) == 3.2
    lost = (-float("inf"), -float("inf"), 0.0)
    grid = {1e-4: (1, 0, 0), 1e-3: (2, 0, 0), 1e-2: lost}
    assert next_rate(grid, 10) == 3.2e-4
    assert next_rate(grid | {3.2e-4: (1.5, 0, 0)}, 10) == 3.2e-3  # the wider gap, though what bounds it diverged
    assert next_rate(found(-float("inf"), -float("inf")), 10) == 0.1  # all diverged: smaller
    assert next_rate({1.0: (1, 0, 0), 1.1: (2, 0, 0), 1.2: (1, 0, 0)}, 1.1) == 0.91  # two digits hold nothing between
    assert best(found(1, -float("inf"), 3), 3) == [100.0, 1.0]


def test_a_learning_rate_of_which_one_run_diverged_is_the_worst():
    def run(lr: float, seed: int, accuracy: float | None) -> TrialRecord:
        status, score = (
            ("diverged", None) if accuracy is None else ("finished", Scores(1 - accuracy, accuracy, score=accuracy))
        )
        return TrialRecord(f"{lr} {seed}", "a", "", "", "confirm", lr, seed, status, 10, validation=score)

    runs = [run(0.1, 1, 0.9), run(0.1, 2, None), run(0.01, 1, 0.5), run(0.01, 2, 0.7), run(1.0, 1, None)]
    found = scores(runs, "a")
    assert found[0.01] == (pytest.approx(0.6), pytest.approx(-0.4), -0.01)
    assert found[0.1] == (-float("inf"), -float("inf"), -0.1)
    assert best(found, 3) == [0.01]
    assert chosen(runs, "a") == 0.01


def test_a_rate_is_chosen_by_the_mean_over_its_tuning_and_confirming_seeds():
    def run(lr: float, phase: str, seed: int, accuracy: float) -> TrialRecord:
        score = Scores(1 - accuracy, accuracy, score=accuracy)
        return TrialRecord(f"{lr}{phase}{seed}", "a", "", "", phase, lr, seed, "finished", 10, validation=score)

    tuned = [run(0.1, "tune", 0, 0.90), run(0.01, "tune", 0, 0.70), run(1.0, "tune", 0, 0.95)]
    confirmed = [run(0.1, "confirm", 1, 0.80), run(0.01, "confirm", 1, 0.85)]
    assert chosen(tuned, "a") == 1.0
    assert chosen(tuned + confirmed, "a") == 0.1  # 0.85 against 0.775; by the confirming seed alone it was 0.01
    assert confirmed_scores(tuned + confirmed, "a").keys() == {0.1, 0.01}


@pytest.mark.parametrize("steps", [1, 2, 19, 400, 10_000])
def test_final_runs_are_scored_at_steps_that_grow_by_a_quarter_and_at_the_end(steps: int):
    final = sorted(evaluated_steps(steps, "final"))
    assert final[0] == 1
    assert final[-1] == steps
    assert all(after <= 1.25 * before + 1 for before, after in itertools.pairwise(final))
    assert len(evaluated_steps(steps, "tune")) <= 5
