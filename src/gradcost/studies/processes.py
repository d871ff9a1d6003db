"""Run jobs in worker processes of this machine: start them, receive their records, and end them."""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from gradcost.core.errors import BadInput, Unsupported, described, shortened
from gradcost.core.notes import Note
from gradcost.core.streams import open_closed_streams
from gradcost.studies.output import OUTPUT, remove_if_empty, to_file
from gradcost.studies.trial import Trial
from gradcost.studies.user_code import UserCode, locate
from gradcost.studies.worker import perform, prepare

_KILL = getattr(signal, "SIGKILL", 9)
_INTERRUPTS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

# The fork server imports these modules once, so that workers start fast. Modules that are not installed are skipped.
# Why torch._dynamo: torch's optimizers import it at their first step.
PRELOADED = (
    "gradcost.studies.preload",
    "sklearn.datasets",
    "safetensors.torch",
    "torch._dynamo",
)

SAFE_PATH = "PYTHONSAFEPATH"  # the environment variable that keeps the current folder off sys.path
HANGS = 10  # times `Work.every`: a trial that saves no step for so long may hang
HANGS_LEAST = 60.0  # seconds that a trial may need for its data and its first step
LEAVING = 5.0  # seconds that a worker may take to exit after it has sent its record; then it is killed

Record = dict[str, Any]
_LONGEST_WAIT = 3600.0  # seconds; the operating system refuses waits of many days


@dataclass(frozen=True)
class Work:
    """Settings that all trials of a study share.

    Args:
        code: the fingerprint of the code that trials run.
        folder: the results folder. Unfinished trials write their training checkpoints to it.
        user_file: the user's Python file that defines the task or the study. None: gradcost defines both.
        every: seconds between two training checkpoints of a trial.
        trial_timeout: seconds after which a trial is ended and recorded as failed. None: no limit.
    """

    code: str
    folder: Path
    user_file: str | None = None
    every: float = 30.0
    trial_timeout: float | None = None
    user_code: UserCode | None = field(init=False)

    def __post_init__(self) -> None:
        if self.trial_timeout is not None and not self.trial_timeout > 0:
            raise BadInput(f"the time limit of a trial is a number of seconds above 0, not {self.trial_timeout}.")
        code = None if self.user_file is None else locate(self.user_file)
        object.__setattr__(self, "user_code", code)


@dataclass(frozen=True)
class Job:
    """A pickled trial, and its record without results, which is used if the process dies."""

    trial: bytes
    record: Record


class _Progress:
    """Notices when a trial saves no step for a long time.

    checkpoint: the file in which the trial saves its steps. limit: seconds.
    """

    def __init__(self, checkpoint: Path, limit: float) -> None:
        self.checkpoint, self.limit = checkpoint, limit
        self.saved, self.since = self._saved(), time.monotonic()

    def check(self, record: Record) -> None:
        """Issue a `Note` once, if nothing was saved for `limit` seconds."""
        saved, now = self._saved(), time.monotonic()
        if saved != self.saved:
            self.saved, self.since = saved, now
        elif now - self.since >= self.limit:
            warnings.warn(
                f"trial {record['trial']} of {record['method']} has saved no step for {now - self.since:.0f} s, so "
                "it may hang. Ctrl-C ends the study and keeps what is finished. A time limit ends only a trial that "
                "hangs: trial_timeout=SECONDS, on the command line --trial-timeout SECONDS.",
                Note,
                stacklevel=2,
            )
            self.limit = math.inf

    def _saved(self) -> int | None:
        try:
            return self.checkpoint.stat().st_mtime_ns
        except OSError:
            return None


@dataclass(frozen=True)
class _Running:
    """A worker process that runs a job. It sends its record to `receiver`."""

    job: Job
    process: Any
    receiver: Connection
    deadline: float  # on the clock of time.monotonic
    progress: _Progress

    def has_ended(self) -> bool:
        """Whether it has sent its record, or has exited, or has reached its time limit."""
        if wait([self.receiver], 0) or time.monotonic() >= self.deadline:
            return True
        # A child that the worker left behind may hold the pipe open, so the end of the pipe is not enough. If the
        # server was killed, the sentinel is ready although the worker runs.
        return bool(wait([self.process.sentinel], 0)) and not psutil.pid_exists(self.process.pid)

    def record(self) -> Record:
        """Return the record of a worker that has ended."""
        try:
            record = self.receiver.recv() if wait([self.receiver], 0) else None
        except (EOFError, OSError):  # the worker was killed before or while it sent the record
            record = None
            self.process.join(LEAVING)
        if record is not None:
            return record if "trial" in record else self.job.record | {"status": "failed"} | record
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            limit = time.monotonic() >= self.deadline
            ending = "was ended at the time limit of a trial" if limit else "closed its pipe without a record"
        else:
            ending = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
            ending += ", perhaps because the memory of the system was exhausted" if code == -_KILL else ""
        return self.job.record | {"status": "failed", "reason": f"its process {ending}", "traceback": None}

    def leave(self, seconds: float) -> None:
        """Wait until the worker exits; after `seconds`, kill it and the processes that it started."""
        self.process.join(seconds)
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)  # a worker leads a process group (`_work`)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join(LEAVING)
        self.receiver.close()


