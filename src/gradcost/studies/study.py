"""A study: a question, and a generator of the trials that answer it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gradcost.core.errors import BadInput
from gradcost.results.records import TrialRecord
from gradcost.studies.task_info import check_task
from gradcost.studies.trial import Trial
from gradcost.tasks.placed import placed

Stage = Sequence[Trial]
Stages = Generator[Stage, list[TrialRecord], None]

_ADVICE = "write `yield [Trial(...), ...]` for each stage"


@dataclass(frozen=True)
class Study:
    """A question, and the trials that answer it.

    Args:
        question: what the study answers, as a sentence. It identifies the study in its folder.
        trials: a generator function. It yields lists of trials, called stages. The trials of a stage run in
            parallel. The `yield` returns their records, in the same order. A later stage may depend only on these
            records: a resumed study restarts the generator and sends it the records from disk.
        file: the Python file whose code the trials need, besides gradcost. None: the file that defines `trials`.
    """

    question: str
    trials: Callable[[], Stages]
    file: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.question, str):
            raise BadInput(f'a study has a question, a text: write @study("your question"), not {self.question!r}.')

    def on(self, device: str | None) -> Study:
        """Return the study whose trials run on a device.

        Args:
            device: "cpu", "cuda" or "cuda:1". None: the study as it is.
        Raises:
            BadInput: this machine has no such device. `stages` raises it, because records can be read without one.
        """
        if device is None:
            return self

        @functools.wraps(self.trials)
        def trials() -> Stages:
            return _changed(
                self.stages(), lambda stage: [replace(trial, task=placed(trial.task, device)) for trial in stage]
            )

        end = "" if self.question.endswith((".", "?", "!")) else "."
        return replace(self, question=f"{self.question}{end} Trials run on {device}.", trials=trials)

    def stages(self) -> Stages:
        """Start the generator of trials, and check each stage that it yields.

        Raises:
            BadInput: `trials` is not a generator function, a stage is not a list of trials, or trials with one label
                cannot be in one group (`_require_one_method`).
        """
        name = f'the study "{self.question}"'
        try:
            inspect.signature(self.trials).bind()
        except TypeError as error:
            raise BadInput(f"{name} has a function that needs arguments ({error}): write it without.") from None
        stages = self.trials()
        if not isinstance(stages, Generator):
            raise BadInput(f"{name} returns {type(stages).__name__}, and is no generator: {_ADVICE}.")

        known: dict[tuple[Any, ...], Trial] = {}

        def checked(stage: Stage) -> Stage:
            if not isinstance(stage, list | tuple):
                raise BadInput(f"{name} yields {type(stage).__name__}, which is no list of trials: {_ADVICE}.")
            for trial in stage:
                if not isinstance(trial, Trial):
                    raise BadInput(f"{name} yields a list with {trial!r}, which is no Trial: {_ADVICE}.")
                check_task(trial.task, f"the task {trial.task!r} of {name}")
                _require_one_method(trial, known, name)
            return stage

        yield from _changed(stages, checked)


def _require_one_method(trial: Trial, known: dict[tuple[Any, ...], Trial], study: str) -> None:
    """Raise BadInput if a trial cannot be in one group with the earlier trials of its label.

    All runs of a label have one estimator. Scores are averaged over the runs of a label, a phase and a learning rate,
    so these also have one optimizer and one number of steps. All final runs of a label have one number of steps.

    Args:
        trial: the trial.
        known: the first trial of each group. The trial is added to it.
        study: the study, for the message.
    """
    is_final = trial.phase == "final"
    of_label = known.setdefault((trial.method,), trial)
    of_rate = known.setdefault((trial.method, trial.phase, trial.optimizer.lr), trial)
    of_phase = known.setdefault((trial.method, trial.phase), trial) if is_final else of_rate
    for before, now in (
        (repr(of_label.estimator), repr(trial.estimator)),
        (repr(of_rate.optimizer), repr(trial.optimizer)),
        (f"{of_phase.steps:,} steps", f"{trial.steps:,} steps"),
    ):
        if before != now:
            raise BadInput(
                f"{study} has {trial.phase} runs with the label {trial.method!r} and {now}, after runs with "
                f"{before}: runs are grouped by label, so give each method its own."
            )


def _changed(stages: Stages, change: Callable[[Stage], Stage]) -> Stages:
    """Yield each stage after a change, and send its records on."""
    records: Any = None  # a generator is started by sending None
    while True:
        try:
            stage = stages.send(records)
        except StopIteration:
            return
        records = yield change(stage)


def study(question: str) -> Callable[[Callable[[], Stages]], Study]:
    """Make a `Study`, as a decorator: `@study("Which gradient is best on digits?")`.

    Args:
        question: what the study answers.
    Returns:
        A decorator that turns a generator function of trials into a `Study`.
    """
    return lambda trials: Study(question, trials)


def first_stage(study: Study) -> Stage:
    """Return the first stage of a study; stages without trials do not count.

    Raises:
        BadInput: the study yields no trial.
    """
    stages = study.stages()
    try:
        stage = next(stages)
        while not stage:
            stage = stages.send([])
    except StopIteration:
        raise BadInput(f'the study "{study.question}" yields no trial, so there is nothing to run.') from None
    return stage
