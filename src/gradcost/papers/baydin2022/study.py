"""The study of Baydin et al. (2022): one learning rate for both gradients, then one for each from equal tuning."""

from __future__ import annotations

from collections.abc import Callable

from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.value import value
from gradcost.papers.baydin2022.speed import ESTIMATORS, LOSS, time_steps_in_turn
from gradcost.papers.baydin2022.table import (
    BATCH,
    DECAY,
    GRADIENTS,
    experiments,
    tuned_method,
)
from gradcost.results.tuning import log_grid
from gradcost.studies.phases import phases
from gradcost.studies.study import Stages, Study
from gradcost.studies.trial import Trial
from gradcost.studies.trial_log import evaluated_steps
from gradcost.tasks.architectures import Architecture, Cnn, Logistic, Mlp
from gradcost.tasks.mnist import Mnist
from gradcost.tasks.task import Task
from gradcost.training.optimizers import SGD

MODELS: dict[str, Architecture] = {"logistic": Logistic(), "nn": Mlp((1024, 1024)), "cnn": Cnn()}
RATES = (1e-4, 1.0)  # the ends of the grid of both gradients
POINTS = 9  # with 9 learning rates, neighbours are half a decade apart
MORE = 2  # further learning rates of each gradient, each chosen from the results so far
CONFIRM = 2
CONFIRMED = 3  # learning rates of each gradient that run again with CONFIRM seeds each, see `phases`


@value
class Reproduction:
    """The settings of the study of one model.

    Args:
        rows: a key of MODELS.
        steps: the number of steps of each run. None: that of the paper.
        seeds: the number of final runs of each method.
        is_tuned: whether to tune the learning rate of each gradient and run it again. The grid, the number of
            further rates and the steps are the same for both.
        points: the number of learning rates in the grid of the tuning.
        tuned_steps: the number of steps of each tuning run, and of each final run with a tuned learning rate. None:
            that of the other runs.
        task: another task to train on, to try the study. None: MNIST.
    Raises:
        BadInput: rows is no key of MODELS, or a number is below 1.
    """

    rows: str = "nn"
    steps: int | None = None
    seeds: int = 5
    is_tuned: bool = False
    points: int = POINTS
    tuned_steps: int | None = None
    task: Task | None = None

    def __post_init__(self) -> None:
        if self.rows not in MODELS:
            raise BadInput(f"there are no rows {self.rows!r}. Rows: {', '.join(MODELS)}.")
        if min(self.seeds, self.points, self.length, self.tuned_length) < 1:
            raise BadInput(f"a Reproduction has seeds, points and steps >= 1, not {self}.")

    @property
    def training_task(self) -> Task:
        """The task that all runs train on."""
        return Mnist(model=MODELS[self.rows], batch=BATCH) if self.task is None else self.task

    @property
    def length(self) -> int:
        """The steps of each run with the shared rate. All experiments of one model have equally many in the paper."""
        return experiments(self.rows)[0].steps if self.steps is None else self.steps

    @property
    def tuned_length(self) -> int:
        """The steps of each tuning run, and of each final run with a tuned rate."""
        return self.length if self.tuned_steps is None else self.tuned_steps

    @property
    def rates(self) -> tuple[float, ...]:
        """The grid of the tuning."""
        return log_grid(*RATES, self.points)

    @property
    def study(self) -> Study:
        # A results folder accepts one question only. Seeds and tuning are not in it, so a folder can get both later.
        question = f"Baydin et al. 2022: {self.rows}, {self.length} steps of {self.training_task}"
        question += f", tuned: {self.tuned_length} steps" if self.tuned_length != self.length else ""
        return Study(question, self._stages, __file__)

    def shared_trials(self) -> list[Trial]:
        """Return the runs with the shared learning rates."""
        return [
            self._trial(gradient, experiment.method(gradient), experiment.lr, self.length, "final", seed)
            for experiment in experiments(self.rows)
            for gradient in GRADIENTS
            for seed in range(1, self.seeds + 1)
        ]

    def run_counts(self) -> list[tuple[int, int, str]]:
        """Return (runs, steps, phase) of the runs of each gradient: shared rate, then tuning and tuned rate."""
        counts = [(len(experiments(self.rows)) * self.seeds, self.length, "final")]
        if self.is_tuned:
            counts.append((self.points + MORE + CONFIRMED * CONFIRM, self.tuned_length, "tune"))
            counts.append((self.seeds, self.tuned_length, "final"))
        return counts

    def hours(self, rounds: int = 5) -> float:
        """Return the estimated core-hours of all runs, with their evaluations, from a few steps timed in turn now.

        Args:
            rounds: the number of timed steps of each gradient.
        """
        task = self.training_task
        times, splits = time_steps_in_turn(task, seed=0, rounds=rounds), task.splits()
        examples = len(task.batch_at(Key(0), 0).y)
        step = sum(times[gradient].median for gradient in GRADIENTS)
        validation, test = (
            len(GRADIENTS) * times[LOSS].median * len(each.y) / examples for each in (splits.validation, splits.test)
        )
        milliseconds = 0.0
        for runs, steps, phase in self.run_counts():
            scores = len(evaluated_steps(steps, phase)) * validation + (test if phase == "final" else 0.0)
            milliseconds += runs * (steps * step + scores)
        return milliseconds / 3.6e6

    def _stages(self) -> Stages:
        yield self.shared_trials()
        if self.is_tuned:
            rates = {tuned_method(gradient, self.rows): self.rates for gradient in GRADIENTS}
            seeds = range(1, self.seeds + 1)
            yield from phases(rates, self._tuned_trial(), more=MORE, confirm=CONFIRM, seeds=seeds)

    def _tuned_trial(self) -> Callable[[str, float, str, int], Trial]:
        gradient_of = {tuned_method(gradient, self.rows): gradient for gradient in GRADIENTS}
        return lambda name, lr, phase, seed: self._trial(gradient_of[name], name, lr, self.tuned_length, phase, seed)

    def _trial(self, gradient: str, name: str, lr: float, steps: int, phase: str, seed: int) -> Trial:
        optimizer = SGD(lr, decay=DECAY)
        return Trial(self.training_task, name, ESTIMATORS[gradient], optimizer, steps, phase, seed)


def task_of(rows: str, data: type[Task]) -> Task:
    """Return a task of another class with the model of some rows, and the paper's batch size."""
    return data(model=MODELS[rows], batch=BATCH)  # type: ignore[call-arg]
