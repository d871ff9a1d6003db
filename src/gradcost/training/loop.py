"""The training loop: a generator that takes one step per iteration, with any estimator, for a loader or a task."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, overload

from torch import Tensor

from gradcost.core.arguments import require_key
from gradcost.core.batching.batches import Batches, length_of
from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.key import Key
from gradcost.core.notes import warn_once
from gradcost.core.objective import Objective
from gradcost.estimators.estimator import Estimator, require_estimator
from gradcost.training import checkpoint
from gradcost.training.optimizers import Optimizer, require_optimizer
from gradcost.training.replay import catch_up
from gradcost.training.step_log import LogWriter, StepLog
from gradcost.training.train_state import TrainState, not_finite


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
    resume: str | Path | None = None,
    *,
    log: StepLog | None = None,
) -> Iterator[StepResult]: ...


@overload
def train(
    task: Trainable,
    estimator: Estimator,
    optimizer: Optimizer,
    key: Key = ...,
    steps: int | None = None,
    resume: str | Path | None = None,
    *,
    log: StepLog | None = None,
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
    - With an exact gradient, a parameter that the loss of the batch does not use stays, with its optimizer state, as
      in torch.optim: no weight decay, no momentum. A random direction moves every parameter.
    - A step whose loss or slope is not finite moves no weight, buffer or optimizer state. It is yielded with that
      loss, and a `Note` is issued once. Training continues; stop the loop to end it.

    Args:
        arguments: the values below, in the order of one of the two forms, then `key`, `steps` and
            `resume`; `log` is given by name.
        options: the same by name.
        objective: the model, which is trained in place, and its loss.
        loader: a DataLoader, a list of batches, or another iterable of batches. The key determines the order of a
            DataLoader with `shuffle=True`, also with a `generator` of its own, and the draws of its data set. It does
            not determine other state, such as a counter in a sampler or draws in persistent workers after the first
            epoch. No generator is read or changed. Batches are passed to the loss as they are, so they must be on the
            model's device.
        task: the model, loss and batches, such as `tasks.Digits()`. Any object with the methods of `Trainable`.
        estimator: how each gradient is obtained, such as `mezo()`.
        optimizer: how parameters move, such as `SGD(0.1)`.
        key: the only source of randomness.
        steps: total number of steps, including those taken before `resume` was written. None: one pass over the
            loader, whose length must be known; with a task, no end.
        resume: path of a file that `training.checkpoint.write` writes. If the file exists, training continues from
            it, with the same bits as an uninterrupted run. If not, or if None, training starts at step 0.
        log: write each step to this file, before the weights move. The estimator must be `replayable`. If the file
            exists, its steps are taken first, without evaluating a loss, and training continues after the last one.
    Yields:
        StepResult of the step just taken: number, loss, slopes and state.
    Raises:
        Unsupported: the estimator cannot be used with this model, loss and batch, or its gradients cannot be logged.
            No weight has changed.
        BadInput: an argument has the wrong type, the loader yields no batch or can be read only once, the file
            `resume` is damaged or is the training checkpoint of another model, estimator, optimizer, key or task, or
            `log` is not a log of this run.
        Exception: the loss raised it. The weights are those after the last complete step. With backprop, parameters
            that the interrupted backward pass had already reached have moved.
    """
    is_loop = "objective" in options or (bool(arguments) and isinstance(arguments[0], Objective))
    if is_loop and isinstance((*arguments, None, None)[1], Estimator):
        raise BadInput("the loader is missing: write train(objective, loader, estimator, optimizer).")
    form = _train_objective if is_loop else _train_task
    try:
        signature(form).bind(*arguments, **options)
    except TypeError as error:
        names = "objective, loader" if is_loop else "task"
        raise BadInput(f"{error}: write train({names}, estimator, optimizer).") from None
    return form(*arguments, **options)


def _train_objective(
    objective: Objective,
    loader: Iterable[Any],
    estimator: Estimator,
    optimizer: Optimizer,
    key: Key = Key(0),  # noqa: B008 (a key is an immutable value)
    steps: int | None = None,
    resume: str | Path | None = None,
    *,
    log: StepLog | None = None,
) -> Iterator[StepResult]:
    _require_types(estimator, optimizer, key, steps)
    batches = Batches(loader)
    if steps is None:
        steps = length_of(loader)
        if steps is None:
            raise BadInput(
                f"a {type(loader).__name__} has no known length, so one pass has no known end: give steps."
            )
    data = key.fold("data")
    start = _Start(objective, estimator, optimizer, key, resume, log, f"a loop over a {type(loader).__name__}")
    return _steps(start, lambda step: batches.at(data, step), steps)


