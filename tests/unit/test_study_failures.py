"""Whatever goes wrong under a study, it says so in a sentence, loses nothing that was finished, and goes on."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from test_study import call, call_inside, command, descendants, finished, kill, write_study

from gradcost import SGD, backprop, mezo
from gradcost.core.errors import BadInput
from gradcost.results import ledger
from gradcost.studies.executors import Executor, Local
from gradcost.studies.processes import Record, Work
from gradcost.studies.run import run_trials
from gradcost.studies.study import Stages, Study, first_stage
from gradcost.studies.trial import Trial
from gradcost.studies.worker import empty_record
from gradcost.tasks.digits import Digits

KILLED = "its process was killed by signal 9, perhaps because the memory of the system was exhausted"
OWN = '''
from gradcost import SGD, Trial, backprop, study
from gradcost.tasks.digits import Digits
from gradcost.core.value import value

@value
class Mine(Digits):
    """A task that is known to this file alone."""

@study("Does it learn?")
def own():
    yield [Trial(Mine(), "backprop", backprop(), SGD(0.1), {steps}, "tune", seed) for seed in range({trials})]
'''


def until(happened: Any, seconds: float = 90.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def records(folder: Path) -> list[dict[str, Any]]:
    return [r for r in ledger.records(folder) if r["kind"] == "trial"]


@pytest.mark.slow
def test_a_killed_worker_is_a_failed_record_and_its_trial_goes_on_from_its_checkpoint(tmp_path: Path):
    """The task comes from the user's own file, too: a worker knows it before it is handed the trial."""
    (tmp_path / "small.py").write_text(OWN.format(steps=1200, trials=1))
    assert call_inside(tmp_path, "-j", "1", "-o", "quiet").returncode == 0
    running = subprocess.Popen(
        command(tmp_path, "-j", "1", "-o", "killed", "--every", "0.1"),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: list((tmp_path / "killed").glob("trials/*/checkpoint")))
    (worker,) = [pid for pid, kind in descendants(running.pid) if kind == "worker"]
    kill(worker)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 1
    assert "1 trial failed. The first: its process was killed by signal 9, perhaps because the memory of the" in said
    (failed,) = records(tmp_path / "killed")
    assert (failed["status"], failed["reason"]) == ("failed", KILLED)
    (kept,) = (tmp_path / "killed").glob("trials/*/checkpoint")
    damaged = tmp_path / "damaged"
    shutil.copytree(tmp_path / "killed", damaged)
    (damaged / kept.relative_to(tmp_path / "killed")).write_bytes(kept.read_bytes()[:50])
    assert call(tmp_path, "-j", "1", "-o", "killed").returncode == 0
    assert call_inside(tmp_path, "-j", "1", "-o", "damaged").returncode == 0, "it begins anew"
    assert finished(tmp_path / "killed") == finished(damaged) == finished(tmp_path / "quiet")


def test_the_second_of_two_in_one_folder_is_refused_with_the_pid_of_the_first(tmp_path: Path):
    (tmp_path / "small.py").write_text(OWN.format(steps=100_000, trials=1))
    # As the command: `python -m` ends by the signal itself if an interrupt has hit code that `exec` ran from a text.
    script = "from gradcost.cli.main import main; main()"
    run = [sys.executable, "-c", script, "study", str(tmp_path / "small.py"), "-j", "1", "-o", "one"]
    first = subprocess.Popen(run, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: (tmp_path / "one" / "study.json").exists())
        second = call_inside(tmp_path, "-o", "one")
        assert second.returncode == 2
        assert f"one is in use by process {first.pid}: wait for it" in second.stderr
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGINT)
        _, said = first.communicate(timeout=60)  # ends when the workers have let go of the pipe, too
    assert first.returncode == 130, said
    assert "interrupted; finished trials are kept" in said


def test_a_file_that_changes_while_its_study_runs_fails_the_trials_that_would_run_other_code(tmp_path: Path):
    file = tmp_path / "small.py"
    file.write_text(OWN.format(steps=2, trials=1))
    work = Work("code", tmp_path, str(file))
    trial = Trial(Digits(), "b", backprop(), SGD(0.1), 2, "tune", 0)
    file.write_text(OWN.format(steps=3, trials=1))
    (record,) = Local(1).perform([trial], work)
    assert record["status"] == "failed"
    assert "small.py changed while the study ran" in record["reason"]
    assert "Traceback" in record["traceback"]
    assert record["trial"] == trial.name("code")


