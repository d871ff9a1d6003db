"""How much faster backprop converges than the forward gradient, in steps, by four definitions.

A curve of records has one point per window of steps: the mean training loss since the previous point. A loss that a
point is the first to reach was reached between the previous point and this one, so a ratio of two such steps has a
range.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, log, sqrt
from typing import NamedTuple

from gradcost.results.records import TrialRecord

CLASSES = 10
GUESSING = log(CLASSES)  # the loss of guessing, and about that of the initial weights
LEAST_FALL = 0.01  # of the loss of guessing; a run whose loss falls less has not begun to converge


class Ratio(NamedTuple):
    """How many times as many steps the forward gradient takes as backprop.

    Args:
        forward: the step of the first point of the forward gradient's curve that has reached the loss.
        backprop: the same for backprop.
        low: the least ratio that agrees with the records.
        high: the largest one; inf if the first point of backprop's curve has reached the loss.
    """

    forward: int
    backprop: int
    low: float
    high: float

    @property
    def middle(self) -> float:
        """The geometric mean of `low` and `high`; `low`, a lower bound, if `high` is infinite."""
        return self.low if self.high == inf else sqrt(self.low * self.high)


@dataclass(frozen=True)
class Definition:
    """A definition of convergence.

    Args:
        name: when a run counts as converged.
        losses: takes the forward-gradient run and the backprop run; returns the training loss that each must reach.
    """

    name: str
    losses: Callable[[TrialRecord, TrialRecord], tuple[float, float]]


def _losses(run: TrialRecord) -> list[float]:
    return [loss for loss in run.curve.loss if loss is not None]


def _own_fall(share: float) -> Callable[[TrialRecord, TrialRecord], tuple[float, float]]:
    def after_fall(run: TrialRecord) -> float:
        return GUESSING - share * (GUESSING - min(_losses(run)))

    return lambda forward, backprop: (after_fall(forward), after_fall(backprop))


DEFINITIONS = (
    Definition("90% of its own fall", _own_fall(0.9)),
    Definition("95% of its own fall", _own_fall(0.95)),
    Definition("loss 1.0", lambda forward, backprop: (1.0, 1.0)),
    Definition(
        "final loss of the forward gradient", lambda forward, backprop: (_losses(forward)[-1], _losses(forward)[-1])
    ),
)


def ratio(forward: TrialRecord, backprop: TrialRecord, definition: Definition) -> Ratio | None:
    """Return how many times as many steps the forward gradient takes as backprop to converge.

    Args:
        forward: a run of the forward gradient.
        backprop: the run of backprop with the same optimizer and seed.
        definition: when a run counts as converged.
    Returns:
        The ratio; None if a run did not finish, does not reach its loss, or falls less than LEAST_FALL.
    """
    if not all(_falls(run) for run in (forward, backprop)):
        return None
    targets = definition.losses(forward, backprop)
    spans = [_reached(run, target) for run, target in zip((forward, backprop), targets, strict=True)]
    if spans[0] is None or spans[1] is None:
        return None
    (before, step), (backprop_before, backprop_step) = spans[0], spans[1]
    high = step / backprop_before if backprop_before else inf
    return Ratio(step, backprop_step, before / backprop_step, high)


def _falls(run: TrialRecord) -> bool:
    return run.status == "finished" and min(_losses(run), default=inf) <= (1 - LEAST_FALL) * GUESSING


def _reached(run: TrialRecord, target: float) -> tuple[int, int] | None:
    """Return the last recorded step before the loss is reached (0 if none), and the first one after."""
    before = 0
    for step, loss in zip(run.curve.step, run.curve.loss, strict=True):
        if loss is not None and loss <= target:
            return before, step
        before = step
    return None


def resolution(run: TrialRecord) -> int:
    """Return the number of steps that one point of the curve of a run covers; 0 without a curve."""
    return run.curve.step[0] if run.curve.step else 0
