"""Executors: they run each trial in a process of its own, on this machine or on a Ray cluster."""

from __future__ import annotations

import logging
import os
import pickle
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from gradcost.core.errors import BadInput, require
from gradcost.studies.processes import Job, Record, Work, in_processes
from gradcost.studies.trial import Trial
from gradcost.studies.user_code import origins
from gradcost.studies.worker import empty_record

STORE = 100 << 20  # bytes of Ray's object store; it holds nothing but records


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
        yield from in_processes([_job(trial, work) for trial in trials], work, self.workers)


def _job(trial: Trial, work: Work) -> Job:
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
        return Job(pickle.dumps(trial), empty_record(trial, work.code))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise BadInput(
            f"{trial.task} cannot be sent to a worker process ({error}): define its classes and functions at the top "
            "level of a file."
        ) from error


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


def _task(job: Job, work: Work) -> Record:
    """Run a trial in a new process, because Ray reuses its own process for later tasks."""
    (record,) = in_processes([job], work, 1)
    return record