def _train_task(
    task: Trainable,
    estimator: Estimator,
    optimizer: Optimizer,
    key: Key = Key(0),  # noqa: B008 (a key is an immutable value)
    steps: int | None = None,
    resume: str | Path | None = None,
    *,
    log: StepLog | None = None,
) -> Iterator[StepResult]:
    for method in ("objective", "batch_at"):
        if not hasattr(task, method):
            raise BadInput(
                f"{type(task).__name__} is neither an Objective nor a task: write train(objective, loader, "
                "estimator, optimizer) with objective = Objective(model, loss)."
            )
    _require_types(estimator, optimizer, key, steps)
    objective, data = task.objective(key.fold("init")), key.fold("data")
    # the repr of an object that is no dataclass may differ between processes
    parts = {"task": task} if is_dataclass(task) else {}
    start = _Start(objective, estimator, optimizer, key, resume, log, repr(task), parts)
    return _steps(start, lambda step: task.batch_at(data, step), steps)


def _require_types(estimator: Any, optimizer: Any, key: Any, steps: Any) -> None:
    if steps is not None and not hasattr(steps, "__index__"):
        raise BadInput(f"steps is a whole number, not {steps!r}.")
    require_estimator(estimator)
    require_optimizer(optimizer)
    require_key(key)


class _Start(NamedTuple):
    """What a training starts with. task: names the task in a log. parts: what else must be equal when it resumes."""

    objective: Objective
    estimator: Estimator
    optimizer: Optimizer
    key: Key
    resume: str | Path | None
    log: StepLog | None
    task: str
    parts: Mapping[str, Any] = MappingProxyType({})

    def train_state(self, first: Any) -> TrainState:
        """Return the state before the first step of this call; `first` is the first batch."""
        objection = self.estimator.objection(self.objective, first)
        if objection is not None:
            raise Unsupported(objection)
        train_state = TrainState(self.objective, self.estimator, self.optimizer, key=self.key, **self.parts)
        file = None if self.resume is None else Path(self.resume)
        if file is not None:
            train_state.frozen = checkpoint.frozen(self.objective.model)
        if file is not None and file.exists():
            # This finds modules outside of the model. The file may contain their buffers.
            self.objective.prepare(first, self.key)
            checkpoint.read(file, train_state)
        if self.log is not None:
            _open_log(self.log, train_state, {"task": self.task, "key": self.key.seed})
        return train_state


def _steps(start: _Start, batch_of: Callable[[int], Any], steps: int | None) -> Iterator[StepResult]:
    objective, key = start.objective, start.key
    train_state = start.train_state(batch_of(0))
    if steps is not None and steps < train_state.taken:
        raise BadInput(f"the run that is resumed has taken {train_state.taken:,} steps, more than {steps:,}.")
    for number in itertools.count(train_state.taken) if steps is None else range(train_state.taken, steps):
        batch = batch_of(number)
        step_key = key.fold("step", number)
        result = train_state.step(batch, step_key)
        yield StepResult(number, objective, result.loss, result.slopes, result.clipped, train_state, batch, step_key)
    name = not_finite(objective)
    if name is not None:
        warn_once(
            objective.model,
            "not finite at the end",
            f"`{name}` is not finite: a step had a gradient that is not finite.",
        )


def _open_log(log: StepLog, train_state: TrainState, about: dict[str, Any]) -> None:
    """Take the steps of the log that the state does not contain yet, and write further steps to it."""
    estimator, leafwise = train_state.estimator, train_state.leafwise
    assert leafwise is not None
    if not estimator.replayable:
        raise Unsupported(
            f"the gradients of {estimator} are not seeds and coefficients that reproduce it, so its steps cannot be "
            "logged. Use `resume`, or an estimator that is `replayable`, such as mezo()."
        )
    writer = LogWriter(log, train_state.objective, leafwise.optimizer, about)
    train_state.taken = catch_up(writer, leafwise, estimator, train_state.taken)
    train_state.log = writer
