"""Kills of every process of a study, by every signal: each trial runs once, with the undisturbed numbers.

A storm that is cut off, as by Ctrl-C, goes on in the next call of pytest: it is kept in the cache folder of pytest.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from test_study import NOT_COMPARED, command, descendants

from gradcost.core.files import write_whole
from gradcost.results import ledger
from gradcost.studies.environment import fingerprint
from gradcost.studies.trial import Trial
from gradcost.studies.worker import perform
from presets_under_test import METHODS, OPTIMIZERS, Points

STEPS = 60
STUDY = """
from gradcost import Trial, study
from presets_under_test import METHODS, OPTIMIZERS, Points


@study("Which one is best?")
def small():
    yield [
        Trial(Points(), method, METHODS[method], optimizer, {steps}, "final")
        for method in {methods}
        for optimizer in OPTIMIZERS.values()
    ]
"""
GROUPS = [[*METHODS][place : place + 4] for place in range(0, len(METHODS), 4)]
# Process, signals in turn, and how often in each storm.
STORM = [
    ("worker", (signal.SIGKILL,), 9),
    ("fork server", (signal.SIGKILL,), 3),
    ("resource tracker", (signal.SIGKILL,), 3),
    ("parent", (signal.SIGKILL,), 1),
    ("parent", (signal.SIGTERM,), 1),
    ("parent", (signal.SIGHUP,), 1),
    ("parent", (signal.SIGINT,), 1),
    ("parent", (signal.SIGINT, signal.SIGINT), 1),
]
Kill = tuple[str, tuple[int, ...]]


def kills(number: int) -> list[Kill]:
    """The 20 kills of a storm, in a random order: process, and signals in turn."""
    found: list[Kill] = [(kind, signals) for kind, signals, times in STORM for _ in range(times)]
    random.Random(number).shuffle(found)
    return found


@dataclass
class Storm:
    """The kills that are left, the studies that were finished, and the counts. `folder` keeps it."""

    folder: Path
    todo: list[Kill]
    finished: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    harm: Counter[str] = field(default_factory=Counter)

    def save(self) -> None:
        state = {"left": len(self.todo), "finished": self.finished, "codes": self.codes, "harm": self.harm}
        write_whole(self.folder / "storm.json", json.dumps(state))

    def restore(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            state = json.loads((self.folder / "storm.json").read_text())
            del self.todo[state["left"] :]
            self.finished = state["finished"]
            self.codes, self.harm = Counter(state["codes"]), Counter(state["harm"])


def undisturbed(folder: Path, methods: list[str]) -> list[dict[str, Any]]:
    """Return the records of the study's trials, which run in this process, once for all calls of pytest."""
    file = folder / "undisturbed.json"
    if file.exists():
        return json.loads(file.read_text())
    torch.set_num_threads(1)
    code = fingerprint(str(folder / "small.py"))
    pairs = [(method, optimizer) for method in methods for optimizer in OPTIMIZERS.values()]
    trials = [Trial(Points(), method, METHODS[method], optimizer, STEPS, "final") for method, optimizer in pairs]
    write_whole(file, json.dumps([compared(perform(trial, code, folder)) for trial in trials]))
    return json.loads(file.read_text())


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


def run_until_killed(storm: Storm, output: str, chance: random.Random) -> int:
    """Start the study once, and apply the next kills to its processes until it ends. Return its exit code."""
    running = started(storm.folder, output)
    everything = {running.pid}
    try:
        while running.poll() is None:
            found = processes_of(running.pid)
            everything.update(*found.values())
            if not storm.todo or not found["worker"]:  # what is killed before anything runs shows nothing
                time.sleep(0.05)
                continue
            time.sleep(chance.uniform(0.0, 1.0))
            kind, signals = storm.todo[-1]
            if running.poll() is None and hit(processes_of(running.pid)[kind], signals):
                storm.todo.pop()
                storm.save()
                if kind == "parent":
                    running.wait(120)
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}/exe").exists() for pid in everything - {running.pid}):
            assert time.monotonic() < deadline, "a process of the study stays"
            time.sleep(0.05)
        return running.returncode
    except BaseException:
        for pid in everything:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        running.wait()
        raise


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
            "checkpoints left": len(list((folder / "trials").glob("*"))),
        }
    )


@pytest.fixture
def here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, number: int) -> Path:
    """The folder of a storm. Its studies know the presets of the tests, and do not import scikit-learn: seconds."""
    assert request.config.cache is not None
    study = STUDY.format(methods=GROUPS[number], steps=STEPS)
    folder = request.config.cache.mkdir("kill-storm") / str(number)
    (folder / "path").mkdir(parents=True, exist_ok=True)
    (folder / "path" / "sklearn.py").write_text("raise ImportError")
    (folder / "small.py").write_text(study)
    code = fingerprint(str(folder / "small.py"))
    if (folder / "code").exists() and (folder / "code").read_text() != code:  # it began with other code
        for path in (
            *folder.glob("killed*"),
            *(folder / name for name in ("storm.json", "undisturbed.json", "stderr")),
        ):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (folder / "code").write_text(code)
    before = os.environ.get("PYTHONPATH", "")
    paths = [str(folder / "path"), str(Path(__file__).parents[1]), *([before] if before else [])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(GROUPS)))
def test_a_study_survives_kills_of_all_its_processes(here: Path, number: int):
    """Of four presets with four optimizers."""
    expected = undisturbed(here, GROUPS[number])
    assert len({each["trial"] for each in expected}) == 16
    storm = Storm(here, kills(number))
    storm.restore()
    chance = random.Random(len(storm.todo))
    while storm.todo or not storm.finished or (here / f"killed{storm.finished + 1}").exists():
        code = None
        while code != 0:
            code = run_until_killed(storm, f"killed{storm.finished + 1}", chance)
            storm.codes[str(code)] += 1
        storm.finished += 1
        storm.harm.update(harm(here / f"killed{storm.finished}", expected))
        storm.save()
    said = (here / "stderr").read_text()
    storm.harm["tracebacks"] = said.count("Traceback")
    by_process = Counter(kind for kind, _ in kills(number))
    counts = {"kills": dict(by_process), "trials": 16 * storm.finished, **storm.harm}
    print(GROUPS[number], counts, {"exit codes": dict(storm.codes)})
    # 2: the fork server was killed while it started a worker. -1, -2, -15: the signal came before Python handles it,
    # or while it exits.
    assert set(storm.codes) <= {"0", "1", "2", "130", "-9", "-1", "-2", "-15"}
    assert set(storm.harm.values()) == {0}, said
    shutil.rmtree(here)
