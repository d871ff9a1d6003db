"""A study: a question, and a generator of the trials that answer it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from gradcost.core.errors import BadInput
from gradcost.results.records import TrialRecord
from gradcost.studies.trial import Trial

Stage = Sequence[Trial]
Stages = Generator[Stage, list[TrialRecord], None]


@dataclass(frozen=True)
class Study:
    """A question, and the trials that answer it.

    Args:
        question: what the study answers, as a sentence. It identifies the study in its folder.
        trials: a generator function. It yields a list of trials, which run side by side. When all have ended it
            receives their records, in the same order. What it yields next may depend on these records and on
            nothing else: a study that is resumed runs the generator from its beginning, with the known records.
        file: the Python file whose code the trials need, besides gradcost. None: the file that defines `trials`.
    """

    question: str
    trials: Callable[[], Stages]
    file: str | None = None


def study(question: str) -> Callable[[Callable[[], Stages]], Study]:
    """Make a `Study` of a generator function of trials.

    Used as a decorator: `@study("Which gradient is best on digits?")`.

    Args:
        question: what the study answers.
    Returns:
        A decorator that turns a generator function into a Study.
    """
    return lambda trials: Study(question, trials)


def first_stage(study: Study) -> Stage:
    """Return the first trials of a study; stages without trials are skipped.

    Raises:
        BadInput: the study yields no trial.
    """
    stages = study.trials()
    try:
        stage = next(stages)
        while not stage:
            stage = stages.send([])
    except StopIteration:
        raise BadInput(f'the study "{study.question}" yields no trial, so there is nothing to run.') from None
    return stage
