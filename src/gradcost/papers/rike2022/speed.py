"""How much faster backprop converges than the forward gradient, in steps, by four definitions.

A curve of records has one point per window of steps: the mean training loss since the previous point. A loss that a
point is the first to reach was reached between the previous point and this one, so a ratio of two such steps has a
range.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import NamedTuple

from gradcost.papers.intervals import Between, Measured
from gradcost.results.records import TrialRecord

LEAST_FALL = 0.01  # of the loss of guessing; a run whose loss falls less has not begun to converge


class Ratio(NamedTuple):
    """How many times as many steps the forward gradient takes as backprop.

    Args:
        forward: the step of the first point of the forward gradient's curve that has reached the loss; None if the
            run does not reach it.
        backprop: the same for backprop.
        low: the least ratio that agrees with the records.
        high: the largest one; inf if the first point of backprop's curve has reached the loss, or if the forward
            gradient does not reach it.
    """

    forward: int | None
    backprop: int | None
    low: float
    high: float

    @property
    def value(self) -> Measured:
        """The geometric mean of `low` and `high` if both are numbers above 0, otherwise these bounds."""
        if self.low > 0 and self.high < inf:
            return sqrt(self.low * self.high)
        return Between(self.low, self.high)


@dataclass(frozen=True)
class Definition:
    """A definition of convergence.

    Args:
        name: when a run counts as converged.
        losses: takes the forward-gradient run, the backprop run and the loss of guessing, which is about that of the
            initial weights; returns the training loss that each run must reach.
        by_fall: whether these losses are made from those of the runs, which then have to fall.
    """

    name: str
    losses: Callable[[TrialRecord, TrialRecord, float], tuple[float, float]]
    by_fall: bool = True


def _losses(run: TrialRecord) -> list[float]:
    return [loss for loss in run.curve.loss if loss is not None]


def _own_fall(share: float) -> Callable[[TrialRecord, TrialRecord, float], tuple[float, float]]:
    def after_fall(run: TrialRecord, guessing: float) -> float:
        return guessing - share * (guessing - min(_losses(run)))

    return lambda forward, backprop, guessing: (after_fall(forward, guessing), after_fall(backprop, guessing))


DEFINITIONS = (
    Definition("90% of its own fall", _own_fall(0.9)),
    Definition("95% of its own fall", _own_fall(0.95)),
    Definition("loss 1.0", lambda forward, backprop, guessing: (1.0, 1.0), by_fall=False),
    Definition(
        "final loss of the forward gradient",
        lambda forward, backprop, guessing: (_losses(forward)[-1], _losses(forward)[-1]),
    ),
)


def ratio(
    forward: TrialRecord, backprop: TrialRecord, definition: Definition, guessing: float | None
) -> Ratio | None:
    """Return how many times as many steps the forward gradient takes as backprop to converge.

    Args:
        forward: a run of the forward gradient.
        backprop: the run of backprop with the same optimizer and seed.
        definition: when a run counts as converged.
        guessing: the loss of guessing. None: not known, so a fall has no start.
    Returns:
        The ratio. A run that does not reach its loss would need more than its steps, or infinitely many if it
        diverged. None if neither run reaches it, or if the loss is made from a run that did not finish or falls less
        than LEAST_FALL, or if guessing has such a loss.
    """
    start = inf if guessing is None else guessing
    if definition.by_fall and not all(_falls(run, start) for run in (forward, backprop)):
        return None
    targets = definition.losses(forward, backprop, start)
    if any(target >= start for target in targets):
        return None  # guessing has this loss
    (before, step), (backprop_before, backprop_step) = (
        _reached(run, target) for run, target in zip((forward, backprop), targets, strict=True)
    )
    if step is None and backprop_step is None:
        return None
    low = before / backprop_step if backprop_step is not None else 0.0
    high = step / backprop_before if step is not None and backprop_before else inf
    return Ratio(step, backprop_step, low, high)


def _falls(run: TrialRecord, guessing: float) -> bool:
    fell = isfinite(guessing) and min(_losses(run), default=inf) <= (1 - LEAST_FALL) * guessing
    return run.status == "finished" and fell


def _reached(run: TrialRecord, target: float) -> tuple[float, int | None]:
    """Return the last recorded step before the loss is reached (0 if none), and the first one after; None if none."""
    before = 0
    for step, loss in zip(run.curve.step, run.curve.loss, strict=True):
        if loss is not None and loss <= target:
            return before, step
        before = step
    return (inf if run.status == "diverged" else before), None


def resolution(run: TrialRecord) -> int:
    """Return the number of steps that one point of the curve of a run covers; 0 without a curve."""
    return run.curve.step[0] if run.curve.step else 0
