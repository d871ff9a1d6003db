"""A trial that leaves something behind, hangs or dies: its record is kept, the others run, nothing stays."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_study import finished, write_study

import behaves
from behaves import Behaves, Scores
from gradcost import SGD, Trial, backprop
from gradcost.core.notes import Note
from gradcost.studies import processes
from gradcost.studies.environment import _code_with_siblings
from gradcost.studies.executors import Local
from gradcost.studies.processes import Record, Work
from gradcost.tasks.digits import Digits


def performed(folder: Path, kind: str, **settings: float) -> tuple[list[Record], list[int]]:
    """Run a trial that behaves so and a usual one, with one worker; return both records and the ids that remain."""
    pids = folder / "pids"
    tasks = (Behaves(kind=kind, pids=str(pids)), Behaves())
    trials = [Trial(task, "b", backprop(), SGD(0.1), 2, "tune", 0) for task in tasks]
    records = list(Local(1).perform(trials, Work("code", folder, behaves.__file__, **settings)))  # type: ignore[arg-type]
    return records, remaining(pids)


def remaining(pids: Path, seconds: float = 20.0) -> list[int]:
    """Return the ids in a file whose processes still run after a while: a killed process may end a little later."""
    deadline = time.monotonic() + seconds
    while (found := [int(pid) for pid in pids.read_text().split() if runs(int(pid))]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_a_trial_that_leaves_something_running_keeps_its_record(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """Before, the study waited for ever, and the finished record was never written."""
    monkeypatch.setattr(processes, "LEAVING", 0.5)
    records, remain = performed(tmp_path, kind)
    assert [record["status"] for record in records] == ["finished", "finished"]
    assert remain == []


def test_a_crash_whose_child_holds_the_pipe_is_noticed(tmp_path: Path):
    records, remain = performed(tmp_path, "crash_with_child")
    assert [record["status"] for record in records] == ["failed", "finished"]
    assert records[0]["reason"] == "its process exited with code 3"
    assert remain == []


def test_a_segmentation_fault_is_a_failed_trial(tmp_path: Path):
    records, _ = performed(tmp_path, "segfault")
    assert [record["status"] for record in records] == ["failed", "finished"]
    assert records[0]["reason"] == "its process was killed by signal 11"


REASONS = {
    "memory": "MemoryError: the memory is exhausted, or a limit of it, such as `ulimit -v`",
    "memory_of_torch": r"RuntimeError: .*DefaultCPUAllocator: can't allocate memory",
    "exit_quietly": "SystemExit",
    "exit_at_once": "its process exited with code 0",
    "unprintable": "Unprintable: an error whose text cannot be made",
}


def test_every_end_of_a_trial_has_its_reason(tmp_path: Path):
    """Before, an exception without a text and a call of sys.exit had no reason."""
    tasks = [Behaves(kind=kind) for kind in REASONS] + [Scores()]
    trials = [Trial(task, "b", backprop(), SGD(0.1), 2, "tune", 0) for task in tasks]
    found = {each["task"]: each for each in Local(2).perform(trials, Work("code", tmp_path, behaves.__file__))}
    for task, reason in zip(tasks, [*REASONS.values(), "ValueError|RuntimeError"], strict=True):
        record = found[repr(task)]
        assert record["status"] == "failed"
        assert re.match(reason, record["reason"]), record["reason"]


def test_a_trial_that_changes_the_folder_leaves_its_checkpoint_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    trial = Trial(Behaves(kind="change_folder"), "b", backprop(), SGD(0.1), 3, "tune", 0)
    work = Work("code", Path("results"), behaves.__file__, every=0.0)
    (record,) = Local(1).perform([trial], work)
    assert record["status"] == "finished"
    assert list(tmp_path.glob("results/trials/*/checkpoint"))
    assert not Path("/results").exists()


def test_too_little_memory_for_torch_is_a_sentence():
    """Before, torch crashed or the import of scikit-learn never ended."""
    limited = ["bash", "-c", f"ulimit -v 700000; {sys.executable} -m gradcost.cli.main study none.py"]
    ran = subprocess.run(limited, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2
    assert ran.stderr.startswith("gradcost: this process may use 683 MiB of address space, and torch needs 1536 MiB")
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("kind", ["sleep", "stop"])
def test_a_trial_that_hangs_ends_at_its_time_limit(tmp_path: Path, kind: str):
    (tmp_path / "pids").write_text("")
    trial = Trial(Behaves(kind=kind, pids=str(tmp_path / "pids")), "b", backprop(), SGD(0.1), 2, "tune", 0)
    start = time.monotonic()
    (record,) = Local(1).perform([trial], Work("code", tmp_path, behaves.__file__, trial_timeout=4.0))
    assert (record["status"], record["reason"]) == ("failed", "its process was ended at the time limit of a trial")
    assert 4 <= time.monotonic() - start < 60
    assert remaining(tmp_path / "pids") == []


def test_a_trial_that_saves_no_step_for_long_is_noticed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "HANGS_LEAST", 2.0)
    trial = Trial(Behaves(kind="sleep", pids=str(tmp_path / "pids")), "slow", backprop(), SGD(0.1), 2, "tune", 0)
    work = Work("code", tmp_path, behaves.__file__, every=0.1, trial_timeout=6.0)
    with pytest.warns(Note, match=r"of slow has saved no step for \d+ s, so it may hang.*--trial-timeout") as notes:
        (record,) = Local(1).perform([trial], work)
    assert len(notes) == 1
    assert record["status"] == "failed"


def test_a_saved_step_is_progress(tmp_path: Path):
    path = tmp_path / "checkpoint"
    progress = processes._Progress(path, limit=0.2)
    for content in ("1", "2", "3"):
        time.sleep(0.15)
        path.write_text(content)
        progress.check({"trial": "1f", "method": "a"})
    time.sleep(0.25)
    with pytest.warns(Note, match="trial 1f of a"):
        progress.check({"trial": "1f", "method": "a"})
    progress.check({"trial": "1f", "method": "a"})


def test_a_record_is_yielded_before_the_worker_is_waited_for(tmp_path: Path):
    """The caller writes it: an interrupt during the wait then loses nothing."""
    trial = Trial(Behaves(kind="thread", pids=str(tmp_path / "pids")), "b", backprop(), SGD(0.1), 2, "tune", 0)
    performing = Local(1).perform([trial], Work("code", tmp_path, behaves.__file__))
    assert next(performing)["status"] == "finished"
    (pid,) = map(int, (tmp_path / "pids").read_text().split())
    assert runs(pid)
    start = time.monotonic()
    performing.close()
    assert time.monotonic() - start < processes.LEAVING
    assert not runs(pid)


def test_a_time_limit_must_be_above_zero(tmp_path: Path):
    with pytest.raises(ValueError, match="is a number of seconds above 0, not 0"):
        Work("code", tmp_path, trial_timeout=0)


CONSOLE = (
    "import sys; sys.path.remove(''); from gradcost.cli.main import main; main()"  # as the installed command does
)


ONE_TRIAL = """
import sys
sys.path.remove("")  # as in the installed command
from pathlib import Path
from gradcost import SGD, Trial, backprop
from gradcost.studies.executors import Local
from gradcost.studies.processes import Work
from gradcost.tasks import Digits
trial = Trial(Digits(), "b", backprop(), SGD(0.1), 2, "tune", 0)
print([record["status"] for record in Local(1).perform([trial], Work("code", Path(".")))])
"""


def hijack(folder: Path) -> None:
    """Write modules with the names of others that note that they ran, and end the process."""
    names = ("random", "sklearn", "zoneinfo", "signal", "safetensors", "numba", "gradcost", "socket", "selectors")
    for name in names:
        (folder / f"{name}.py").write_text(
            f"open({str(folder / 'ran')!r}, 'a').write({name!r})\nraise SystemExit(9)\n"
        )


def test_workers_import_nothing_from_the_current_folder(tmp_path: Path):
    """Before, `random.py` in the current folder ended every study, and `sklearn.py` there was executed."""
    hijack(tmp_path)
    ran = subprocess.run([sys.executable, "-c", ONE_TRIAL], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.stdout == "['finished']\n", ran.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_files_beside_the_study_are_not_imported(tmp_path: Path):
    write_study(tmp_path, (0.1,), (1,), 5)
    hijack(tmp_path)
    arguments = ("study", "small.py", "-j", "2", "-o", "out")
    ran = subprocess.run(
        [sys.executable, "-c", CONSOLE, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=400
    )
    assert ran.returncode == 0, ran.stderr
    assert not (tmp_path / "ran").exists()
    assert len(finished(tmp_path / "out")) == 6


def test_the_environment_of_the_caller_is_unchanged(monkeypatch: pytest.MonkeyPatch):
    for value_ in (None, "", "0"):
        if value_ is None:
            monkeypatch.delenv(processes.SAFE_PATH, raising=False)
        else:
            monkeypatch.setenv(processes.SAFE_PATH, value_)
        with processes._without_current_folder():
            assert os.environ[processes.SAFE_PATH] == "1"
        assert os.environ.get(processes.SAFE_PATH) == value_


def test_a_server_that_does_not_start_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Broken:
        def Pipe(self, duplex: bool) -> tuple[None, None]:
            return None, None

        def Process(self, **_: object) -> Broken:
            return self

        def start(self) -> None:
            raise EOFError

    with pytest.raises(ValueError, match="the server process that starts the workers has ended"):
        processes._started(Broken(), processes.Job(b"", {"trial": "a"}), Work("code", tmp_path))


def test_a_damaged_checkpoint_is_set_aside_and_the_trial_begins_anew(tmp_path: Path):
    trial = Trial(Digits(), "b", backprop(), SGD(0.1), 4, "tune", 0)
    work = Work("code", tmp_path)
    (quiet,) = Local(1).perform([trial], work)
    path = tmp_path / "trials" / trial.name("code") / "checkpoint"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a checkpoint")
    (anew,) = Local(1).perform([trial], work)
    kept = tmp_path / "damaged" / trial.name("code")
    assert kept.read_bytes() == b"not a checkpoint"
    assert "its training checkpoint could not be used, so the trial began anew; it is kept as" in anew["note"]
    assert {**anew, "seconds": 0} == {**quiet, "seconds": 0, "note": anew["note"]}


def test_a_second_interrupt_does_not_cut_off_the_end_of_the_workers(tmp_path: Path):
    trial = Trial(Behaves(kind="sleep", pids=str(tmp_path / "pids")), "b", backprop(), SGD(0.1), 2, "tune", 0)
    performing = Local(2).perform(
        [trial, Trial(Behaves(), "b", backprop(), SGD(0.1), 2, "tune", 0)], Work("code", tmp_path, behaves.__file__)
    )
    next(performing)
    while not (tmp_path / "pids").exists():
        time.sleep(0.05)
    (pid,) = map(int, (tmp_path / "pids").read_text().split())

    def twice(killed: int, number: int) -> None:
        signal.raise_signal(signal.SIGINT)
        os_killpg(killed, number)  # raises if the group has ended already

    os_killpg, os.killpg = os.killpg, twice
    try:
        with pytest.raises(KeyboardInterrupt):
            performing.close()
    finally:
        os.killpg = os_killpg
    assert not runs(pid)


def test_the_code_of_a_study_covers_packages_beside_its_file(tmp_path: Path):
    """Before, only the module NAME.py was found, so that one folder mixed the records of two codes."""
    (tmp_path / "lib" / "deep").mkdir(parents=True)
    (tmp_path / "plain").mkdir()
    (tmp_path / "study.py").write_text("from lib.h import A\nimport plain.part\nimport one\nimport json\n")
    files = ["lib/__init__.py", "lib/h.py", "lib/deep/x.py", "plain/part.py", "one.py", "json.txt", "other.py"]
    for name in files:
        (tmp_path / name).write_text("A = 1\n")
    seen = set()
    for name in files:
        (tmp_path / name).write_text("A = 2\n")
        seen.add((name, _code_with_siblings(tmp_path / "study.py")))
        (tmp_path / name).write_text("A = 1\n")
    same = _code_with_siblings(tmp_path / "study.py")
    assert {name for name, code in seen if code != same} == {*files[:5]}


def test_the_interval_between_checkpoints_may_be_longer_than_the_system_can_wait(tmp_path: Path):
    """Before, `--every 1e6` was an OverflowError as soon as a trial ran."""
    trial = Trial(Digits(), "b", backprop(), SGD(0.1), 2, "tune", 0)
    (record,) = Local(1).perform([trial], Work("code", tmp_path, every=1e9))
    assert record["status"] == "finished"
