"""The study that runs the rows of Rike and Foerland's Table 1, first as published and then with equal tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from gradcost.core.errors import BadInput
from gradcost.core.value import value
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import backprop, forward_gradient
from gradcost.papers.rike2022 import last_batch
from gradcost.papers.rike2022.last_batch import LastBatch
from gradcost.papers.rike2022.table import BATCH, TUNED_SUFFIX, TableRow, rows
from gradcost.studies.phases import phases
from gradcost.studies.study import Stages, Study
from gradcost.studies.trial import Trial
from gradcost.tasks.architectures import Architecture, Mlp
from gradcost.tasks.mnist import Mnist
from gradcost.tasks.task import Task
from gradcost.training.optimizers import SGD, Adam, Nesterov, Optimizer

MODELS: dict[str, Architecture] = {"nn": Mlp((1024, 1024))}

_GRADIENTS: dict[str, Estimator] = {"forward": Clipped(forward_gradient(), 1.0), "backprop": backprop()}
_OPTIMIZERS: dict[str, Callable[[TableRow], Optimizer]] = {
    "sgd": lambda row: SGD(row.lr, decay=row.decay),
    "nesterov": lambda row: Nesterov(row.lr, row.momentum, decay=row.decay),
    "adam": lambda row: Adam(row.lr, row.beta1, row.beta2, decay=row.decay),
}
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


@value
class Reproduction:
    """The settings of the study that trains the rows of one model.

    Args:
        model: a key of MODELS, which selects the rows.
        epochs: number of epochs of each run with published settings; 50 in the paper.
        seeds: number of runs per row, one per seed.
        tuning: how to tune the rows for a second set of runs. None: only the published settings run.
        task: the training task: MNIST, or a smaller one to try the command.
    Raises:
        BadInput: epochs <= 0 or seeds < 1.
    """

    model: str = "nn"
    epochs: float = 50.0
    seeds: int = 1
    tuning: Tuning | None = None
    task: Task = Mnist(model=MODELS["nn"], batch=BATCH)

    def __post_init__(self) -> None:
        if not self.epochs > 0 or self.seeds < 1:
            raise BadInput(f"a Reproduction has epochs > 0 and seeds >= 1, not {self}.")

    @property
    def steps(self) -> int:
        """The number of steps of each run with published settings. Loads the data of the task."""
        return self._steps(self.epochs)

    def _steps(self, epochs: float) -> int:
        return max(1, round(epochs * self.task.steps_per_epoch))

    @property
    def study(self) -> Study:
        # A results folder accepts one question only. Seeds and tuning are not in it, so a folder can get both later.
        return Study(
            f"Rike and Foerland 2022, Table 1: {self.model}, {self.epochs:g} epochs of {self.task}",
            self._stages,
            last_batch.__file__,
        )

    def _stages(self) -> Stages:
        steps, task = self.steps, LastBatch(self.task)
        seeds = range(1, self.seeds + 1)
        table = rows(self.model)
        yield [_trial(task, row, row.name, steps, "final", seed) for row in table for seed in seeds]
        if self.tuning is None:
            return
        length = steps if self.tuning.epochs is None else self._steps(self.tuning.epochs)
        by_name = {row.name + TUNED_SUFFIX: row for row in table}

        def tuned_trial(name: str, lr: float, phase: str, seed: int) -> Trial:
            return _trial(task, replace(by_name[name], lr=lr), name, length, phase, seed)

        rates: dict[str, Sequence[float]] = {name: self.tuning.rates(row.lr) for name, row in by_name.items()}
        yield from phases(rates, tuned_trial, more=self.tuning.more, confirm=0, seeds=seeds)


def _trial(task: LastBatch, row: TableRow, name: str, steps: int, phase: str, seed: int) -> Trial:
    return Trial(task, name, _GRADIENTS[row.gradient], _OPTIMIZERS[row.optimizer](row), steps, phase, seed)
