"""The study that runs the rows of Rike and Foerland's Table 1, first as published and then with equal tuning."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from gradcost.core.errors import BadInput
from gradcost.core.value import value
from gradcost.estimators.presets import forward_gradient
from gradcost.papers.rike2022 import tasks
from gradcost.papers.rike2022.protocols import AsStated, Protocol
from gradcost.papers.rike2022.table import BATCH, TUNED_SUFFIX, UNCAPPED_SUFFIX, TableRow, rows
from gradcost.papers.rike2022.tasks import LastBatch
from gradcost.results.records import TrialRecord
from gradcost.studies.costs import forward_seconds, seconds_per_step
from gradcost.studies.phases import phases
from gradcost.studies.study import Stages, Study
from gradcost.studies.trial import POINTS, Trial
from gradcost.studies.trial_log import evaluated_steps
from gradcost.tasks import TASKS
from gradcost.tasks.architectures import Mlp
from gradcost.tasks.mnist import Mnist
from gradcost.tasks.task import Task

MODELS = {"nn": ("mnist", "mlp"), "cnn": ("mnist", "cnn"), "cifar10": ("cifar10", "vgg")}  # names of task and model

_HALF_A_DECADE = 10**0.5


@value
class Tuning:
    """How to tune the learning rate of every row: with equal effort, by validation accuracy alone.

    Tuning runs are as long as the final runs with the tuned learning rates.

    Args:
        points: number of learning rates in the grid, half a decade apart, around the published learning rate.
        more: number of further learning rates, each chosen from the results so far.
        epochs: number of epochs of each tuning run and each tuned final run. None: that of the runs with published
            settings.
    Raises:
        BadInput: points < 1, more < 0 or epochs <= 0.
    """

    points: int = 5
    more: int = 2
    epochs: float | None = None

    def __post_init__(self) -> None:
        if self.epochs is not None and not self.epochs > 0:
            raise BadInput(f"epochs of a Tuning is above 0, not {self.epochs!r}.")
        if self.points < 1 or self.more < 0:
            raise BadInput(f"a Tuning has points >= 1 and more >= 0, not {self}.")

    def rates(self, lr: float) -> tuple[float, ...]:
        """Return the grid of learning rates around the published one, `lr`, rounded to two digits."""
        return tuple(float(f"{lr * _HALF_A_DECADE ** (k - self.points // 2):.2g}") for k in range(self.points))


def task_of(group: str, data: type[Task] | None = None) -> Task:
    """Return the training task of some rows.

    Args:
        group: a key of MODELS, which selects the rows.
        data: the class of another task, on which to try the command with the model of the rows. None: their own.
    Raises:
        BadInput: this version has no such task or model.
    """
    name, model = MODELS[group]
    own = TASKS.get(name)
    if own is None or model not in own.models:
        raise BadInput(f"the rows {group!r} need the task {name!r} with the model {model!r}, which is not available.")
    return (data or own)(model=own.models[model], batch=BATCH)  # type: ignore[call-arg]


@value
class Reproduction:
    """The settings of the study that trains some rows.

    Args:
        group: a key of MODELS, which selects the rows.
        epochs: number of epochs of each run with published settings. In the paper: 50, and 100 on CIFAR-10.
        seeds: number of runs per row, one per seed.
        protocol: what the paper says, or what its code ran.
        tuning: how to tune the rows for a second set of runs. None: only the published settings run.
        uncapped: whether to run each forward row that has a cap on its slopes again without it.
        points: number of points of each curve of the training loss. Each is a mean over the steps since the previous
            point.
        task: the training task: that of the rows, or a smaller one to try the command.
    Raises:
        BadInput: epochs <= 0, seeds < 1 or points < 1.
    """

    group: str = "nn"
    epochs: float = 50.0
    seeds: int = 1
    protocol: Protocol = AsStated()
    tuning: Tuning | None = None
    uncapped: bool = False
    points: int = POINTS
    task: Task = Mnist(model=Mlp((1024, 1024)), batch=BATCH)

    def __post_init__(self) -> None:
        if not self.epochs > 0 or self.seeds < 1 or self.points < 1:
            raise BadInput(f"a Reproduction has epochs > 0, seeds >= 1 and points >= 1, not {self}.")

    @property
    def steps(self) -> int:
        """The number of steps of each run with published settings. Loads the data of the task."""
        return self._steps(self.epochs)

    def _steps(self, epochs: float) -> int:
        return max(1, round(epochs * self.protocol.task(self.task).steps_per_epoch))

    @property
    def study(self) -> Study:
        # A results folder accepts one question only. The question lacks seeds, tuning, caps and points, so that a
        # folder can get all of them later.
        task = self.protocol.task(self.task)
        return Study(
            f"Rike and Foerland 2022, Table 1: {self.group}, {self.epochs:g} epochs of {task}",
            self._stages,
            tasks.__file__,
        )

    def first_stage(self) -> list[Trial]:
        """Return the runs with published settings, and those without a cap."""
        trials = []
        for row, seed in itertools.product(rows(self.group), self._seeds):
            trials.append(self._trial(row, row.name, self.steps, "final", seed))
            if self.uncapped and self.protocol.cap(row) is not None:
                free = replace(trials[-1], method=row.name + UNCAPPED_SUFFIX, estimator=forward_gradient())
                trials.append(free)
        return trials

    def further_runs(self) -> Iterator[tuple[TableRow, int, int]]:
        """Yield (row, number of runs, steps of each) for the runs with equal tuning."""
        if self.tuning is not None:
            runs = self.tuning.points + self.tuning.more + self.seeds
            yield from ((row, runs, self._tuned_steps) for row in rows(self.group))

    @property
    def _seeds(self) -> range:
        return range(1, self.seeds + 1)

    @property
    def _tuned_steps(self) -> int:
        has_own = self.tuning is not None and self.tuning.epochs is not None
        return self._steps(self.tuning.epochs) if has_own else self.steps  # type: ignore[union-attr, arg-type]

    def require_one_tuned_length(self, trials: Iterable[TrialRecord]) -> None:
        """Raise if a folder has tuned runs of another length: rates tuned at two lengths cannot be averaged.

        Raises:
            BadInput: the message has the number of epochs of these runs.
        """
        if self.tuning is None:
            return
        tuned = {row.name + TUNED_SUFFIX for row in rows(self.group)}
        lengths = {run.steps for run in trials if run.method in tuned and run.status == "finished"}
        if other := lengths - {self._tuned_steps}:
            epochs = min(other) / self.protocol.task(self.task).steps_per_epoch
            raise BadInput(
                f"the folder has tuned runs of {epochs:.3g} epochs, and this command asks for runs of "
                f"{self._tuned_steps:,} steps: write --tuned-epochs {epochs:.3g}, or choose another folder with -o."
            )

    def _stages(self) -> Stages:
        yield self.first_stage()
        if self.tuning is None:
            return
        length = self._tuned_steps
        by_name = {row.name + TUNED_SUFFIX: row for row in rows(self.group)}

        def tuned_trial(name: str, lr: float, phase: str, seed: int) -> Trial:
            return self._trial(replace(by_name[name], lr=lr), name, length, phase, seed)

        rates: dict[str, Sequence[float]] = {name: self.tuning.rates(row.lr) for name, row in by_name.items()}
        yield from phases(rates, tuned_trial, more=self.tuning.more, confirm=0, seeds=self._seeds)

    def _trial(self, row: TableRow, name: str, steps: int, phase: str, seed: int) -> Trial:
        task = LastBatch(self.protocol.task(self.task))
        estimator, optimizer = self.protocol.estimator(row), self.protocol.optimizer(row)
        return Trial(task, name, estimator, optimizer, steps, phase, seed, points=self.points)

    def hours(self) -> float:
        """Return the core-hours of all runs, with their evaluations. A few steps of each row are timed.

        The few evaluations of the tuning runs with equal tuning are left out.
        """
        stage = self.first_stage()
        step_seconds, splits = seconds_per_step(stage), self.task.splits()
        example = forward_seconds(self.task) / self.task.batch
        total = sum(trial.steps * step_seconds[trial.method] for trial in stage)
        total += sum(runs * steps * step_seconds[row.name] for row, runs, steps in self.further_runs())
        for trial in stage:
            evaluations = len(evaluated_steps(trial.steps, trial.phase))
            total += example * (evaluations * len(splits.validation.x) + len(splits.test.x))
        return total / 3600
