"""The protocol of a comparison, as an immutable value."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

import torch

from gradcost.core.arguments import require_several
from gradcost.core.errors import BadInput
from gradcost.core.units import size
from gradcost.core.value import digest, value
from gradcost.estimators.estimator import Estimator, require_estimator
from gradcost.estimators.presets import backprop, checkpointed, forward_gradient, mezo, spsa
from gradcost.planning.candidates import label
from gradcost.results.comparability import CUSTOMARY
from gradcost.results.tuning import log_grid
from gradcost.studies.costs import Methods, exact_within
from gradcost.studies.environment import fingerprint, plug_in_code
from gradcost.studies.phases import phases
from gradcost.studies.study import Study
from gradcost.studies.task_check import check_contract
from gradcost.studies.task_info import check_task, guessing_fields, metric_fields, task_metric, weights
from gradcost.studies.timed import COARSE, Pace, timed_phases
from gradcost.studies.trial import Trial, check_label, check_target
from gradcost.studies.user_code import user_file
from gradcost.tasks import TASKS, LoaderTask, Task, placed
from gradcost.training.customary import Customary, optimizer_of
from gradcost.training.optimizers import SGD, Optimizer, require_optimizer, with_rate

TARGET = 0.9  # the validation accuracy whose first step is recorded, unless the caller gives another
MOST_RUNS = 10_000  # of one kind and method; their list must fit in memory

GivenMethods = Mapping[str, Estimator] | Iterable[Estimator | tuple[str, Estimator]]


@value
class Comparison:
    """The complete protocol of a comparison. Its hash (`name`) identifies a results folder.

    Args:
        task: the task to train on.
        methods: (label, estimator) pairs.
        rates: the learning rates of the tuning grid. Tuning uses a seed that no other run uses.
        steps: the number of training steps of each trial.
        seeds: the seeds of the final runs. Only final runs are scored on the test split.
        target: a validation accuracy, or a value of the task's metric. Each trial records the first evaluated step
            that reaches it. None: no target.
        memory: budget in bytes for the peak memory of a step, beyond the weights. None: no budget.
        more: how many further learning rates each method tries after the grid: beyond the grid if its best rate is
            at an edge, otherwise next to the best rate.
        confirm: the number of new seeds on which the best three learning rates run again. The best mean over these
            seeds wins. 0 skips this.
        optimizer: the optimizer of every method, or `Customary()`. The rates of the grid replace its learning rate.
        own_rates: (label, grid) of each method whose grid is not `rates`, and has as many learning rates.
        user_file: the user's file that defines the task, a method or the optimizer. None: gradcost defines all.
    Raises:
        BadInput: a label occurs twice, or there is no method, step, seed or learning rate.
    """

    task: Any
    methods: tuple[tuple[str, Estimator], ...]
    rates: tuple[float, ...]
    steps: int
    seeds: tuple[int, ...]
    target: float | None
    memory: int | None = None
    more: int = 0
    confirm: int = 0
    user_file: str | None = None
    optimizer: Optimizer | Customary = SGD(1.0)
    own_rates: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def __post_init__(self) -> None:
        labels = [label for label, _ in self.methods]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise BadInput(f"{', '.join(twice)} is given twice: name each method once.")
        for name in labels:
            check_label(name)
        check_target(self.target)
        if not labels:
            raise BadInput("there is no method to compare: name one or more.")
        if self.steps < 1 or not self.seeds or not self.rates:
            raise BadInput("a comparison needs at least 1 step, 1 seed and 1 learning rate.")

    @property
    def with_optimizers(self) -> Methods:
        """Each method with an optimizer for forecasts and timings: its learning rate hardly changes the weights."""
        return {label: (each, with_rate(optimizer_of(self.optimizer, each), 1e-9)) for label, each in self.methods}

    @property
    def code(self) -> str:
        return fingerprint(self.user_file)

    @property
    def name(self) -> str:
        """A hash of the comparison and its code. Results folders with equal hashes have equal accuracies."""
        estimators = (estimator for _, estimator in self.methods)
        return digest((self, self.code, *plug_in_code(self.task, *estimators, self.optimizer)))

    @property
    def trials(self) -> int:
        """The largest number of trials of each method."""
        points = len(self.rates) + self.more
        return points + min(3, points) * self.confirm + len(self.seeds)

    def study(self, labels: Collection[str], pace: Pace | None = None) -> Study:
        """Return the study that tunes, confirms and finally runs the methods in `labels`; with `pace` in time."""
        names = [label for label, _ in self.methods if label in labels]
        rates = {name: dict(self.own_rates).get(name, self.rates) for name in names}
        protocol: Any = {"more": self.more, "confirm": self.confirm, "seeds": self.seeds}
        return Study(
            f"Which of {', '.join(names)} is best for {self.task}?",
            lambda: (
                phases(rates, self._trial, **protocol)
                if pace is None
                else timed_phases(rates, self._trial, **protocol, pace=pace)
            ),
        )

    def document(self, task: str, model: str) -> dict[str, Any]:
        """Return the content of `study.json`, with these names of the task and the model."""
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
            "optimizer": type(self.optimizer).__name__.replace("Customary", CUSTOMARY),
            **guessing_fields(self.task),
            **metric_fields(self.task),
        }

    def _trial(self, label: str, lr: float, phase: str, seed: int) -> Trial:
        estimator = dict(self.methods)[label]
        optimizer = with_rate(optimizer_of(self.optimizer, estimator), lr)
        return Trial(self.task, label, estimator, optimizer, self.steps, phase, seed, self.target)


def grid(low: float, high: float, points: int) -> tuple[float, ...]:
    """Return the learning rates of a tuning grid; one rate if `low` is `high`."""
    return log_grid(low, high, 1 if low == high else points)


def coarse_grid(low: float, high: float, points: int) -> tuple[float, ...]:
    """Return the middles of `points` equal parts of the range, in the logarithm: next_rate refines them."""
    return log_grid(low, high, 1) if low == high else log_grid(low, high, 2 * points + 1)[1::2]


def make_comparison(
    task: Task | LoaderTask | str,
    methods: GivenMethods | None,
    *,
    steps: int | None,
    seeds: int,
    tuning_points: int,
    extra_points: int,
    confirm_seeds: int,
    lr_range: tuple[float, float] | None,
    target: float | None,
    memory_beyond_weights: int | None,
    optimizer: Optimizer | Customary | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    is_coarse: bool = False,
    file: str | None = None,
) -> Comparison:
    """Return the comparison that `compare` runs with these arguments.

    Args:
        lr_range: the range of the learning rates. None: `Optimizer.usual_rates` of each method's optimizer.
        optimizer: the optimizer of every method, or `Customary()`. None: SGD.
        is_coarse: whether the grid has a few learning rates only, and the others are tried after it (`timed_phases`).
        file: the user's file that defines the task. None: the file that defines its class.
    """
    runs = {
        "seeds": seeds,
        "tuning_points": tuning_points,
        "extra_points": extra_points,
        "confirm_seeds": confirm_seeds,
    }
    for name, number in runs.items():
        if number > MOST_RUNS:
            raise BadInput(f"{name} is at most {MOST_RUNS:,}, not {number:,}: each adds a run to every method.")
    if isinstance(task, str):
        if task not in TASKS:
            raise BadInput(f"there is no task {task!r}: give a Task, or one of {', '.join(TASKS)}.")
        task = TASKS[task]()  # pyright: ignore[reportAbstractUsage]
    check_task(task)
    optimizer = SGD(1.0) if optimizer is None else optimizer
    if not isinstance(optimizer, Customary):
        require_optimizer(optimizer)
        optimizer = with_rate(optimizer, 1.0)
    task = placed(task, device, dtype, autocast)
    check_contract(task)
    if target is None:
        target = TARGET if task_metric(task).is_accuracy else None
    elif task_metric(task).is_accuracy and not 0 <= target <= 1:
        advice = f": write {target / 100:g} for {target:g}%" if 1 < target <= 100 else ""
        raise BadInput(f"the target is an accuracy from 0 to 1, not {target:g}{advice}.")
    pairs = _default_methods(task, memory_beyond_weights, optimizer) if methods is None else _pairs(methods)
    points = tuning_points + extra_points
    ranges = {name: lr_range or optimizer_of(optimizer, each).usual_rates for name, each in pairs}
    grids = {
        name: coarse_grid(*ends, min(points, COARSE)) if is_coarse else grid(*ends, tuning_points)
        for name, ends in ranges.items()
    }
    rates = next(iter(grids.values()), ())
    return Comparison(
        task,
        tuple(pairs),
        rates,
        getattr(task, "steps", 1000) if steps is None else steps,
        tuple(range(1, seeds + 1)),
        target,
        memory_beyond_weights,
        points - len(rates) if is_coarse else extra_points,
        confirm_seeds,
        file or user_file(task, *(estimator for _, estimator in pairs), optimizer),
        optimizer,
        tuple((name, own) for name, own in grids.items() if own != rates),
    )


def _default_methods(task: Any, memory: int | None, optimizer: Optimizer | Customary) -> list[tuple[str, Estimator]]:
    pairs = _pairs((backprop(), checkpointed(), forward_gradient(), spsa(), mezo()))
    exact = (
        None if memory is None else exact_within(task, memory, with_rate(optimizer_of(optimizer, backprop()), 1e-9))
    )
    if exact is not None:  # None: no budget, or plain backprop fits it
        pairs.insert(1, (f"backprop in {size(memory)}", exact))
    return pairs


def _pairs(methods: GivenMethods) -> list[tuple[str, Estimator]]:
    if isinstance(methods, Mapping):
        pairs = list(cast("Mapping[str, Estimator]", methods).items())
    else:
        pairs = [item if isinstance(item, tuple) else ("", item) for item in require_several(methods, "methods")]
    for _, estimator in pairs:
        require_estimator(estimator)
    return [(name or label(estimator), estimator) for name, estimator in pairs]
