"""A trial, performed: what a worker process does."""

from __future__ import annotations

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

from gradcost.dual import Note
from gradcost.study.trial import Trial
from gradcost.training.loop import train

EVALUATIONS = 20  # of the validation split, spread over a run
POINTS = 200  # of the loss curve, each the mean of the steps since the last


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
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def perform(trial: Trial, code: str) -> dict[str, Any]:
    """Run a trial to its end; an exception becomes a record of a failed trial, with its traceback."""
    record: dict[str, Any] = {
        "schema": 1,
        "kind": "trial",
        "trial": trial.name(code),
        "method": trial.method,
        "estimator": repr(trial.estimator),
        "optimizer": repr(trial.optimizer),
        "phase": trial.phase,
        "lr": trial.optimizer.lr,
        "seed": trial.seed,
    }
    start = time.perf_counter()
    try:
        record |= _run(trial)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        record |= {"status": "failed", "steps": 0, "reason": reason, "traceback": traceback.format_exc()}
    return record | {"seconds": round(time.perf_counter() - start, 3)}


def _run(trial: Trial) -> dict[str, Any]:
    splits = trial.task.splits()
    evaluate_every = max(1, trial.steps // EVALUATIONS)
    record_every = max(1, trial.steps // POINTS)
    curve: dict[str, list[Any]] = {
        name: [] for name in ("step", "loss", "validation_step", "validation_loss", "validation_accuracy")
    }
    found: dict[str, Any] = {"status": "finished", "curve": curve, "validation": None, "test": None}
    window: list[float] = []
    clipped: list[float] = []
    objective, taken = None, 0
    for step in train(trial.task, trial.estimator, trial.optimizer, trial.key, trial.steps):
        objective, taken, loss = step.objective, step.number + 1, float(step.loss)
        if step.clipped is not None:
            clipped.append(step.clipped)
        if not math.isfinite(loss):
            found |= {"status": "diverged", "reason": f"the loss was {loss} at step {taken}"}
            break
        window.append(loss)
        if taken % record_every == 0 or taken == trial.steps:
            curve["step"].append(taken)
            curve["loss"].append(_short(sum(window) / len(window)))
            window.clear()
        if taken % evaluate_every == 0 or taken == trial.steps:
            score = trial.task.score(objective.model, splits.validation)
            found["validation"] = {"loss": _short(score.loss), "accuracy": _short(score.accuracy)}
            curve["validation_step"].append(taken)
            curve["validation_loss"].append(_short(score.loss))
            curve["validation_accuracy"].append(_short(score.accuracy))
    assert objective is not None
    accuracies = zip(curve["validation_step"], curve["validation_accuracy"], strict=True)
    found["reached"] = next((at for at, accuracy in accuracies if (accuracy or 0.0) >= trial.target), None)
    found["clip_rate"] = _short(sum(clipped) / len(clipped)) if clipped else None
    found["steps"] = taken
    if found["status"] == "finished" and found["validation"]["loss"] is None:
        found |= {"status": "diverged", "reason": "the validation loss was not finite at the end"}
    if found["status"] == "finished" and trial.phase == "final":
        score = trial.task.score(objective.model, splits.test)
        found["test"] = {"loss": _short(score.loss), "accuracy": _short(score.accuracy)}
    return found


def _short(x: float) -> float | None:
    """Seven digits, which float32 sums do not exceed; None for what JSON cannot say."""
    return float(f"{x:.7g}") if math.isfinite(x) else None
