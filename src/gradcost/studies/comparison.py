"""The protocol of a comparison, as a value."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

from gradcost.core.errors import BadInput
from gradcost.core.units import size
from gradcost.core.value import digest, value
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import backprop, checkpointed, forward_gradient, mezo, spsa
from gradcost.planning.candidates import label
from gradcost.results.tuning import log_grid
from gradcost.studies.costs import Methods, exact_within
from gradcost.studies.environment import fingerprint
from gradcost.studies.phases import phases
from gradcost.studies.study import Study
from gradcost.studies.task_info import chance, check_task, weights
from gradcost.studies.trial import Trial
from gradcost.studies.user_code import user_file
from gradcost.tasks import TASKS, Task
from gradcost.training.optimizers import SGD

GivenMethods = Mapping[str, Estimator] | Iterable[Estimator | tuple[str, Estimator]]


@value
class Comparison:
    """What is compared, and how: the whole protocol. Its text identifies a results folder.

    Args:
        task: what is trained.
        methods: (label, estimator) pairs.
        rates: the learning rates of the grid that every method is tuned over, on a seed that no other run uses.
        steps: the training steps of each trial.
        seeds: those of the final runs, which alone are scored on the test split.
        target: the validation accuracy whose first step is recorded.
        memory: the budget of a step beyond the weights, in bytes; None for no budget.
        more: how many learning rates each method gets after the grid: past its edge or beside the winner.
        confirm: on how many new seeds the best three learning rates run again; their mean decides. 0: none.
        user_file: the user's file that defines the task or a method; None where gradcost does.
    Raises:
        BadInput: a method occurs twice, or there is no method, step, seed or learning rate.
    """

    task: Any
    methods: tuple[tuple[str, Estimator], ...]
    rates: tuple[float, ...]
    steps: int
    seeds: tuple[int, ...]
    target: float
    memory: int | None = None
    more: int = 0
    confirm: int = 0
    user_file: str | None = None

    def __post_init__(self) -> None:
        labels = [label for label, _ in self.methods]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise BadInput(f"{', '.join(twice)} is given twice: name each method once.")
        if not labels:
            raise BadInput("there is no method to compare: name one or more.")
        if self.steps < 1 or not self.seeds or not self.rates:
            raise BadInput("a comparison needs at least 1 step, 1 seed and 1 learning rate.")

    @property
    def with_optimizers(self) -> Methods:
        """Each method with an optimizer whose learning rate changes the weights little: for costs."""
        return {label: (estimator, SGD(1e-9)) for label, estimator in self.methods}

    @property
    def code(self) -> str:
        return fingerprint(self.user_file)

    @property
    def name(self) -> str:
        """A hash of what is compared and by which code: folders of one name hold the same numbers."""
        return digest((self, self.code))

    @property
    def trials(self) -> int:
        """The most trials that each method may have."""
        points = len(self.rates) + self.more
        return points + min(3, points) * self.confirm + len(self.seeds)

    def study(self, labels: Collection[str]) -> Study:
        """Return the study of some of the methods: tuned, confirmed and run finally."""
        names = [label for label, _ in self.methods if label in labels]
        rates = dict.fromkeys(names, self.rates)
        return Study(
            f"Which of {', '.join(names)} is best for {self.task}?",
            lambda: phases(rates, self._trial, more=self.more, confirm=self.confirm, seeds=self.seeds),
        )

    def document(self, task: str, model: str) -> dict[str, Any]:
        """Return what `study.json` holds, for these names of the task and the model."""
        return {
            "schema": 1,
            "comparison": self.name,
            "task": repr(self.task),
            "task_name": task,
            "model_name": model,
            **weights(self.task),
            "methods": [label for label, _ in self.methods],
            "seeds": list(self.seeds),
            "points": len(self.rates) + self.more,
            "confirm": self.confirm,
            "steps": self.steps,
            "batch": getattr(self.task, "batch", None),
            "target": self.target,
            "memory": self.memory,
            "optimizer": "SGD",
            "chance": chance(self.task),
        }

    def _trial(self, label: str, lr: float, phase: str, seed: int) -> Trial:
        return Trial(self.task, label, dict(self.methods)[label], SGD(lr), self.steps, phase, seed, self.target)


def make_comparison(
    task: Task | str,
    methods: GivenMethods | None = None,
    *,
    steps: int | None = None,
    seeds: int = 3,
    tuning_points: int = 9,
    extra_points: int = 2,
    confirm_seeds: int = 2,
    lr_range: tuple[float, float] = (1e-4, 10.0),
    target: float = 0.9,
    memory_beyond_weights: int | None = None,
    file: str | None = None,
) -> Comparison:
    """Return the comparison that `compare` runs with these arguments.

    Args:
        file: the user's file that defines the task; None: the file of its class.
    """
    if isinstance(task, str):
        if task not in TASKS:
            raise BadInput(f"there is no task {task!r}: give a Task, or one of {', '.join(TASKS)}.")
        task = TASKS[task]()  # pyright: ignore[reportAbstractUsage]
    check_task(task)
    pairs = _default_methods(task, memory_beyond_weights) if methods is None else _pairs(methods)
    low, high = lr_range
    return Comparison(
        task,
        tuple(pairs),
        log_grid(low, high, 1 if low == high else tuning_points),
        getattr(task, "steps", 1000) if steps is None else steps,
        tuple(range(1, seeds + 1)),
        target,
        memory_beyond_weights,
        extra_points,
        confirm_seeds,
        file or user_file(task, *(estimator for _, estimator in pairs)),
    )


def _default_methods(task: Any, memory: int | None) -> list[tuple[str, Estimator]]:
    pairs = _pairs((backprop(), checkpointed(), forward_gradient(), spsa(), mezo()))
    exact = None if memory is None else exact_within(task, memory)
    if exact is not None:
        pairs.insert(1, (f"backprop in {size(memory)}", exact))
    return pairs


def _pairs(methods: GivenMethods) -> list[tuple[str, Estimator]]:
    if isinstance(methods, Mapping):
        return list(cast("Mapping[str, Estimator]", methods).items())
    return [item if isinstance(item, tuple) else (label(item), item) for item in methods]
