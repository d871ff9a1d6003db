"""Who performs trials: processes of this machine, one a trial, or a Ray cluster."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from gradcost.core.errors import require
from gradcost.studies.environment import stamp
from gradcost.studies.trial import Trial
from gradcost.studies.worker import blank, load_file, perform, prepare

# Imported once and forked from; torch's optimizers import dynamo at their first step. What is missing is passed over.
PRELOADED = (
    "gradcost.studies.preload",
    "sklearn.datasets",
    "safetensors.torch",
    "torch._dynamo",
)

STORE = 100 << 20  # bytes of Ray's object store: what goes through it are records

Record = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What the performing of any trial of a study needs beside the trial.

    code: the fingerprint of what runs. folder: where half-finished trials are kept, each in a folder of its own.
    user_file: where the study's own code comes from, if not from this package. every: seconds between two
    checkpoints of a trial. stamp: of the user's file as it is when this is made.
    """

    code: str
    folder: Path
    user_file: str | None = None
    every: float = 30.0
    stamp: str | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stamp", stamp(self.user_file))


class Executor(ABC):
    """Performs trials, several at once, each with one thread: a trial's bits do not depend on how many there are."""

    @abstractmethod
    def ready(self) -> AbstractContextManager[Any]:
        """Within, trials can be performed: what that takes is started once, for all stages, and stopped after."""

    @abstractmethod
    def perform(self, trials: Sequence[Trial], work: Work) -> Generator[Record]:
        """The record of each trial, as it finishes. When the caller stops listening, or is interrupted, what runs
        is stopped."""


@dataclass(frozen=True)
class Local(Executor):
    """`workers` processes of this machine at a time, each forked from one that has torch loaded."""

    workers: int

    def ready(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def perform(self, trials: Sequence[Trial], work: Work) -> Generator[Record]:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        waiting, running = deque(trials), {}
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    trial = waiting.popleft()
                    here, there = context.Pipe(duplex=False)
                    process = context.Process(target=_work, args=(there, pickle.dumps(trial), work))
                    process.start()
                    there.close()  # so that its end is seen when the process is gone
                    running[here] = (process, trial)
                for connection in wait(list(running)):
                    assert isinstance(connection, Connection)
                    process, trial = running.pop(connection)
                    yield _received(connection, process, trial, work)
        finally:
            for process, _ in running.values():
                process.kill()
                process.join()


def _work(there: Connection, pickled: bytes, work: Work) -> None:
    there.send(_performed(pickled, work))
    there.close()


def _performed(pickled: bytes, work: Work) -> Record:
    try:
        prepare(1, work.user_file)  # first: a trial may hold what the user's file defines
        if stamp(work.user_file) != work.stamp:
            raise RuntimeError(
                f"{work.user_file} was changed while the study ran: put it back, or start a new folder"
            )
        trial = pickle.loads(pickled)
    except Exception as error:
        return {"reason": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    return perform(trial, work.code, work.folder, work.every)


def _received(connection: Any, process: Any, trial: Trial, work: Work) -> Record:
    try:
        record = connection.recv()
    except (EOFError, OSError):  # killed before it told, or in the middle of telling
        record = None
    process.join()
    if record is not None:
        return record if "trial" in record else blank(trial, work.code) | {"status": "failed"} | record
    how = f"killed by signal {-process.exitcode}" if process.exitcode < 0 else f"left with code {process.exitcode}"
    return blank(trial, work.code) | {"status": "failed", "reason": f"its process was {how}", "traceback": None}


@dataclass(frozen=True)
class Ray(Executor):
    """Tasks of a Ray cluster: the one at `address`, or a local one that is started for the purpose and stopped after.

    A trial is one core. Half-finished trials are kept in the study's folder where every node sees it.
    """

    workers: int
    address: str | None = None

    @contextmanager
    def ready(self) -> Generator[None]:
        ray = require("ray", "The Ray executor", "ray")
        if ray.is_initialized():  # the caller's own, or one that this has started before
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
        work = replace(work, folder=work.folder.absolute())  # a task starts in a folder of Ray's own
        waiting, running = deque(trials), {}
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    trial = waiting.popleft()
                    running[task.remote(pickle.dumps(trial), work)] = trial
                for reference in ray.wait(list(running))[0]:
                    trial = running.pop(reference)
                    try:
                        yield ray.get(reference)
                    except ray.exceptions.RayError as error:
                        why = {"reason": f"its task was lost: {type(error).__name__}", "traceback": str(error)}
                        yield blank(trial, work.code) | {"status": "failed"} | why
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _task(pickled: bytes, work: Work) -> Record:
    """A process of Ray's stays and serves other tasks, so each trial gets one of its own, as on one machine."""
    if work.user_file is not None:
        load_file(work.user_file)  # first: a trial may hold what the user's file defines
    (record,) = Local(1).perform([pickle.loads(pickled)], work)
    return record
