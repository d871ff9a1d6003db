"""What is seen of a trial while it trains: the curves, the scores, how it ended."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from gradcost.studies.trial import Trial
from gradcost.tasks.task import Split
from gradcost.training.loop import StepResult
from gradcost.training.spikes import SlopeMonitor

EVALUATIONS = 20  # of the validation split, spread over a final run, whose curve is read
CHECKS = 4  # and over one that tunes or confirms, whose end alone is
SPIKES = 20  # that go on record; one that diverges may have thousands
POINTS = 200  # of the loss curve, each the mean of the steps since the last


class TrialLog:
    """The growing record of one trial: fed with every step, kept with its checkpoints, read at its end."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.splits = trial.task.splits()
        self.evaluate_every = max(1, trial.steps // (EVALUATIONS if trial.phase == "final" else CHECKS))
        self.record_every = max(1, trial.steps // POINTS)
        names = ("step", "loss", "slope", "validation_step", "validation_loss", "validation_accuracy")
        self.curve: dict[str, list[Any]] = {name: [] for name in names}
        self.window: list[float] = []  # losses since the last point of the curve
        self.slopes, self.steepest = (
            SlopeMonitor(),
            0.0,
        )  # all of them, and the largest since the last point of the curve
        self.clipped = [0.0, 0]  # the sum of the clip rates, and of how many steps
        self.taken, self.seconds = 0, 0.0
        self.validation: dict[str, Any] | None = None
        self.reason: str | None = None  # why it diverged
        self.model: nn.Module | None = None

    def goes_on_after(self, step: StepResult) -> bool:
        """Look at a step; False where the loss is not finite, which ends the trial."""
        self.model, self.taken, loss = step.objective.model, step.number + 1, float(step.loss)
        if step.clipped is not None:
            self.clipped = [self.clipped[0] + step.clipped, self.clipped[1] + 1]
        measured = [] if step.slopes is None else step.slopes.tolist()
        self.slopes.add(self.taken, loss, measured)
        self.steepest = max([self.steepest, *(abs(slope) for slope in measured)])
        if not math.isfinite(loss):
            self.reason = f"the loss was {loss} at step {self.taken}"
            return False
        self.window.append(loss)
        if self.taken % self.record_every == 0 or self.taken == self.trial.steps:
            self.curve["step"].append(self.taken)
            self.curve["loss"].append(short(sum(self.window) / len(self.window)))
            self.window.clear()
            self.curve["slope"].append(short(self.steepest) if self.slopes.slopes else None)
            self.steepest = 0.0
        if self.taken % self.evaluate_every == 0 or self.taken == self.trial.steps:
            score = self.trial.task.score(self.model, self.splits.validation)
            self.validation = told(score, self.splits.validation)
            self.curve["validation_step"].append(self.taken)
            self.curve["validation_loss"].append(short(score.loss))
            self.curve["validation_accuracy"].append(short(score.accuracy))
        return True

    def notes(self) -> dict[str, Any]:
        """All that is needed to go on looking."""
        names = ("curve", "window", "steepest", "clipped", "taken", "seconds", "validation")
        return {name: getattr(self, name) for name in names} | {"slopes": self.slopes.plain()}

    def take_up(self, notes: dict[str, Any]) -> None:
        """Go on from what `notes` gave."""
        for name, value in notes.items():
            setattr(self, name, SlopeMonitor.of(value) if name == "slopes" else value)

    def record(self) -> dict[str, Any]:
        """How it ended. The test split is scored here, once, for a final run that did not diverge."""
        if self.reason is None and (self.validation is None or self.validation["loss"] is None):
            self.reason = "the validation loss was not finite at the end"
        accuracies = zip(self.curve["validation_step"], self.curve["validation_accuracy"], strict=True)
        reached = next((at for at, accuracy in accuracies if (accuracy or 0.0) >= self.trial.target), None)
        curve = self.curve if self.slopes.slopes else {**self.curve, "slope": []}
        found: dict[str, Any] = {
            "status": "finished" if self.reason is None else "diverged",
            "steps": self.taken,
            "curve": curve,
            "validation": self.validation,
            "test": None,
            "reached": reached,
            "clip_rate": short(self.clipped[0] / self.clipped[1]) if self.clipped[1] else None,
            "slopes": self._spikes() if self.slopes.slopes else None,
        }
        if self.reason is not None:
            return found | {"reason": self.reason}
        if self.trial.phase == "final":
            assert self.model is not None, "a trial that was resumed at its very end has a step to take"
            score = self.trial.task.score(self.model, self.splits.test)
            found["test"] = told(score, self.splits.test)
        return found

    def _spikes(self) -> dict[str, Any]:
        """How many slopes were measured, the largest, and those far above the ones before (see `Series`)."""
        spikes = self.slopes.spikes
        first = [{"step": s.step, "slope": short(s.slope), "threshold": short(s.threshold)} for s in spikes[:SPIKES]]
        return {
            "number": self.slopes.slopes,
            "largest": short(self.slopes.largest),
            "spikes": len(spikes),
            "first": first,
        }


def told(score: Any, split: Split) -> dict[str, Any]:
    """A score as it goes on record: every number that the task gave, and how many targets the split holds where it
    said how many it scored."""
    numbers = {"loss": score.loss, "accuracy": score.accuracy} | getattr(score, "_asdict", dict)()
    targets = numbers.pop("targets", None)
    counted = {} if targets is None else {"targets": targets, "of": split.y.numel()}
    return {name: short(number) for name, number in numbers.items()} | counted


def short(x: float) -> float | None:
    """Seven digits, which float32 sums do not exceed; None for what JSON cannot say."""
    return float(f"{x:.7g}") if math.isfinite(x) else None
