"""The rule of divergence: the same one for training, tuning, final runs, reports, the linter and `Recorder`."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

RISE = 100.0  # multiple of the first loss; runs that reached 18 times the first loss still learned
PATIENCE = 50  # steps; SGD at a large learning rate exceeds the first loss many times over, then recovers


@dataclass
class DivergenceMonitor:
    """Apply the rule of divergence to the losses of one training, step by step.

    A training has diverged if one of these holds:

    - the loss of a step is not finite;
    - the loss stays above the limit for `patience` steps;
    - the loss of the last step is above the limit (`end`).

    Law: limit = first + (rise - 1) |first|, which is `rise` times the first loss if that is positive. A first loss of
    0 gives no limit. A run whose final validation loss is not finite has diverged too. A diverged run ranks last.

    Args:
        rise: multiple of the first loss.
        patience: number of steps.
        first: the first loss; None before the first `add`.
        above: the step since which all losses are above the limit; None if the last loss is not.
        diverged: the first step of the divergence; None if the training has not diverged.
        reason: why the training has diverged, in words; None if it has not.
    """

    rise: float = RISE
    patience: int = PATIENCE
    first: float | None = None
    above: int | None = None
    diverged: int | None = None
    reason: str | None = None

    def add(self, step: int, loss: float) -> None:
        """Add the loss of a step, or the mean loss of the steps since the previous call.

        Args:
            step: the number of the step. Numbers ascend.
            loss: its loss.
        """
        if self.diverged is not None:
            return
        if not math.isfinite(loss):
            self.diverged, self.reason = step, f"the loss was {loss} at step {step}"
            return
        if self.first is None:
            self.first = loss
        if loss <= self.limit:
            self.above = None
            return
        self.above = step if self.above is None else self.above
        if step - self.above >= self.patience:
            self.diverged = self.above
            self.reason = (
                f"the loss stayed above {self.limit:.4g}, {self.rise:g} times the first loss, from step {self.above} "
                f"to step {step}"
            )

    def end(self, step: int) -> None:
        """End the training: a loss above the limit has no steps left in which to recover.

        Args:
            step: the number of the last step.
        """
        if self.diverged is None and self.above is not None:
            self.diverged = self.above
            self.reason = f"the loss ended above {self.limit:.4g}, {self.rise:g} times the first loss, at step {step}"

    @property
    def limit(self) -> float:
        """The largest loss that does not count as diverging; the largest float if there is no limit."""
        if not self.first:
            return sys.float_info.max
        return self.first + (self.rise - 1) * abs(self.first)
