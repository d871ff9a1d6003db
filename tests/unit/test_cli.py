"""The command line as a person meets it: real processes, exit codes, what is printed and what is left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from gradcost.cli.main import app
from in_process import WIDE, inside

COMMAND = [sys.executable, "-m", "gradcost.cli.main"]
PLAIN = ["--extra-points", "0", "--confirm-seeds", "0"]  # a grid and the final runs alone
GRID = ["--tuning-points", "2", "--lr-range", "0.01:0.1"]
SHORT = ["compare", "--steps", "30", "--seeds", "2", *GRID, *PLAIN]
TWO = ["--method", "backprop()", "--method", "mezo()"]
THREE = [*TWO, "--method", "checkpointed()"]

USER_TASKS = """
from dataclasses import dataclass
import torch.nn.functional as F
from gradcost import Objective
from gradcost.tasks import Digits

@dataclass(frozen=True)
class Mine:
    classes = 10
    batch = 64
    def objective(self, key): return Digits().objective(key)
    def batch_at(self, key, step): return Digits().batch_at(key, step)
    def splits(self): return Digits().splits()
    def score(self, model, split): return Digits().score(model, split)

@dataclass(frozen=True)
class Frozen(Mine):
    def objective(self, key):
        objective = super().objective(key)
        return Objective(objective.model.requires_grad_(False), objective.loss)

@dataclass(frozen=True)
class Vector(Mine):
    def objective(self, key):
        model = super().objective(key).model
        return Objective(model, lambda m, b: F.cross_entropy(m(b.x), b.y, reduction="none"))

@dataclass(frozen=True)
class NotANumber(Mine):
    def objective(self, key):
        objective = super().objective(key)
        return Objective(objective.model, lambda m, b: objective.loss(m, b) * float("nan"))

@dataclass(frozen=True)
class Failing(Mine):
    def batch_at(self, key, step):
        if step == 7:
            raise RuntimeError("the seventh batch is broken")
        return super().batch_at(key, step)

class NoRepr:
    objective = batch_at = splits = score = None

broken = Mine(1)
"""


def gradcost(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=folder,
        env=os.environ | WIDE | environment,
        capture_output=True,
        text=True,
        timeout=300,  # a busy machine
    )


NOISY = """
import torch
from torch import nn
import gradcost
from gradcost import SGD, Trial, backprop
from gradcost.tasks import Digits
print("a line of the user's file")
def make():
    print("a line of the user's function")
    return nn.Linear(4, 1), lambda model, batch: model(batch[0]).square().mean()
def batch():
    print("a line of the user's data")
    return torch.ones(16, 4), torch.zeros(16)
@gradcost.study("Which rate?")
def rates():
    yield [Trial(Digits(), "a", backprop(), SGD(0.1), 5)]
"""
DRY_RUNS = [
    ("compare", "--steps", "5", "--method", "backprop()"),
    (
        "train",
        "mezo()",
        "--model",
        "noisy.py:make",
        "--data",
        "noisy.py:batch",
        "--optimizer",
        "SGD(0.1)",
        "-o",
        "out",
    ),
    ("study", "noisy.py"),
    ("reproduce", "rike2022", "--task", "digits"),
    ("reproduce", "baydin2022", "--task", "digits", "--steps", "5"),
    ("reproduce", "panchal2025", "--costs"),
]


def as_json(text: str) -> Any:
    """Read JSON strictly: without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("arguments", DRY_RUNS, ids=lambda arguments: " ".join(arguments[:2]))
