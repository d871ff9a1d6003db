"""A trial, performed: what a worker process does."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from gradcost.core.errors import BadInput, GradcostError
from gradcost.core.notes import Note
from gradcost.studies.environment import describe
from gradcost.studies.trial import Trial
from gradcost.studies.trial_log import TrialLog
from gradcost.training import checkpoint
from gradcost.training.loop import train


def prepare(threads: int, user_file: str | None) -> None:
    """Make this process a worker: pinned threads (their count changes bits), and the user's file imported."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", Note)
    if user_file is not None:
        load_file(user_file)


def _leave_with_parent() -> None:
    """A parent that was killed cannot stop its workers: they see it go and leave."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def load_file(path: str) -> Any:
    """The user's Python file as a module, under a name that is the same in every process."""
    name = f"gradcost_user_{Path(path).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise BadInput(f"{path} is no Python file: its name must end in .py.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def blank(trial: Trial, code: str) -> dict[str, Any]:
    """The record of a trial of which nothing is known yet."""
    return {
        "schema": 1,
        "kind": "trial",
        "trial": trial.name(code),
        "method": trial.method,
        "estimator": repr(trial.estimator),
        "optimizer": repr(trial.optimizer),
        "phase": trial.phase,
        "lr": trial.optimizer.lr,
        "seed": trial.seed,
        "steps": 0,
        "task": repr(trial.task),
    }


def perform(trial: Trial, code: str, folder: Path, every: float = math.inf) -> dict[str, Any]:
    """Run a trial to its end; an exception becomes a record of a failed trial, with its traceback.

    Every `every` seconds the trial is kept as it stands, in a folder of its own under `folder`, and goes on from
    there when it is performed again: with the same bits as if it had never been stopped.
    """
    start = time.perf_counter()
    kept = folder / "trials" / trial.name(code) / "checkpoint"
    try:
        found = _run(trial, kept, every, start)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        found = {"status": "failed", "reason": reason, "traceback": traceback.format_exc()}
    made = blank(trial, code) | {"environment": describe(torch.get_num_threads(), code)}
    return made | {"seconds": round(time.perf_counter() - start, 3)} | found


def _run(trial: Trial, kept: Path, every: float, start: float) -> dict[str, Any]:
    seen = _begun(trial, kept)
    before, written = seen.seconds, start
    for step in train(trial.task, trial.estimator, trial.optimizer, trial.key, trial.steps, kept):
        if not seen.goes_on_after(step):
            break
        now = time.perf_counter()
        if now - written > every and seen.taken < trial.steps:
            seen.seconds, written = before + now - start, now
            with contextlib.suppress(OSError, ImportError):  # what cannot be kept is only run again
                kept.parent.mkdir(parents=True, exist_ok=True)
                checkpoint.write(kept, step.train_state, seen.notes())
    return seen.record() | {"seconds": round(before + time.perf_counter() - start, 3)}


def _begun(trial: Trial, kept: Path) -> TrialLog:
    """What was seen up to the checkpoint. One that is damaged, or of other code, is removed and the trial begins
    anew, which finds the same numbers."""
    if kept.exists():
        seen = TrialLog(trial)
        try:
            seen.take_up(checkpoint.notes(kept))
        except (GradcostError, TypeError, KeyError):
            kept.unlink()
        else:
            return seen
    return TrialLog(trial)
