"""The study of Baydin et al. (2022): one learning rate for both gradients, then one for each from equal tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gradcost.core.errors import BadInput
from gradcost.core.value import value
from gradcost.papers.baydin2022.speed import ESTIMATORS, time_steps_in_turn
from gradcost.papers.baydin2022.table import (
    BATCH,
    DECAY,
    GRADIENTS,
    experiments,
    tuned_method,
)
from gradcost.studies.phases import phases
from gradcost.studies.study import Stages, Study
from gradcost.studies.trial import Trial
from gradcost.tasks.architectures import Architecture, Cnn, Logistic, Mlp
from gradcost.tasks.mnist import Mnist
from gradcost.tasks.task import Task
from gradcost.training.optimizers import SGD

MODELS: dict[str, Architecture] = {"logistic": Logistic(), "nn": Mlp((1024, 1024)), "cnn": Cnn()}
RATES = tuple(float(f"{10 ** (k / 2):.2g}") for k in range(-8, 1))  # 1e-4 to 1, half a decade apart
MORE = 2  # further learning rates of each gradient, each chosen from the results so far
CONFIRM = 2


@value
class Reproduction:
    """The settings of the study of one model.

    Args:
        rows: a key of MODELS.
        steps: the number of steps of each run. None: that of the paper.
        seeds: the number of final runs of each method.
        is_tuned: whether to tune the learning rate of each gradient and run it again. The grid, the number of
            further rates and the steps are the same for both.
        task: another task to train on, to try the study. None: MNIST.
    Raises:
        BadInput: rows is no key of MODELS, or steps or seeds is below 1.
    """

    rows: str = "nn"
    steps: int | None = None
    seeds: int = 5
    is_tuned: bool = False
    task: Task | None = None

    def __post_init__(self) -> None:
        if self.rows not in MODELS:
            raise BadInput(f"there are no rows {self.rows!r}. Rows: {', '.join(MODELS)}.")
        if self.seeds < 1 or (self.steps is not None and self.steps < 1):
            raise BadInput(f"a Reproduction has seeds and steps >= 1, not {self}.")

    @property
    def training_task(self) -> Task:
        """The task that all runs train on."""
        return Mnist(model=MODELS[self.rows], batch=BATCH) if self.task is None else self.task

    @property
    def length(self) -> int:
        """The number of steps of each run. All experiments of one model have equally many in the paper."""
        return experiments(self.rows)[0].steps if self.steps is None else self.steps

    @property
    def study(self) -> Study:
        # A results folder accepts one question only. Seeds and tuning are not in it, so a folder can get both later.
        question = f"Baydin et al. 2022: {self.rows}, {self.length} steps of {self.training_task}"
        return Study(question, self._stages, __file__)

    def shared_trials(self) -> list[Trial]:
        """Return the runs with the shared learning rates."""
        return [
            self._trial(gradient, experiment.method(gradient), experiment.lr, "final", seed)
            for experiment in experiments(self.rows)
            for gradient in GRADIENTS
            for seed in range(1, self.seeds + 1)
        ]

    def run_count(self) -> int:
        """Return the number of runs of each gradient, tuning included."""
        shared = len(experiments(self.rows)) * self.seeds
        return shared + (len(RATES) + MORE + 3 * CONFIRM + self.seeds if self.is_tuned else 0)

    def hours(self, rounds: int = 5) -> float:
        """Return the estimated core-hours of the training steps of all runs, from a few steps timed in turn now.

        The evaluations of the runs are not included.
        """
        times = time_steps_in_turn(self.training_task, seed=0, rounds=rounds)
        milliseconds = sum(times[gradient].median for gradient in GRADIENTS)
        return milliseconds * self.length * self.run_count() / 3.6e6

    def _stages(self) -> Stages:
        yield self.shared_trials()
        if self.is_tuned:
            rates = {tuned_method(gradient, self.rows): RATES for gradient in GRADIENTS}
            seeds = range(1, self.seeds + 1)
            yield from phases(rates, self._tuned_trial(), more=MORE, confirm=CONFIRM, seeds=seeds)

    def _tuned_trial(self) -> Callable[[str, float, str, int], Trial]:
        gradient_of = {tuned_method(gradient, self.rows): gradient for gradient in GRADIENTS}
        return lambda name, lr, phase, seed: self._trial(gradient_of[name], name, lr, phase, seed)

    def _trial(self, gradient: str, name: str, lr: float, phase: str, seed: int) -> Trial:
        optimizer = SGD(lr, decay=DECAY)
        return Trial(self.training_task, name, ESTIMATORS[gradient], optimizer, self.length, phase, seed)


def try_on(reproduction: Reproduction, task_type: type[Task]) -> Reproduction:
    """Return the same study on another data set, with the same model and batch size."""
    model = MODELS[reproduction.rows]
    return replace(reproduction, task=task_type(model=model, batch=BATCH))  # type: ignore[call-arg]
