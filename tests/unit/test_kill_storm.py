"""Kills of every process of a study, by every signal: each trial runs once, with the undisturbed numbers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from test_study import call, command, descendants, finished, write_study

# Process, signals in turn, and how often in a storm of 60.
STORM = [
    ("worker", (signal.SIGKILL,), 14),
    ("fork server", (signal.SIGKILL,), 10),
    ("resource tracker", (signal.SIGKILL,), 10),
    ("parent", (signal.SIGKILL,), 6),
    ("parent", (signal.SIGTERM,), 6),
    ("parent", (signal.SIGHUP,), 5),
    ("parent", (signal.SIGINT,), 5),
    ("parent", (signal.SIGINT, signal.SIGINT), 4),
]


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
        command(folder, "-j", "2", "-o", output, "--every", "0.2"),
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


@pytest.mark.slow
@pytest.mark.parametrize("kills", [8, 60])
def test_a_study_survives_kills_of_all_its_processes(tmp_path: Path, kills: int):
    write_study(tmp_path, (0.01, 0.1, 1.0), (1, 2), 500)
    assert call(tmp_path, "-j", "2", "-o", "quiet").returncode == 0
    expected = finished(tmp_path / "quiet")
    assert len(expected) == 15
    todo = [(kind, signals) for kind, signals, times in STORM for _ in range(times if kills == 60 else 1)]
    assert len(todo) == kills
    chance = random.Random(19)
    chance.shuffle(todo)
    folders, codes = 1, Counter[int]()
    while True:
        code = run_until_killed(tmp_path, f"killed{folders}", todo, chance)
        codes[code] += 1
        if code == 0:  # this folder is complete
            assert finished(tmp_path / f"killed{folders}") == expected
            assert list((tmp_path / f"killed{folders}" / "trials").glob("*")) == []
            if not todo:
                break
            folders += 1
    print({"kills": kills - len(todo), "studies": folders, "trials": 15 * folders, "exit codes": dict(codes)})
    assert set(codes) <= {0, 1, 130, -signal.SIGKILL, -signal.SIGINT}
    assert "Traceback" not in (tmp_path / "stderr").read_text()
