"""Where trials run: in processes of this machine, one for each trial, or on a Ray cluster."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import sys
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
from gradcost.studies.user_code import UserCode, classes, locate
from gradcost.studies.worker import empty_record, perform, prepare

# Imported once, in the process that workers are forked from; torch's optimizers import dynamo at their first step.
# A module that is not installed is skipped.
PRELOADED = (
    "gradcost.studies.preload",
    "sklearn.datasets",
    "safetensors.torch",
    "torch._dynamo",
)

STORE = 100 << 20  # bytes of Ray's object store, which carries records only

Record = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What every trial of a study needs besides the trial itself.

    Args:
        code: the fingerprint of the code that trials run.
        folder: the results folder, for the checkpoints of unfinished trials.
        user_file: the user's Python file that defines the task or the study; None where gradcost does.
        every: seconds between two checkpoints of a trial.
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
    """A trial on its way to another process, and its record without results."""

    trial: bytes
    record: Record


class Executor(ABC):
    """Runs trials, several at once, each with one thread. The bits of a trial do not depend on how many run."""

    @abstractmethod
    def ready(self) -> AbstractContextManager[Any]:
        """Return a context in which trials can run. It may be entered again while it is active."""

    @abstractmethod
    def perform(self, trials: Sequence[Trial], work: Work) -> Generator[Record]:
        """Yield the record of each trial when it has ended. Closing the generator stops the trials that run.

        Args:
            trials: the trials to run, each once.
            work: the folder, the code and the checkpoint interval.
        """


def local_or(executor: Executor | None, workers: int | None) -> Executor:
    """Return `executor`; if there is none, `workers` processes of this machine (None: one a core)."""
    if executor is not None and workers is not None:
        raise BadInput("an executor has its own number of workers: give `executor` or `workers`, not both.")
    return executor or Local(workers or os.cpu_count() or 1)


@dataclass(frozen=True)
class Local(Executor):
    """Processes of this machine, each forked from one that has loaded torch.

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
        BadInput: a worker could not read it.
    """
    script = [cls.__name__ for cls in classes(trial) if cls.__module__ == "__main__"]
    if script and (work.user_code is None or not work.user_code.is_main):
        raise BadInput(
            f"{script[0]} is defined in the script that was started, and the study is not. Worker processes import "
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
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(there, job.trial, work))
                with _main_hidden():
                    process.start()
                there.close()  # the worker's death then closes the pipe
                running[here] = (process, job)
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
    """Hide the caller's script, or multiprocessing runs all of it in every worker; `UserCode.load` imports it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _work(there: Connection, pickled: bytes, work: Work) -> None:
    there.send(_perform_pickled(pickled, work))
    there.close()


def _perform_pickled(pickled: bytes, work: Work) -> Record:
    try:
        prepare(1, work.user_code)  # first: unpickling needs the classes of the user's file
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
    except (EOFError, OSError):  # killed before or while it sent the record
        record = None
    process.join()
    if record is not None:
        return record if "trial" in record else job.record | {"status": "failed"} | record
    code = process.exitcode
    how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
    return job.record | {"status": "failed", "reason": f"its process {how}", "traceback": None}


@dataclass(frozen=True)
class Ray(Executor):
    """Tasks of a Ray cluster, one core each. Every node must see the results folder.

    Args:
        workers: how many trials run at once.
        address: of the cluster. None: a local one, started for the study and stopped after it.
    """

    workers: int
    address: str | None = None

    @contextmanager
    def ready(self) -> Generator[None]:
        ray = require("ray", "The Ray executor", "ray")
        if ray.is_initialized():  # by the caller, or by an outer `ready`
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
        work = replace(work, folder=work.folder.absolute())  # a task starts in Ray's own folder
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
    """Run a trial in a process of its own, as on one machine: Ray's process serves other tasks later."""
    (record,) = _in_processes([job], work, 1)
    return record
