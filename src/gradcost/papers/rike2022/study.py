"""The rows of Rike and Foerland's Table 1 as trials: as published, and tuned alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from gradcost.core.errors import BadInput
from gradcost.core.value import value
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import backprop, forward_gradient
from gradcost.papers.rike2022.last_batch import LastBatch
from gradcost.papers.rike2022.table import BATCH, TUNED, Row, rows
from gradcost.studies.phases import phases
from gradcost.studies.study import Plan, Study
from gradcost.studies.trial import Trial
from gradcost.tasks.architectures import Architecture, Mlp
from gradcost.tasks.mnist import Mnist
from gradcost.tasks.task import Task
from gradcost.training.optimizers import SGD, Adam, Nesterov, Optimizer

MODELS: dict[str, Architecture] = {"nn": Mlp((1024, 1024))}

_GRADIENTS: dict[str, Estimator] = {"forward": Clipped(forward_gradient(), 1.0), "backprop": backprop()}
_OPTIMIZERS: dict[str, Callable[[Row], Optimizer]] = {
    "sgd": lambda row: SGD(row.lr, decay=row.decay),
    "nesterov": lambda row: Nesterov(row.lr, row.momentum, decay=row.decay),
    "adam": lambda row: Adam(row.lr, row.beta1, row.beta2, decay=row.decay),
}
_STEP = 10**0.5  # of a grid of rates


@value
class Tuning:
    """How every row is tuned: over `points` learning rates, half a decade apart about the published one, then over
    `more`, chosen by what came of those. The same number for all, as long as the final run and with its clip, on
    validation alone. epochs: of all these runs; None takes those of the published rows. Raises: ValueError when
    points < 1, more < 0 or epochs is not above 0."""

    points: int = 5
    more: int = 2
    epochs: float | None = None

    def __post_init__(self) -> None:
        if self.epochs is not None and not self.epochs > 0:
            raise BadInput(f"a tuned row is trained for more than 0 epochs, not {self.epochs!r}.")
        if self.points < 1 or self.more < 0:
            raise BadInput(f"tuning takes 1 point or more, and 0 or more after those, not {self}.")

    def rates(self, lr: float) -> tuple[float, ...]:
        """Two digits each, for no finer grid is searched."""
        return tuple(float(f"{lr * _STEP ** (k - self.points // 2):.2g}") for k in range(self.points))


@value
class Reproduction:
    """The rows of one model, at a length and with seeds of one's own choice.

    task: what they are trained on; MNIST, or a stand-in to try the command on. tuning: how the same rows are tuned
    for a second table, or None for the first alone. Raises: ValueError when there is no epoch or no seed.
    """

    model: str = "nn"
    epochs: float = 50.0
    seeds: int = 1
    tuning: Tuning | None = None
    task: Task = Mnist(model=MODELS["nn"], batch=BATCH)

    def __post_init__(self) -> None:
        if not self.epochs > 0 or self.seeds < 1:
            raise BadInput(f"a row is trained for more than 0 epochs on 1 seed or more, not {self}.")

    @property
    def steps(self) -> int:
        """Of every published run; needs the data."""
        return self._steps(self.epochs)

    def _steps(self, epochs: float) -> int:
        return max(1, round(epochs * self.task.steps_per_epoch))

    @property
    def study(self) -> Study:
        # Seeds and tuning add runs to a folder; what makes its runs others makes another question.
        return Study(
            f"Rike and Foerland 2022, Table 1: {self.model}, {self.epochs:g} epochs of {self.task}", self._plan
        )

    def _plan(self) -> Plan:
        steps, task = self.steps, LastBatch(self.task)
        seeds = range(1, self.seeds + 1)
        found = rows(self.model)
        yield [_trial(task, row, row.name, steps, "final", seed) for row in found for seed in seeds]
        if self.tuning is None:
            return
        length = steps if self.tuning.epochs is None else self._steps(self.tuning.epochs)
        by_name = {row.name + TUNED: row for row in found}

        def at(name: str, lr: float, phase: str, seed: int) -> Trial:
            return _trial(task, replace(by_name[name], lr=lr), name, length, phase, seed)

        rates: dict[str, Sequence[float]] = {name: self.tuning.rates(row.lr) for name, row in by_name.items()}
        yield from phases(rates, at, more=self.tuning.more, confirm=0, seeds=seeds)


def _trial(task: LastBatch, row: Row, name: str, steps: int, phase: str, seed: int) -> Trial:
    return Trial(task, name, _GRADIENTS[row.gradient], _OPTIMIZERS[row.optimizer](row), steps, phase, seed)