def test_a_dry_run_as_json_is_json(arguments: tuple[str, ...], tmp_path: Path):
    (tmp_path / "noisy.py").write_text(NOISY)
    ran = inside(*arguments, "--dry-run", "--json", folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert as_json(ran.stdout)


def test_the_dry_runs_above_are_all():
    both = {
        name
        for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
        if {"--dry-run", "--json"} <= {option for parameter in command.params for option in parameter.opts}
    }
    assert both == {command for command, *_ in DRY_RUNS}


def test_what_the_users_code_prints_and_an_infinite_loss_leave_the_result_json(tmp_path: Path):
    (tmp_path / "noisy.py").write_text(NOISY)
    arguments = ["backprop()", "--optimizer", "SGD(lr=1e30)", "--steps", "3", "--data", "noisy.py:batch"]
    ran = inside("train", *arguments, "--model", "noisy.py:make", "-o", "out", "--json", folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert as_json(ran.stdout)["loss"] is None
    for line in ("file", "function", "data"):
        assert f"a line of the user's {line}" in ran.stderr


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def numbers(folder: Path) -> dict[str, dict]:
    """What the trials found, without how long they took."""
    kept = ("status", "curve", "validation", "test", "reached", "steps")
    return {r["trial"]: {name: r.get(name) for name in kept} for r in records(folder) if r["kind"] == "trial"}


def test_help_imports_neither_torch_nor_a_plotting_library():
    code = (
        "import sys\nfrom gradcost.cli.main import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'numba', 'altair', 'vl_convert', 'sklearn', 'jinja2', 'pandas'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "compare" in ran.stdout
    assert "heavy: []" in ran.stdout


class Finished(NamedTuple):
    """A folder with the finished comparison of `THREE` in `r`, and what the command printed."""

    folder: Path
    answer: dict[str, Any]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One comparison for several tests. A test that changes its folder takes a copy."""
    folder = tmp_path_factory.mktemp("finished")
    ran = inside(*SHORT, *THREE, "-o", "r", "--json", folder=folder)
    assert ran.returncode == 0, ran.stderr
    return Finished(folder, json.loads(ran.stdout))


def test_compare_runs_resumes_and_repeats_itself(tmp_path: Path, finished: Finished):
    answer = finished.answer
    assert [row["method"] for row in answer["rows"]] == ["backprop()", "mezo()", "checkpointed()"]
    assert answer["verdict"]
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)
    trials = [r for r in records(tmp_path / "r") if r["kind"] == "trial"]
    assert len(trials) == 3 * (2 + 2)
    assert all((r["test"] is not None) == (r["phase"] == "final") for r in trials)

    again = inside(*SHORT, *THREE, "-o", "r", "--json", folder=tmp_path)
    assert again.returncode == 0
    assert [row["accuracy"] for row in json.loads(again.stdout)["rows"]] == [
        row["accuracy"] for row in answer["rows"]
    ]
    assert [r for r in records(tmp_path / "r") if r["kind"] == "trial"] == trials  # with the seconds of the first

    assert inside(*SHORT, "--method", "mezo()", "-o", "two", folder=tmp_path).returncode == 0  # in new processes
    assert len(numbers(tmp_path / "two")) == 4
    assert numbers(tmp_path / "two").items() <= numbers(tmp_path / "r").items()
    assert (tmp_path / "two" / "report.html").stat().st_size > 10_000


def test_backprop_and_checkpointed_backprop_find_the_same_bits(finished: Finished):
    trials = [r for r in records(finished.folder / "r") if r["kind"] == "trial"]
    found = {
        method: {(r["phase"], r["lr"], r["seed"]): (r["curve"], r["test"]) for r in trials if r["method"] == method}
        for method in ("backprop()", "checkpointed()")
    }
    assert len(found["backprop()"]) == 4
    assert found["backprop()"] == found["checkpointed()"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The numbers of the comparison below when nothing happens to it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert inside(*LONGER, folder=folder).returncode == 0
    return numbers(folder / "r")


LONGER = [
    "compare",
    "--steps",
    "400",
    "--tuning-points",
    "4",
    "--seeds",
    "2",
    "--lr-range",
    "0.01:0.1",
    *PLAIN,
    *TWO,
    "-o",
    "r",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blow", "code"),
    [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_what_finished_is_kept_and_the_same_command_goes_on(
    tmp_path: Path, undisturbed: dict[str, dict], blow: signal.Signals, code: int
):
    process = subprocess.Popen([*COMMAND, *LONGER], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    path = tmp_path / "r" / "records.jsonl"
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(blow)
    _, said = process.communicate(timeout=60)  # ends when the workers have let go of the pipe, too
    assert process.returncode == code
    assert blow != signal.SIGINT or "the same command resumes" in said
    kept = path.read_bytes()

    assert gradcost(*LONGER, folder=tmp_path).returncode == 0
    assert path.read_bytes().startswith(kept)
    names = [r["trial"] for r in records(tmp_path / "r") if r["kind"] == "trial"]
    assert len(names) == len(set(names)) == 2 * (4 + 2)
    assert numbers(tmp_path / "r") == undisturbed


def test_an_interrupt_before_the_first_trial_says_that_nothing_was_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for name in ("forecast_comparison", "make_comparison"):
        monkeypatch.setattr(f"gradcost.cli.compare.{name}", interrupted)
        ran = inside(*SHORT, "--dry-run", "-o", "r", folder=tmp_path)
        assert ran.returncode == 130
        assert ran.stderr == "gradcost: interrupted; this command had not recorded anything yet.\n"


def test_a_torn_last_line_costs_that_line_alone(tmp_path: Path, finished: Finished):
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)
    whole = numbers(tmp_path / "r")
    path = tmp_path / "r" / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    trials = [line for line in lines if b'"kind":"trial"' in line]
    path.write_bytes(b"".join(trials[:-1]) + trials[-1][:50])
    assert inside(*SHORT, *THREE, "-o", "r", folder=tmp_path).returncode == 0
    readable = [line for line in path.read_bytes().splitlines() if line != trials[-1][:50]]
    assert {json.loads(line)["trial"] for line in readable if b'"kind":"trial"' in line} == set(whole)


def test_a_dry_run_tells_what_would_run_and_leaves_nothing(tmp_path: Path):
    ran = inside(*SHORT, "--dry-run", folder=tmp_path)
    assert ran.returncode == 0
    assert "20 trials of 30 steps" in ran.stdout
    assert re.search(r"The steps take about [0-9.]+ s with -j \d+\.", ran.stdout)
    as_json = json.loads(inside(*SHORT, "--dry-run", "--json", folder=tmp_path).stdout)
    assert (as_json["trials"], as_json["steps"], len(as_json["methods"])) == (20, 30, 5)
    each = sum(method["ms"] for method in as_json["methods"].values())
    assert as_json["seconds"] == pytest.approx(4 * 30 * each / 1e3 / (os.cpu_count() or 1))
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_folder_tells_what_is_missing_there(tmp_path: Path, finished: Finished):
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "r" / "records.jsonl").read_bytes()
    lines = before.splitlines(keepends=True)
    lost = next(line for line in lines if b'"method":"mezo()"' in line and b'"kind":"trial"' in line)
    (tmp_path / "r" / "records.jsonl").write_bytes(b"".join(line for line in lines if line != lost))
    ran = inside(*SHORT, *THREE, "-o", "r", "--dry-run", folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "Up to 1 trials of 30 steps would run and be recorded in r, which has 11 already" in ran.stdout
    plan = json.loads(inside(*SHORT, *THREE, "-o", "r", "--dry-run", "--json", folder=tmp_path).stdout)
    one = 30 * plan["methods"]["mezo()"]["ms"] / 1e3 / (os.cpu_count() or 1)
    assert (plan["trials"], plan["on record"], plan["seconds"]) == (1, 11, pytest.approx(one))
    other = inside(*SHORT, *TWO, "-o", "r", "--dry-run", folder=tmp_path)
    assert other.returncode == 2
    assert "r holds another comparison" in other.stderr


def test_a_dry_run_of_a_million_probes_tells_what_a_step_takes(tmp_path: Path):
    """Before, it ran three such steps first: hours."""
    ran = inside("compare", "--method", "fzoo(probes=1000000)", "--steps", "5", "--dry-run", folder=tmp_path)
    assert ran.returncode == 0
    assert "fzoo(probes=1000000): each step costs 1,000,001 forward passes" in ran.stdout + ran.stderr
    assert re.search(r"The steps take about [0-9.]+ h with -j", ran.stdout)


def test_what_does_not_fit_the_memory_is_a_row_with_its_reason(tmp_path: Path):
    ran = inside(*SHORT, *TWO, "--memory-beyond-weights", "40000B", "-o", "r", folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "over the budget" in ran.stdout
    assert [r["method"] for r in records(tmp_path / "r") if r["kind"] == "refused"] == ["backprop()"]
    nothing = inside(*SHORT, *TWO, "--memory-beyond-weights", "1kB", "-o", "none", folder=tmp_path)
    assert nothing.returncode == 4


def test_backprop_that_does_not_fit_recomputes_what_it_must(tmp_path: Path):
    """charlm's blocks can be run again, so an exact gradient fits where plain backpropagation does not."""
    arguments = ["compare", "--task", "charlm", "--model", "Gpt(layers=4, width=16, heads=2)", "--dry-run"]
    plain = inside(*arguments, folder=tmp_path).stdout.splitlines()
    assert not any("backprop in" in line for line in plain)
    ran = inside(*arguments, "--memory-beyond-weights", "2.5MiB", folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "backprop(): not run. a step needs" in ran.stderr + ran.stdout
    assert any(line.startswith("backprop in 2.5 MiB") for line in ran.stdout.splitlines())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--task", "mnst"], "Did you mean mnist"),
        (["--model", "mpl"], "Did you mean mlp"),
        (["--method", "mzo()"], "mezo(eps=0.001, probes=1)"),
        (["--method", "mezo(probes=0)"], "1 or more, not 0"),
        (["--method", "forward_gradient(probes=0)"], "probes is the number of directions per estimate, 1 or more"),
        (["--method", "mezo(eps=0)"], "must be above 0"),
        (["--method", "mezo()", "--method", "mezo()"], "given twice"),
        (["--memory-beyond-weights", "2XB"], "not a number of bytes"),
        (["--lr-range", "1"], "not a range of learning rates"),
        (["--task", "mine.py:Frozen"], "no trainable parameters"),
        (["--task", "mine.py:Vector"], "must be a scalar"),
        (["--task", "mine.py:NotANumber"], "is nan before the first step"),
        (["--task", "mine.py:Nobody"], "defines no Nobody"),
        (["--task", "mine.py:NoRepr"], "frozen dataclass"),
        (["--task", "other.py:X"], "no file"),
        (["--task", "bad.py:X"], "could not be imported"),
        (["--task", "CharLm(text='nowhere.txt')"], "nowhere.txt"),
        (["--steps", "0"], "greater than or equal to 1"),
        (["--target", "90"], "write 0.9 for 90%"),
        (["--target", "-1"], "an accuracy from 0 to 1, not -1.\n"),
        (["--target", "900"], "an accuracy from 0 to 1, not 900.\n"),
        (["--trial-timeout", "-5"], "'--trial-timeout': -5 is not a number of seconds above 0."),
        (["--trial-timeout", "0", "--dry-run"], "'--trial-timeout': 0 is not a number of seconds above 0."),
        (["--optimizer", "AdamX"], "there is no optimizer 'AdamX'. Did you mean Adam"),
        (["--data", "mine.py:X"], "--data is for a model of your own, not for a task"),
        (["--task", "digits", "--metric", "loss"], "--metric is for a model of your own, not for --task"),
        (["--batch", "9999"], "choose 1 to 1197"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_bad_input_is_a_sentence_and_leaves_nothing_behind(tmp_path: Path, arguments: list[str], told: str):
    (tmp_path / "mine.py").write_text(USER_TASKS.replace("broken = Mine(1)", ""))
    (tmp_path / "bad.py").write_text(USER_TASKS)
    ran = inside("compare", *arguments, "-o", "r", folder=tmp_path)
    assert ran.returncode == 2
    assert told in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "r").exists()


def test_a_run_that_raises_is_kept_with_its_traceback_and_tried_again(tmp_path: Path):
    (tmp_path / "mine.py").write_text(USER_TASKS.replace("broken = Mine(1)", ""))
    arguments = [*SHORT, "--task", "mine.py:Failing", "--method", "backprop()", "-o", "r"]
    for calls in (1, 2):
        ran = inside(*arguments, folder=tmp_path)
        assert ran.returncode == 1
        failed = records(tmp_path / "r")
        assert len(failed) == 2 * calls
        assert all("the seventh batch is broken" in r["traceback"] for r in failed)


def test_a_folder_of_another_comparison_is_not_touched(tmp_path: Path, finished: Finished):
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "r" / "records.jsonl").read_bytes()
    ran = inside(*SHORT, "--method", "mezo()", "-o", "r", folder=tmp_path)
    assert ran.returncode == 2
    assert "holds another comparison" in ran.stderr
    assert (tmp_path / "r" / "records.jsonl").read_bytes() == before


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    ran = inside(*SHORT, "-o", "file/r", folder=tmp_path)
    assert ran.returncode == 2
    assert (
        "file/r cannot be a results folder (Not a directory): choose another one (on the command line: -o DIR)."
        in (ran.stderr)
    )


def test_fetching_without_a_network_or_by_a_wrong_name_is_a_sentence(tmp_path: Path):
    wrong = inside("data", "fetch", "mnits", folder=tmp_path)
    assert (wrong.returncode, "Did you mean mnist" in wrong.stderr) == (2, True)
    cut_off = {"GRADCOST_CACHE": str(tmp_path / "cache"), "PATH": "", "HTTPS_PROXY": "http://127.0.0.1:9"}
    ran = gradcost("data", "fetch", "mnist", folder=tmp_path, **cut_off)
    assert ran.returncode == 1, ran.stderr
    assert "by hand" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not list((tmp_path / "cache").rglob("*ubyte*"))


@pytest.mark.parametrize("command", ["methods", "tasks", "doctor"])
def test_what_there_is_can_be_listed_for_people_and_machines(tmp_path: Path, command: str):
    assert inside(command, folder=tmp_path).returncode == 0
    assert json.loads(inside(command, "--json", folder=tmp_path).stdout)


def test_the_report_can_be_written_anew_and_elsewhere(tmp_path: Path, finished: Finished):
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)
    assert inside("report", "r", "-o", "elsewhere.html", folder=tmp_path).returncode == 0
    assert (tmp_path / "elsewhere.html").exists()
    assert inside("report", "nowhere", folder=tmp_path).returncode == 2


def test_points_past_the_grid_and_confirmation_are_the_same_for_every_method(tmp_path: Path):
    """Three points each after the grid's two, three rates on two fresh seeds each, one final run: none of one phase
    with the seed of another, and the final rate is the one that the confirming runs chose."""
    phases = [*GRID, "--extra-points", "3", "--confirm-seeds", "2", "--seeds", "1"]
    ran = inside("compare", "--steps", "30", *phases, *TWO, "-o", "r", folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    trials = [r for r in records(tmp_path / "r") if r["kind"] == "trial"]
    for method in ("backprop()", "mezo()"):
        mine = [r for r in trials if r["method"] == method]
        assert len({r["lr"] for r in mine if r["phase"] == "tune"}) == 5
        confirmed = [r for r in mine if r["phase"] == "confirm"]
        rates = {r["lr"] for r in confirmed}
        assert len(rates) == 3
        assert {(r["lr"], r["seed"]) for r in confirmed} == {(lr, seed) for lr in rates for seed in (1, 2)}
        mean = {lr: sum(r["validation"]["accuracy"] for r in confirmed if r["lr"] == lr) for lr in rates}
        (final,) = [r for r in mine if r["phase"] == "final"]
        assert mean[final["lr"]] == max(mean.values())
        assert len({json.dumps(r["curve"]) for r in mine if r["lr"] == final["lr"]}) == 4, "no two phases share a key"


ENDED = """
import os, signal
from gradcost.cli import main
if {ignored}: signal.signal(signal.{name}, signal.SIG_IGN)
main.app = lambda **_: os.kill(os.getpid(), signal.{name})
try:
    main.main()
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_request_to_end_is_an_interrupt_unless_it_is_ignored(name: str, ignored: bool):
    """As with Ctrl-C, finished trials are kept and workers end. `nohup` ignores SIGHUP."""
    ran = subprocess.run([sys.executable, "-c", ENDED.format(name=name, ignored=ignored)], capture_output=True)
    assert (ran.returncode, ran.stdout) == (0, b"" if ignored else b"interrupted\n")
