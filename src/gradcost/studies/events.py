"""What a comparison or a study reports while it runs: one small value for each event."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gradcost.core.notes import Note
from gradcost.planning.forecast import Forecast
from gradcost.results.records import TrialRecord


@dataclass(frozen=True)
class ComparisonStarted:
    """A comparison was checked; nothing is written yet.

    Args:
        folder: where its records go.
        task: the name of the task.
        model: the name of the model.
        weights: the number of trainable weights.
        steps: the training steps of each trial.
        points: the learning rates that each method is tuned over.
        seeds: the final runs of each method.
    """

    folder: Path
    task: str
    model: str
    weights: int
    steps: int
    points: int
    seeds: int


@dataclass(frozen=True)
class MethodForecast:
    """The bytes and FLOPs of one step of a method, before anything runs.

    Args:
        method: its label.
        forecast: what one step takes.
    """

    method: str
    forecast: Forecast


@dataclass(frozen=True)
class MethodRefused:
    """A method is not run: it cannot be used here, or its step does not fit the memory.

    Args:
        method: its label.
        reason: why, as a sentence.
    """

    method: str
    reason: str


@dataclass(frozen=True)
class TrialsStarted:
    """The trials of a comparison start.

    Args:
        totals: for each method, the most trials it may have.
        finished: for each method, the trials that an earlier call finished.
    """

    totals: Mapping[str, int]
    finished: Mapping[str, int]


@dataclass(frozen=True)
class TrialFinished:
    """A trial ended: finished, diverged or failed.

    Args:
        trial: its record.
    """

    trial: TrialRecord


@dataclass(frozen=True)
class TrialsEnded:
    """No trial runs any more.

    Args:
        folder: where the records are.
        ran: how many trials this call ran.
        failed: how many of them failed.
        reason: why the first of these failed; None without failures.
    """

    folder: Path
    ran: int
    failed: int
    reason: str | None


@dataclass(frozen=True)
class StepTimed:
    """One step of a method was timed and its cost is on record.

    Args:
        method: its label.
    """

    method: str


@dataclass(frozen=True)
class EstimatesAssessed:
    """The estimates of a method were compared with the gradient and the result is on record.

    Args:
        method: its label.
    """

    method: str


Event = (
    ComparisonStarted
    | MethodForecast
    | MethodRefused
    | TrialsStarted
    | TrialFinished
    | TrialsEnded
    | StepTimed
    | EstimatesAssessed
)
OnEvent = Callable[[Event], None]


def warn_of_failures(event: Event) -> None:
    """Issue a `Note` when trials failed; ignore every other event."""
    if isinstance(event, TrialsEnded) and event.failed:
        warnings.warn(
            f"{event.failed} of {event.ran} trials failed; the first: {event.reason}. Their tracebacks are in "
            f"{event.folder / 'records.jsonl'}. The same call runs them again.",
            Note,
            stacklevel=2,
        )
