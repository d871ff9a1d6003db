"""Collect the record of a trial while it trains: curves, scores and status."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from gradcost.core.errors import BadInput
from gradcost.core.metric import ACCURACY, Metric
from gradcost.studies.task_info import task_metric
from gradcost.studies.trial import Trial
from gradcost.training.loop import StepResult
from gradcost.training.spikes import SlopeMonitor

EVALUATIONS = 20  # evenly spaced evaluations of the validation split in a final run, for its curve in reports
GROWTH = 1.25  # ratio of neighbouring steps of further evaluations: the resolution of the steps to a target
CHECKS = 4  # evaluations in a tuning or confirming run, where only the last one counts
SPIKES = 20  # largest number of recorded spikes; a run that diverges may have thousands


class TrialLog:
    """Collects the record of one trial step by step. Its state is saved with the training checkpoints.

    Args:
        trial: the trial that runs.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.splits = trial.task.splits()
        self.metric = task_metric(trial.task)
        self.evaluated = evaluated_steps(trial.steps, trial.phase)
        self.record_every = max(1, trial.steps // trial.points)
        names = ("step", "loss", "slope", "validation_step", "validation_loss", "validation_accuracy")
        names += () if self.metric.is_accuracy else ("validation_score",)
        self.curve: dict[str, list[Any]] = {name: [] for name in names}
        self.window: list[float] = []  # losses since the last point of the curve
        self.slopes = SlopeMonitor()
        self.steepest = 0.0  # the largest |slope| since the last point of the curve
        self.clipped = [0.0, 0]  # the sum of the clip rates, and their number
        self.taken, self.seconds = 0, 0.0
        self.validation: dict[str, Any] | None = None
        self.reason: str | None = None  # why the trial diverged; None if it did not
        self.model: nn.Module | None = None
        self.sound = set[str]()  # the splits on which the loss of the initial weights is known to be finite

    def add(self, step: StepResult) -> bool:
        """Record a step. Return False if the trial has diverged (`DivergenceMonitor`); the caller then stops it."""
        self.model, self.taken, loss = step.objective.model, step.number + 1, float(step.loss)
        if step.clipped is not None:
            self.clipped = [self.clipped[0] + step.clipped, self.clipped[1] + 1]
        slopes = [] if step.slopes is None else step.slopes.tolist()
        self.slopes.add(self.taken, loss, slopes)
        self.steepest = max([self.steepest, *(abs(slope) for slope in slopes)])
        self.reason = self.slopes.loss.reason
        if self.reason is not None:
            return False
        self.window.append(loss)
        if self.taken % self.record_every == 0 or self.taken == self.trial.steps:
            self.curve["step"].append(self.taken)
            self.curve["loss"].append(json_number(sum(self.window) / len(self.window)))
            self.window.clear()
            self.curve["slope"].append(json_number(self.steepest) if self.slopes.slopes else None)
            self.steepest = 0.0
        if self.taken in self.evaluated:
            self.validation = self._scored("validation")
            self.curve["validation_step"].append(self.taken)
            for name in ("loss", "accuracy", "score"):
                self.curve.get(f"validation_{name}", []).append(self.validation.get(name))
        return True

    def state(self) -> dict[str, Any]:
        """Return the state that `restore` takes."""
        names = ("curve", "window", "steepest", "clipped", "taken", "seconds", "validation")
        return {name: getattr(self, name) for name in names} | {"slopes": self.slopes.plain()}

    def restore(self, state: dict[str, Any]) -> None:
        """Replace the log by a state that `state` returned."""
        for name in self.state():
            setattr(self, name, SlopeMonitor.of(state[name]) if name == "slopes" else state[name])

    def record(self) -> dict[str, Any]:
        """Return the results of the trial. If it is a final run that did not diverge, score the test split, once."""
        self.slopes.loss.end(self.taken)
        self.reason = self.slopes.loss.reason
        if self.reason is None and (self.validation is None or self.validation["loss"] is None):
            self.reason = "the validation loss was not finite at the end"
        scores = self.curve.get("validation_score", self.curve["validation_accuracy"])
        target = None if self.trial.target is None else self.metric.score(self.trial.target)
        evaluated = zip(self.curve["validation_step"], scores, strict=True)
        is_reached = (step for step, score in evaluated if None not in (score, target) and score >= target)
        reached = next(is_reached, None)
        curve = self.curve if self.slopes.slopes else {**self.curve, "slope": []}
        record: dict[str, Any] = {
            "status": "finished" if self.reason is None else "diverged",
            "steps": self.taken,
            "curve": curve,
            "validation": self.validation,
            "test": None,
            "reached": reached,
            "clip_rate": json_number(self.clipped[0] / self.clipped[1]) if self.clipped[1] else None,
            "slopes": self._spikes() if self.slopes.slopes else None,
        }
        if self.reason is not None:
            return record | {"reason": self.reason}
        if self.trial.phase == "final":
            assert self.model is not None, "a trial that resumes always has a step left"
            record["test"] = self._scored("test")
        return record

    def _scored(self, part: str) -> dict[str, Any]:
        """Return the score of "validation" or "test".

        Raises:
            BadInput: the loss is not finite, and neither is that of the initial weights: the data are the cause.
        """
        assert self.model is not None
        task, split = self.trial.task, getattr(self.splits, part)
        record = score_record(task.score(self.model, split), split, self.metric)
        if record["loss"] is None and part not in self.sound:
            start = score_record(task.score(task.objective(self.trial.key).model, split), split, self.metric)
            if start["loss"] is None:
                raise BadInput(
                    f"the {part} loss is not finite, also with the initial weights: look for NaN or infinity in the "
                    f"{part} data, or in how the loss treats them."
                )
            self.sound.add(part)
        return record

    def _spikes(self) -> dict[str, Any]:
        """Return the number of slopes, the largest slope, the number of spikes, and the first `SPIKES` spikes."""
        spikes = self.slopes.spikes
        first = [
            {"step": s.step, "slope": json_number(s.slope), "threshold": json_number(s.threshold)}
            for s in spikes[:SPIKES]
        ]
        return {
            "number": self.slopes.slopes,
            "largest": json_number(self.slopes.largest),
            "spikes": len(spikes),
            "first": first,
        }


def evaluated_steps(steps: int, phase: str) -> frozenset[int]:
    """Return the steps after which a run is scored on the validation split.

    A final run is scored at 20 evenly spaced steps and at steps that grow by a quarter, so that the step at which it
    reaches a target is known to about a quarter, however early that is. Other runs are scored 4 times.

    Args:
        steps: the number of steps of the run.
        phase: "tune", "confirm" or "final".
    """
    every = max(1, steps // (EVALUATIONS if phase == "final" else CHECKS))
    even = {*range(every, steps + 1, every), steps}
    growing = (
        {round(GROWTH**power) for power in range(math.ceil(math.log(steps, GROWTH)))} if phase == "final" else ()
    )
    return frozenset(step for step in (*even, *growing) if step <= steps)


def score_record(score: Any, split: Any, metric: Metric = ACCURACY) -> dict[str, Any]:
    """Return a score as a JSON record with every number that the task returned.

    - A score with `targets` also gets `of`, the number of targets in the split.
    - For a metric other than the accuracy it gets `score` (`Metric.score`).

    Args:
        score: a mapping, or a named tuple such as `tasks.Score`.
        split: what was scored.
        metric: what ranks the runs.
    Raises:
        BadInput: the task's score has no value of the metric.
    """
    plain = getattr(score, "_asdict", dict)
    numbers = (
        dict(score) if isinstance(score, Mapping) else {"loss": score.loss, "accuracy": score.accuracy} | plain()
    )
    if metric.name not in numbers:
        raise BadInput(f"the score of the task has no {metric.name!r}, which ranks the runs: it has {[*numbers]}.")
    targets, of = numbers.pop("targets", None), numbers.pop("of", None)
    counts = {} if targets is None else {"targets": int(targets), "of": int(of or split.y.numel())}
    record = {name: json_number(number) for name, number in numbers.items()} | counts
    if not metric.is_accuracy:
        record["score"] = json_number(metric.score(numbers[metric.name]))
    return record


def json_number(x: float) -> float | None:
    """Round to seven significant digits, the precision of float32; None if the number is not finite."""
    return float(f"{x:.7g}") if math.isfinite(x) else None