def test_a_part_that_prints_its_address_is_refused_before_it_runs():
    class Plain:
        classes = 10

    with pytest.raises(ValueError, match=r"Plain prints as .* Make it a frozen dataclass"):
        Trial(Plain(), "b", backprop(), SGD(0.1), 2)


def test_phases_have_different_keys_and_methods_share_them():
    """So a tuned learning rate meets new weights and batches, and differences between methods are paired."""

    def trial(phase: str, method: str = "b") -> Trial:
        return Trial(Digits(), method, backprop(), SGD(0.1), 5, phase, 1)

    assert len({trial(phase).key for phase in ("tune", "confirm", "final")}) == 3
    assert trial("tune", "c").key == trial("tune").key


@pytest.mark.parametrize("phase", ["tune", "confirm", "final"])
@pytest.mark.parametrize(
    ("other", "differs"),
    [
        ({"estimator": mezo()}, r"Probing\(.*\), after runs with Reverse"),
        ({"optimizer": SGD(0.1, momentum=0.9)}, r"momentum=0.9.*, after runs with SGD\(lr=0.1, momentum=0.0"),
        ({"steps": 4}, "4 steps, after runs with 3 steps"),
    ],
)
def test_one_label_for_two_methods_is_refused(phase: str, other: dict[str, Any], differs: str):
    """Final runs of the first method were replaced by those of the second; tuning scores were averaged over both."""
    one = Trial(Digits(), "same", backprop(), SGD(0.1), 3, phase, 1)

    def trials() -> Stages:
        yield [one, replace(one, optimizer=SGD(0.3)), replace(one, seed=2)]
        yield [replace(one, **other)]

    stages = Study("?", trials).stages()
    assert len(next(stages)) == 3
    with pytest.raises(BadInput, match=f"{phase} runs with the label 'same' and .*{differs}.*grouped by label"):
        stages.send([])


def test_settings_that_follow_from_the_rate_are_no_other_method():
    one = Trial(Digits(), "same", backprop(), SGD(0.1, decay=0.01), 3, "tune", 1)

    def trials() -> Stages:
        yield [one, replace(one, optimizer=SGD(0.2, decay=0.02), steps=6), replace(one, phase="final", steps=9)]

    assert len(list(Study("?", trials).stages())) == 1


def test_final_runs_may_have_another_decay_than_tuning_but_no_other_estimator():
    tuning = Trial(Digits(), "same", backprop(), SGD(0.1), 3, "tune", 1)

    def trials(**final: Any) -> Stages:
        yield [tuning]
        yield [replace(tuning, phase="final", **final)]

    assert len(list(Study("?", lambda: trials(optimizer=SGD(0.1, decay=0.1))).stages())) == 2
    with pytest.raises(BadInput, match="final runs with the label 'same' and"):
        list(Study("?", lambda: trials(estimator=mezo())).stages())


def test_a_misspelt_phase_is_refused():
    """Its runs were never scored on the test split."""
    for phase in ("Final", "fnal", "test", ""):
        with pytest.raises(
            BadInput, match=rf"the phase of a trial of b is '{phase}': write \"tune\", \"confirm\" or"
        ):
            Trial(Digits(), "b", backprop(), SGD(0.1), 5, phase, 1)


def test_a_study_may_yield_nothing_in_between_but_not_at_all():
    def trial(seed: int) -> Trial:
        return Trial(Digits(), "b", backprop(), SGD(0.1), 5, "tune", seed)

    def late() -> Stages:
        yield []
        yield [trial(1)]

    def never() -> Stages:
        yield from ()

    assert [found.seed for found in first_stage(Study("?", late))] == [1]
    with pytest.raises(ValueError, match="yields no trial"):
        first_stage(Study("?", never))


