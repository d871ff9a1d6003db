"""Executors: they run each trial in a process of its own, on this machine or on a Ray cluster."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

from gradcost.core.errors import BadInput, require
from gradcost.studies.trial import Trial
from gradcost.studies.user_code import UserCode, locate, origins
from gradcost.studies.worker import empty_record, perform, prepare

# The fork server imports these modules once, so that workers start fast. Modules that are not installed are skipped.
# Why torch._dynamo: torch's optimizers import it at their first step.
PRELOADED = (
    "gradcost.studies.preload",
    "sklearn.datasets",
    "safetensors.torch",
    "torch._dynamo",
)

STORE = 100 << 20  # bytes of Ray's object store; it holds nothing but records

Record = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """Settings that all trials of a study share.

    Args:
        code: the fingerprint of the code that trials run.
        folder: the results folder. Unfinished trials write their training checkpoints to it.
        user_file: the user's Python file that defines the task or the study. None: gradcost defines both.
        every: seconds between two training checkpoints of a trial.
    """

    code: str
    folder: Path
    user_file: str | None = None
    every: float = 30.0
    user_code: UserCode | None = field(init=False)

    def __post_init__(self) -> None:
        code = None if self.user_file is None else locate(self.user_file)
        object.__setattr__(self, "user_code", code)


@dataclass(frozen=True)
class _Job:
    """A pickled trial, and its record without results, which is used if the process dies."""

    trial: bytes
    record: Record


class Executor(ABC):
    """Run trials in parallel, each with one thread. A trial has the same bits for any number of parallel trials."""

    workers: int  # how many trials run at once

    @abstractmethod
    def ready(self) -> AbstractContextManager[Any]:
        """Return a context manager: trials run inside its context. Contexts of one executor may be nested."""

    @abstractmethod
    def perform(self, trials: Sequence[Trial], work: Work) -> Generator[Record]:
        """Yield the record of each trial as soon as the trial ends. Closing the generator stops the running trials.

        Args:
            trials: the trials to run, each once.
            work: the settings that all trials share.
        """


def local_or(executor: Executor | None, workers: int | None) -> Executor:
    """Return `executor`; if it is None, a `Local` executor with `workers` processes (None: one per CPU core)."""
    if executor is not None and workers is not None:
        raise BadInput("an executor has its own number of workers: give `executor` or `workers`, not both.")
    return executor or Local(workers or os.cpu_count() or 1)


@dataclass(frozen=True)
class Local(Executor):
    """Run each trial in a process of this machine, forked from a server process that has imported torch.

    Args:
        workers: how many trials run at once.
    """

    workers: int

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise BadInput(f"a study needs 1 worker or more, not {self.workers}.")

    def ready(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def perform(self, trials: Sequence[Trial], work: Work) -> Generator[Record]:
        yield from _in_processes([_job(trial, work) for trial in trials], work, self.workers)


def _job(trial: Trial, work: Work) -> _Job:
    """Pickle a trial.

    Raises:
        BadInput: a worker process could not unpickle the trial.
    """
    in_main = [name for name, module in origins(trial) if module == "__main__"]
    if in_main and (work.user_code is None or not work.user_code.is_main):
        raise BadInput(
            f"{in_main[0]} is defined in the script that was started, and the study is not. Worker processes import "
            "one of the two: move both into one file."
        )
    try:
        return _Job(pickle.dumps(trial), empty_record(trial, work.code))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise BadInput(
            f"{trial.task} cannot be sent to a worker process ({error}): define its classes and functions at the top "
            "level of a file."
        ) from error


def _in_processes(jobs: Sequence[_Job], work: Work, workers: int) -> Generator[Record]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    waiting, running = deque(jobs), {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.popleft()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(sender, job.trial, work))
                with _main_hidden(), _interrupt_deferred():
                    process.start()
                    running[receiver] = (process, job)
                sender.close()  # the worker has the only other copy, so the pipe closes if the worker dies
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                process, job = running.pop(connection)
                yield _receive(connection, process, job)
    finally:
        for process, _ in running.values():
            process.kill()
            process.join()


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
    """Raise a KeyboardInterrupt at the end of the context only: a worker whose start it cut off would run on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupts:
            signal.raise_signal(signal.SIGINT)


def _work(sender: Connection, pickled: bytes, work: Work) -> None:
    sender.send(_perform_pickled(pickled, work))
    sender.close()


def _perform_pickled(pickled: bytes, work: Work) -> Record:
    try:
        prepare(1, work.user_code)  # before unpickling, which needs the classes of the user's file
        if work.user_code is not None and work.user_code.is_changed:
            raise RuntimeError(
                f"{work.user_file} changed while the study ran: undo the change, or start a new folder"
            )
        trial = _unpickled(pickled, work)
    except Exception as error:
        return {"reason": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
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


def _receive(connection: Connection, process: Any, job: _Job) -> Record:
    try:
        record = connection.recv()
    except (EOFError, OSError):  # the worker was killed before or while it sent the record
        record = None
    process.join()
    if record is not None:
        return record if "trial" in record else job.record | {"status": "failed"} | record
    code = process.exitcode
    ending = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
    return job.record | {"status": "failed", "reason": f"its process {ending}", "traceback": None}


@dataclass(frozen=True)
class Ray(Executor):
    """Run each trial as a Ray task with one CPU core. Every node needs access to the results folder.

    Args:
        workers: how many trials run at once.
        address: address of the cluster. None: start a local cluster, and stop it after the study.
    """

    workers: int
    address: str | None = None

    @contextmanager
    def ready(self) -> Generator[None]:
        ray = require("ray", "The Ray executor", "ray")
        if ray.is_initialized():  # the caller or an outer `ready` called `ray.init`
            yield
            return
        if self.address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            local = {"num_cpus": self.workers, "object_store_memory": STORE, "include_dashboard": False}
            ray.init("local", **local, log_to_driver=False, logging_level=logging.WARNING)
        else:
            ray.init(self.address, log_to_driver=False, logging_level=logging.WARNING)
        try:
            yield
        finally:
            ray.shutdown()

    def perform(self, trials: Sequence[Trial], work: Work) -> Generator[Record]:
        ray = require("ray", "The Ray executor", "ray")
        task = ray.remote(num_cpus=1, max_retries=0)(_task)
        work = replace(work, folder=work.folder.absolute())  # a Ray task has another working directory
        waiting, running = deque(_job(trial, work) for trial in trials), {}
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    job = waiting.popleft()
                    running[task.remote(job, work)] = job
                for reference in ray.wait(list(running))[0]:
                    job = running.pop(reference)
                    try:
                        yield ray.get(reference)
                    except ray.exceptions.RayError as error:
                        reason = {"reason": f"its task was lost: {type(error).__name__}", "traceback": str(error)}
                        yield job.record | {"status": "failed"} | reason
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _task(job: _Job, work: Work) -> Record:
    """Run a trial in a new process, because Ray reuses its own process for later tasks."""
    (record,) = _in_processes([job], work, 1)
    return record
