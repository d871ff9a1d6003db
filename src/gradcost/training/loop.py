"""The training loop: a generator that takes one step per iteration, with any estimator, for a loader or a task."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, overload

from torch import Tensor

from gradcost.core.batches import Batches
from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.key import Key
from gradcost.core.notes import warn_once
from gradcost.core.objective import Objective
from gradcost.estimators.estimator import Estimator
from gradcost.training import checkpoint
from gradcost.training.optimizers import Optimizer
from gradcost.training.train_state import TrainState


class Trainable(Protocol):
    """What `train` needs: a model with a loss, and a batch for each step. Every `Task` has both methods."""

    @abstractmethod
    def objective(self, key: Key) -> Objective:
        """Return the model to train, initialised from the key, with its loss.

        Args:
            key: the source of the initial weights. Equal keys give equal weights.
        Returns:
            A new Objective, whose parameters `train` changes in place.
        """

    @abstractmethod
    def batch_at(self, key: Key, step: int) -> Any:
        """Return the batch of one step.

        Args:
            key: the source of the order of the data. Equal keys give equal batches.
            step: the number of the step, from 0. Steps may be requested in any order.
        Returns:
            Any pytree that the loss accepts.
        """


@dataclass(frozen=True, eq=False)
class StepResult:
    """The result of one training step.

    Args:
        number: the number of the step, from 0.
        objective: the model in training and its loss. Its weights are those after this step.
        loss: the loss at the weights before the step, a scalar tensor on the model's device. If it is not finite, the
            step has moved no weight.
        slopes: the slope along each direction, float64, shape (probes,); None for backprop, and if `loss` is not
            finite.
        clipped: the fraction of slopes that `Clipped` cut, in [0, 1]; None if the estimator is not `Clipped`.
        train_state: the state after the step, which `training.checkpoint.write` can save.
        batch: the batch of this step.
        key: the key of this step's randomness.
    """

    number: int
    objective: Objective
    loss: Tensor
    slopes: Tensor | None
    clipped: float | None
    train_state: TrainState = field(repr=False)
    batch: Any = field(repr=False)
    key: Key


@overload
def train(
    objective: Objective,
    loader: Iterable[Any],
    estimator: Estimator,
    optimizer: Optimizer,
    key: Key = ...,
    steps: int | None = None,
    resume: Path | None = None,
) -> Iterator[StepResult]: ...


@overload
def train(
    task: Trainable,
    estimator: Estimator,
    optimizer: Optimizer,
    key: Key = ...,
    steps: int | None = None,
    resume: Path | None = None,
) -> Iterator[StepResult]: ...


def train(*arguments: Any, **options: Any) -> Iterator[StepResult]:
    """Train a model; yield after each step.

    Two forms: `train(objective, loader, estimator, optimizer)` for a loop of one's own, and
    `train(task, estimator, optimizer)`, where the task makes the model and the batches from the key.

    - `key.fold("data")` sets the order of the data, `key.fold("step", t)` the randomness of step t. With a task,
      `key.fold("init")` sets the initial weights. Two estimators trained with one key get equal batches and step
      keys.
    - Each parameter moves and its gradient is freed before the next parameter's gradient is computed. The whole
      gradient never exists.
    - Estimators change no buffer. If a forward pass of the model changes buffers or attributes (BatchNorm's running
      statistics, spectral normalisation, moving averages), one extra forward pass per step computes them, as a
      training step in torch would.
    - A step whose loss or slope is not finite moves no weight, buffer or optimizer state. It is yielded with that
      loss, and a `Note` is issued once. Training continues; stop the loop to end it.

    Args:
        arguments: the values below, in the order of one of the two forms, then `key`, `steps` and `resume`.
        options: the same by name.
        objective: the model, which is trained in place, and its loss.
        loader: a DataLoader, a list of batches, or another iterable of batches. The key determines the order of a
            DataLoader with `shuffle=True`; torch's own generator is neither read nor changed. Batches are passed to
            the loss as they are, so they must be on the model's device.
        task: the model, loss and batches, such as `tasks.Digits()`. Any object with the methods of `Trainable`.
        estimator: how each gradient is obtained, such as `mezo()`.
        optimizer: how parameters move, such as `SGD(0.1)`.
        key: the only source of randomness.
        steps: total number of steps, including those taken before `resume` was written. None: one pass over the
            loader; with a task, no end.
        resume: path of a file that `training.checkpoint.write` writes. If the file exists, training continues from
            it, with the same bits as an uninterrupted run. If not, or if None, training starts at step 0.
    Yields:
        StepResult of the step just taken: number, loss, slopes and state.
    Raises:
        Unsupported: the estimator cannot be used with this model, loss and batch. No weight has changed.
        BadInput: an argument has the wrong type, the loader yields no batch or can be read only once, or the file
            `resume` is not a training checkpoint of this model.
        Exception: the loss raised it. The weights are those after the last complete step. With backprop, parameters
            that the interrupted backward pass had already reached have moved.
    """
    is_loop = "objective" in options or (bool(arguments) and isinstance(arguments[0], Objective))
    if is_loop and isinstance((*arguments, None, None)[1], Estimator):
        raise BadInput("the loader is missing: write train(objective, loader, estimator, optimizer).")
    return (_train_objective if is_loop else _train_task)(*arguments, **options)


def _train_objective(
    objective: Objective,
    loader: Iterable[Any],
    estimator: Estimator,
    optimizer: Optimizer,
    key: Key = Key(0),  # noqa: B008 (a key is an immutable value)
    steps: int | None = None,
    resume: Path | None = None,
) -> Iterator[StepResult]:
    _require_types(estimator, optimizer, key)
    batches = Batches(loader)
    if steps is None:
        if not hasattr(loader, "__len__"):
            raise BadInput(f"a {type(loader).__name__} has no length, so one pass has no known end: give steps.")
        steps = len(loader)  # type: ignore[arg-type]
    data = key.fold("data")
    return _steps(
        objective, lambda step: batches.at(data, step), estimator, optimizer, key, steps=steps, resume=resume
    )


def _train_task(
    task: Trainable,
    estimator: Estimator,
    optimizer: Optimizer,
    key: Key = Key(0),  # noqa: B008 (a key is an immutable value)
    steps: int | None = None,
    resume: Path | None = None,
) -> Iterator[StepResult]:
    for method in ("objective", "batch_at"):
        if not hasattr(task, method):
            raise BadInput(
                f"{type(task).__name__} is neither an Objective nor a task: write train(objective, loader, "
                "estimator, optimizer) with objective = Objective(model, loss)."
            )
    _require_types(estimator, optimizer, key)
    objective, data = task.objective(key.fold("init")), key.fold("data")
    return _steps(
        objective, lambda step: task.batch_at(data, step), estimator, optimizer, key, steps=steps, resume=resume
    )


def _require_types(estimator: Any, optimizer: Any, key: Any) -> None:
    if not isinstance(estimator, Estimator):
        raise BadInput(f"the estimator is {estimator!r}: give one such as gradcost.mezo().")
    if not isinstance(optimizer, Optimizer):
        hint = "gradcost.SGD(0.1) or gradcost.AdamW(1e-3), which are torch's optimizers applied leaf by leaf"
        raise BadInput(f"the optimizer is a {type(optimizer).__name__}: give {hint}.")
    if not isinstance(key, Key):
        raise BadInput(f"the key is {key!r}: write gradcost.Key({key if isinstance(key, int) else 0}).")


def _steps(
    objective: Objective,
    batch_of: Callable[[int], Any],
    estimator: Estimator,
    optimizer: Optimizer,
    key: Key,
    *,
    steps: int | None,
    resume: Path | None,
) -> Iterator[StepResult]:
    first = batch_of(0)
    objection = estimator.objection(objective, first)
    if objection is not None:
        raise Unsupported(objection)
    train_state = TrainState(objective, estimator, optimizer)
    if resume is not None and resume.exists():
        objective.prepare(first, key)  # finds modules outside of the model: the file may contain their buffers
        checkpoint.read(resume, train_state)
    for number in itertools.count(train_state.taken) if steps is None else range(train_state.taken, steps):
        batch = batch_of(number)
        step_key = key.fold("step", number)
        result = train_state.step(batch, step_key)
        yield StepResult(number, objective, result.loss, result.slopes, result.clipped, train_state, batch, step_key)
    not_finite = train_state.not_finite()
    if not_finite is not None:
        warn_once(
            objective.model,
            "not finite at the end",
            f"`{not_finite}` is not finite: a step had a gradient that is not finite.",
        )