@dataclass(frozen=True)
class Here(Executor):
    """This process, and what it was asked for: a study's own rules need no other."""

    asked: list[str] = field(default_factory=list)
    stopped: list[bool] = field(default_factory=list)

    def ready(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def perform(self, trials: Sequence[Trial], work: Work) -> Generator[Record]:
        try:
            for trial in trials:
                self.asked.append(trial.name(work.code))
                score = {"loss": 1.0, "accuracy": 0.5}
                yield empty_record(trial, work.code) | {"status": "finished", "validation": score}
        finally:
            self.stopped.append(True)


def six() -> Stages:
    def trial(seed: int) -> Trial:
        return Trial(Digits(), "b", backprop(), SGD(0.1), 5, "tune", seed)

    first = yield [trial(0), trial(1), trial(0)]
    assert [run.seed for run in first] == [0, 1, 0], "in the order in which they were asked for"
    yield [trial(seed) for seed in range(2, 6)]


@pytest.mark.parametrize("fails_at", range(6))
def test_a_disk_that_fills_up_loses_no_record_that_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
):
    work, sync, synced = Work("code", tmp_path), os.fsync, []

    def full(number: int) -> None:
        synced.append(number)
        if len(synced) > fails_at:
            with (tmp_path / "records.jsonl").open("rb+") as file:
                file.truncate(file.seek(0, os.SEEK_END) - 7)  # as a disk does: not the whole line
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "records.jsonl")
        sync(number)

    before, after = Here(), Here()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            list(run_trials(Study("?", six), before, work))
    assert before.stopped[-1]
    assert len(records(tmp_path)) == fails_at
    list(run_trials(Study("?", six), after, work))
    names = [record["trial"] for record in records(tmp_path)]
    assert len(set(names)) == len(names) == 6
    assert after.asked == names[fails_at:], "what was written is not run again"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 96 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


@pytest.mark.slow
def test_a_real_disk_that_is_full_or_read_only_is_a_sentence_and_the_study_goes_on(tmp_path: Path, small_disk: Path):
    write_study(tmp_path, (0.01, 0.1), (1,), 20)
    folder = small_disk / "run"
    folder.mkdir()
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (96 << 10 >> 1))
    full = call(tmp_path, "-j", "2", "-o", str(folder))
    if full.returncode == 0:
        pytest.fail("the disk was not small enough")
    assert "No space left on device" in full.stderr
    assert "Traceback" not in full.stderr
    kept = finished(folder)
    remount(small_disk, "ro")
    refused = call(tmp_path, "-j", "2", "-o", str(folder))
    assert refused.returncode == 1
    assert "Read-only file system" in refused.stderr
    assert "Traceback" not in refused.stderr
    remount(small_disk, "rw,size=16m")
    again = call(tmp_path, "-j", "2", "-o", str(folder))
    assert again.returncode == 0, again.stderr
    after = finished(folder)
    assert len(after) == 9
    assert kept.items() <= after.items()


needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: gradcost[ray]")


@needs_ray
@pytest.mark.slow
def test_ray_finds_the_same_bits_and_leaves_nothing_running(tmp_path: Path):
    write_study(tmp_path, (0.01, 0.1), (1,), 40)
    assert call(tmp_path, "-j", "2", "-o", "here").returncode == 0
    ran = call(tmp_path, "-j", "2", "-o", "there", "--executor", "ray")
    assert ran.returncode == 0, ran.stderr
    assert finished(tmp_path / "there") == finished(tmp_path / "here")
    assert rays(tmp_path) == []


@needs_ray
@pytest.mark.slow
def test_an_interrupt_stops_ray(tmp_path: Path):
    (tmp_path / "small.py").write_text(OWN.format(steps=1_000_000, trials=2))
    running = subprocess.Popen(
        command(tmp_path, "-j", "2", "-o", "one", "--executor", "ray", "--every", "0.2"),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: list((tmp_path / "one").glob("trials/*/checkpoint")), 180)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "interrupted; finished trials are kept" in said
    until(lambda: rays(tmp_path) == [], 30)


def rays(folder: Path) -> list[str]:
    """Processes that were started for a study in this folder and are still there."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "cwd").readlink() == folder and path.name != str(os.getpid()):
                found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_trial_takes_half_a_second_beside_its_own_at_most(tmp_path: Path):
    """Of 48 short trials: what starting them, telling of them and writing them down takes, start and all. The machine
    must be quiet: what others take of it is counted as ours."""
    work, workers = Work("code", tmp_path), os.cpu_count() or 1

    def short() -> Stages:
        yield [Trial(Digits(), "b", backprop(), SGD(0.1), 20, "tune", seed) for seed in range(48)]

    start = time.perf_counter()
    took = [trial.seconds or 0.0 for trial in run_trials(Study("?", short), Local(workers), work)]
    spent = (time.perf_counter() - start) * workers - sum(took)
    print(json.dumps({"overhead a trial": spent / 48, "its own": sum(took) / 48, "load": os.getloadavg()}))
    assert len(took) == 48
    assert spent / 48 <= 0.5
