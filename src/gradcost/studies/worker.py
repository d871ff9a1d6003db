"""Run one trial: what a worker process does."""

from __future__ import annotations

import contextlib
import io
import json
import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from gradcost.core.errors import GradcostError, described, shortened
from gradcost.core.notes import Note
from gradcost.studies.environment import describe
from gradcost.studies.task_info import device_of
from gradcost.studies.trial import Trial
from gradcost.studies.trial_log import TrialLog
from gradcost.studies.user_code import UserCode
from gradcost.training import checkpoint
from gradcost.training.loop import train


def prepare(threads: int, user_code: UserCode | None) -> None:
    """Prepare this process as a worker: set the number of threads, which changes bits, and import the user's file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles an interrupt
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", Note)
    if user_code is not None:
        with contextlib.redirect_stdout(io.StringIO()):  # the caller's process prints the script's output already
            user_code.load()


def _exit_with_parent() -> None:
    """Exit when the parent process ends: a killed parent cannot stop its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)  # with the processes that the trial has started
        os._exit(1)


def empty_record(trial: Trial, code: str) -> dict[str, Any]:
    """Return the record of a trial without any result."""
    return {
        "schema": 1,
        "kind": "trial",
        "trial": trial.name(code),
        "method": trial.method,
        "estimator": repr(trial.estimator),
        "exact": trial.estimator.exact,
        "optimizer": repr(trial.optimizer),
        "phase": trial.phase,
        "lr": trial.optimizer.lr,
        "seed": trial.seed,
        "steps": 0,
        "task": repr(trial.task),
    }


def perform(trial: Trial, code: str, folder: Path, every: float = math.inf) -> dict[str, Any]:
    """Run a trial to its end and return its record. If the trial raises, its status is "failed".

    Args:
        trial: the trial to run.
        code: the fingerprint of the code.
        folder: the results folder. The training checkpoint is `trials/ID/checkpoint` in it. If the trial runs
            again, it resumes from there, with the same bits as a trial without interruption.
        every: seconds between two training checkpoints.
    """
    start = time.perf_counter()
    folder = folder.absolute()  # the trial may change the current folder
    name = trial.name(code)
    path = folder / "trials" / name / "checkpoint"
    try:
        try:
            result = _run(trial, path, every, start)
        except checkpoint.BadCheckpoint as error:
            note = _set_aside(path, folder / "damaged" / name, error)
            result = _run(trial, path, every, start) | {"note": note}
        json.dumps(result, allow_nan=False)  # the task may have returned anything
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        result = {"status": "failed", "reason": described(error), "traceback": shortened(traceback.format_exc())}
    environment = describe(torch.get_num_threads(), code, device_of(trial.task))
    record = empty_record(trial, code) | {"environment": environment}
    return record | {"seconds": round(time.perf_counter() - start, 3)} | result


def _run(trial: Trial, path: Path, every: float, start: float) -> dict[str, Any]:
    log = _restored_log(trial, path)
    before, written = log.seconds, start
    for step in train(trial.task, trial.estimator, trial.optimizer, trial.key, trial.steps, path):
        if not log.add(step):
            break
        now = time.perf_counter()
        if now - written > every and log.taken < trial.steps:
            log.seconds, written = before + now - start, now
            # A trial without a checkpoint has the same result.
            with contextlib.suppress(OSError, ImportError, GradcostError):
                path.parent.mkdir(parents=True, exist_ok=True)
                checkpoint.write(path, step.train_state, log.state())
    return log.record() | {"seconds": round(before + time.perf_counter() - start, 3)}


def _restored_log(trial: Trial, path: Path) -> TrialLog:
    """Return the log in the training checkpoint; a new log if there is none."""
    log = TrialLog(trial)
    if path.exists():
        state = checkpoint.notes(path)
        try:
            log.restore(state)
        except Exception as error:  # a crafted file, whose checksum is right
            raise checkpoint.BadCheckpoint(f"{path} holds no log of this trial ({error}).") from error
    return log


def _set_aside(path: Path, target: Path, error: Exception) -> str:
    """Move a training checkpoint that cannot be used, and return a note about it for the trial's record."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
        place = f"it is kept as {target}"
    except OSError:
        path.unlink()
        place = "it was deleted"
    return f"its training checkpoint could not be used, so the trial began anew; {place}. {error}"