def in_processes(jobs: Sequence[Job], work: Work, workers: int) -> Generator[Record]:
    """Yield the record of each job as soon as its worker process has sent it, has exited, or is out of time.

    A worker that does not exit within `LEAVING` seconds after its record was yielded is killed, with the processes
    that it started. Closing the generator kills all workers.

    Args:
        jobs: the jobs, each for a process of its own.
        work: the settings that all jobs share.
        workers: how many processes run at once.
    Raises:
        Unsupported: no worker process can be started.
    """
    open_closed_streams()
    has_server = "forkserver" in multiprocessing.get_all_start_methods()  # Windows has none
    context = multiprocessing.get_context("forkserver" if has_server else "spawn")
    if has_server:
        context.set_forkserver_preload(list(PRELOADED))
    waiting, running = deque(jobs), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                with _interrupt_deferred():
                    running.append(_started(context, waiting.popleft(), work))
            for each in _ended(running):
                yield each.record()  # the caller writes it before this process waits for the worker
                each.leave(LEAVING)
                running.remove(each)
    finally:
        with _interrupt_deferred():
            for each in running:
                each.process.kill()
            for each in running:
                each.leave(LEAVING)


def _ended(running: Sequence[_Running]) -> list[_Running]:
    """Wait until one or more workers have ended, and return them."""
    while not (ended := [each for each in running if each.has_ended()]):
        sources = [each.receiver for each in running]
        sentinels = [each.process.sentinel for each in running]
        if wait(sentinels, 0):
            wait(sources, 0.1)  # the server was killed, so that the sentinels no longer tell when a worker exits
        else:
            limits = [(each.deadline, each.progress.since + each.progress.limit) for each in running]
            until = min(itertools.chain(*limits))
            left = max(0.0, until - time.monotonic())
            wait([*sources, *sentinels], min(left, _LONGEST_WAIT))
            for each in running:
                each.progress.check(each.job.record)
    return ended


def _started(context: Any, job: Job, work: Work) -> _Running:
    receiver, sender = context.Pipe(duplex=False)
    output = work.folder / OUTPUT / f"{job.record['trial']}.txt"
    process = context.Process(target=_work, args=(sender, job, work, output))
    try:
        with _main_hidden(), _without_current_folder():
            process.start()
    except (EOFError, ConnectionError) as error:
        raise Unsupported(
            "the server process that starts the workers has ended. If it was killed, run the same command again. If "
            "an error message is above, check that `python -P -c 'import gradcost, torch'` works."
        ) from error
    except OSError as error:
        if "AF_UNIX path too long" not in str(error):
            raise
        raise BadInput(
            f"the folder for temporary files has a path that is too long for a socket: {tempfile.gettempdir()}. Set "
            "TMPDIR to a folder with a path of at most 60 characters."
        ) from error
    sender.close()  # the worker has the only other copy, so the pipe closes if the worker dies
    limit = work.trial_timeout
    progress = _Progress(
        work.folder / "trials" / job.record["trial"] / "checkpoint", max(HANGS * work.every, HANGS_LEAST)
    )
    return _Running(job, process, receiver, math.inf if limit is None else time.monotonic() + limit, progress)


@contextmanager
def _without_current_folder() -> Iterator[None]:
    """Processes that start in this context do not import from the current folder, such as a `random.py` in it."""
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SAFE_PATH]
        else:
            os.environ[SAFE_PATH] = before


@contextmanager
def _main_hidden() -> Iterator[None]:
    """Hide the caller's script: multiprocessing would run all of it in each worker. `UserCode.load` imports it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _interrupt_deferred() -> Iterator[None]:
    """Handle an interrupt at the end of the context only: a worker whose start it cut off would run on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in _INTERRUPTS}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    interrupts: list[int] = []
    for number in handlers:
        signal.signal(number, lambda number, _: interrupts.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if interrupts:
            signal.raise_signal(interrupts[0])


def _work(sender: Connection, job: Job, work: Work, output: Path) -> None:
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # a group of its own, so that processes which the trial leaves behind end with it
    os.environ.pop(SAFE_PATH, None)  # it was meant for the server alone
    to_file(output)
    record = _perform_job(job, work)
    remove_if_empty(output)
    with contextlib.suppress(BrokenPipeError):  # the study was interrupted meanwhile
        sender.send(record)
    sender.close()


def _perform_job(job: Job, work: Work) -> Record:
    try:
        prepare(1, work.user_code)  # before unpickling, which needs the classes of the user's file
        if work.user_code is not None and work.user_code.is_changed:
            raise RuntimeError(
                f"{work.user_file} changed while the study ran: undo the change, or start a new folder"
            )
        trial = _unpickled(job.trial, work)
        if trial.name(work.code) != job.record["trial"]:
            raise RuntimeError(
                "a file that this trial needs changed while the study ran: undo the change, or start a new folder"
            )
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return {"reason": described(error), "traceback": shortened(traceback.format_exc())}
    return perform(trial, work.code, work.folder, work.every)


def _unpickled(pickled: bytes, work: Work) -> Trial:
    try:
        return pickle.loads(pickled)
    except AttributeError as error:
        if work.user_code is None:
            raise
        raise RuntimeError(
            f"{error}. A worker imports {work.user_file} as far as its first call of compare() or run_study(): "
            'define classes and functions above it, and outside of `if __name__ == "__main__":`'
        ) from error
