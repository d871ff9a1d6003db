"""Events that a comparison or a study passes to `on_event` while it runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gradcost.core.metric import ACCURACY, Metric
from gradcost.core.notes import Note
from gradcost.planning.forecast import Forecast
from gradcost.results.records import TrialRecord
from gradcost.studies.output import Warned


@dataclass(frozen=True)
class ComparisonStarted:
    """A comparison starts: its options are valid. No file is written yet.

    Args:
        folder: the results folder.
        task: the name of the task.
        model: the name of the model.
        weights: the number of trainable weights.
        steps: the number of training steps of each trial.
        points: the number of learning rates tried per method.
        seeds: the number of final runs per method.
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
    """The cost of one step of a method was forecast. This call has run no trial of the method yet.

    Args:
        method: label of the method.
        forecast: the bytes and FLOPs of one step.
    """

    method: str
    forecast: Forecast


@dataclass(frozen=True)
class MethodRefused:
    """A method does not run: it cannot be used with the task, or its step exceeds the memory budget.

    Args:
        method: label of the method.
        reason: the reason, as a sentence.
    """

    method: str
    reason: str


@dataclass(frozen=True)
class TrialsStarted:
    """The trials of a comparison start.

    Args:
        totals: the largest number of trials of each method.
        finished: the number of trials of each method that finished or diverged in earlier calls.
        metric: what ranks the trials.
    """

    totals: Mapping[str, int]
    finished: Mapping[str, int]
    metric: Metric = ACCURACY


@dataclass(frozen=True)
class TrialFinished:
    """A trial ended. Its status is "finished", "diverged" or "failed".

    Args:
        trial: record of the trial.
        metric: what ranks the trials.
    """

    trial: TrialRecord
    metric: Metric = ACCURACY


@dataclass(frozen=True)
class RoundEnded:
    """A comparison under a time limit has new trials of every method.

    Args:
        text: what is known so far, as sentences.
    """

    text: str


@dataclass(frozen=True)
class TimeIsUp:
    """The time limit of a comparison ended it before its last trial. The same call continues.

    Args:
        finished: the number of trials on record.
        most: the largest number of trials of the comparison.
    """

    finished: int
    most: int


@dataclass(frozen=True)
class TrialsEnded:
    """All trials of a call ended.

    Args:
        folder: the results folder.
        ran: the number of trials that this call ran.
        failed: the number of these trials that failed.
        reason: why the first failed trial failed; None if none failed.
    """

    folder: Path
    ran: int
    failed: int
    reason: str | None


@dataclass(frozen=True)
class TrialsWarned:
    """Trials of this call issued warnings.

    Args:
        warned: how many, an example, and where the trials' output is.
    """

    warned: Warned


@dataclass(frozen=True)
class StepTimed:
    """One step of a method was timed, and its cost was added to the records.

    Args:
        method: label of the method.
    """

    method: str


@dataclass(frozen=True)
class EstimatesAssessed:
    """The estimates of a method were compared with the gradient, and the result was added to the records.

    Args:
        method: label of the method.
    """

    method: str


Event = (
    ComparisonStarted
    | MethodForecast
    | MethodRefused
    | TrialsStarted
    | TrialFinished
    | RoundEnded
    | TimeIsUp
    | TrialsEnded
    | TrialsWarned
    | StepTimed
    | EstimatesAssessed
)
OnEvent = Callable[[Event], None]


def warn_of_failures(event: Event) -> None:
    """Issue a `Note` when trials failed; ignore every other event."""
    if isinstance(event, TrialsEnded) and event.failed:
        reason = str(event.reason).rstrip(".")
        warnings.warn(
            f"{event.failed} of {event.ran} trials failed; the first: {reason}. Their tracebacks are in "
            f"{event.folder / 'records.jsonl'}. The same call runs them again.",
            Note,
            stacklevel=2,
        )
