"""Kills of every process of a study, by every signal: each trial runs once, with the undisturbed numbers."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_study import NOT_COMPARED, command, descendants

from gradcost.results import ledger
from gradcost.studies.environment import fingerprint
from gradcost.studies.trial import Trial
from gradcost.studies.worker import perform
from presets_under_test import METHODS, OPTIMIZERS, Points

STEPS, SEEDS = 60, (1, 2)
# One preset with four optimizers.
STUDY = """
from gradcost import Trial, study
from presets_under_test import METHODS, OPTIMIZERS, Points


@study("Which one is best?")
def small():
    yield [
        Trial(Points(), "{method}", METHODS["{method}"], optimizer, {steps}, "final", seed)
        for optimizer in OPTIMIZERS.values()
        for seed in {seeds}
    ]
"""
# Signals in turn, which the parent gets in one storm each.
SIGNALS = [
    (signal.SIGKILL,),
    (signal.SIGTERM,),
    (signal.SIGHUP,),
    (signal.SIGINT,),
    (signal.SIGINT, signal.SIGINT),
]


def kills(number: int) -> list[tuple[str, tuple[int, ...]]]:
    """The five kills of a storm, in a random order: process, and signals in turn. Twelve storms have 60."""
    kinds = ["worker", "worker", "fork server", "resource tracker" if number % 2 else "worker"]
    found = [*((kind, SIGNALS[0]) for kind in kinds), ("parent", SIGNALS[number % len(SIGNALS)])]
    random.Random(number).shuffle(found)
    return found


def undisturbed(folder: Path, method: str) -> list[dict[str, Any]]:
    """Write the study to `folder`, and return the records of its trials, which run in this process."""
    file = folder / "small.py"
    file.write_text(STUDY.format(method=method, steps=STEPS, seeds=SEEDS))
    torch.set_num_threads(1)
    code = fingerprint(str(file))
    trials = [
        Trial(Points(), method, METHODS[method], optimizer, STEPS, "final", seed)
        for optimizer in OPTIMIZERS.values()
        for seed in SEEDS
    ]
    return [compared(json.loads(json.dumps(perform(trial, code, folder)))) for trial in trials]


def processes_of(parent: int) -> dict[str, list[int]]:
    """The processes of a study, by kind."""
    found: dict[str, list[int]] = {"parent": [parent], "worker": [], "fork server": [], "resource tracker": []}
    for pid, kind in descendants(parent):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        tracker = b"resource_tracker" in line
        found["resource tracker" if tracker else "fork server" if kind == "forkserver" else "worker"].append(pid)
    return found


def started(folder: Path, output: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(folder, "-j", "2", "-o", output, "--every", "0.1"),
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=(folder / "stderr").open("ab"),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def hit(pids: list[int], signals: tuple[int, ...]) -> bool:
    """Send the signals to one of the processes, 50 ms apart; return whether it was there for the first."""
    for number, each in enumerate(signals):
        time.sleep(0.05 if number else 0.0)
        try:
            os.kill(pids[0], each)
        except (ProcessLookupError, IndexError):
            return number > 0
    return True


def run_until_killed(
    folder: Path, output: str, todo: list[tuple[str, tuple[int, ...]]], chance: random.Random
) -> int:
    """Start the study once, and apply the next kills to its processes until it ends. Return its exit code."""
    running = started(folder, output)
    everything: set[int] = set()
    while running.poll() is None:
        found = processes_of(running.pid)
        everything.update(*found.values())
        if not todo or not found["worker"]:  # what is killed before anything runs shows nothing
            time.sleep(0.05)
            continue
        time.sleep(chance.uniform(0.0, 1.0))
        kind, signals = todo[-1]
        if running.poll() is None and hit(processes_of(running.pid)[kind], signals):
            todo.pop()
            if kind == "parent":
                running.wait(60)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/exe").exists() for pid in everything - {running.pid}):
        assert time.monotonic() < deadline, "a process of the study stays"
        time.sleep(0.05)
    return running.returncode


def ended(folder: Path) -> list[dict[str, Any]]:
    """The records of the trials that ended, without what differs between two runs."""
    trials = [each for each in ledger.records(folder) if each["kind"] == "trial" and each["status"] != "failed"]
    return [compared(each) for each in trials]


def compared(record: dict[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in record.items() if name not in NOT_COMPARED}


def harm(folder: Path, expected: list[dict[str, Any]]) -> Counter[str]:
    """Count the trials of a complete study that are missing, recorded twice, or have other numbers."""
    found, right = ended(folder), {each["trial"]: each for each in expected}
    times = Counter(each["trial"] for each in found)
    return Counter(
        {
            "lost": len(right.keys() - times.keys()),
            "twice": sum(number > 1 for number in times.values()),
            "other numbers": sum(right.get(each["trial"]) != each for each in found),
        }
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose studies know the presets of the tests, and do not spend seconds on importing scikit-learn."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sklearn.py").write_text("raise ImportError")
    before = os.environ.get("PYTHONPATH", "")
    paths = [str(tmp_path / "path"), str(Path(__file__).parents[1]), *([before] if before else [])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_study_survives_kills_of_all_its_processes(here: Path, method: str):
    expected = undisturbed(here, method)
    assert len({each["trial"] for each in expected}) == 8
    number = [*METHODS].index(method)
    todo, chance = kills(number), random.Random(number)
    studies, codes, found = 0, Counter[int](), Counter[str]()
    while todo:
        studies += 1
        code = None
        while code != 0:
            code = run_until_killed(here, f"killed{studies}", todo, chance)
            codes[code] += 1
        found.update(harm(here / f"killed{studies}", expected))
        assert list((here / f"killed{studies}" / "trials").glob("*")) == []
    said = (here / "stderr").read_text()
    found["tracebacks"] = said.count("Traceback")
    killed = Counter(kind for kind, _ in kills(number))
    print(method, {"kills": dict(killed), "trials": 8 * studies, **found, "exit codes": dict(codes)})
    assert set(codes) <= {0, 1, 130, -signal.SIGKILL, -signal.SIGINT}
    assert set(found.values()) == {0}, said
