"""The training loop: a generator that takes one step per iteration, with any estimator."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from gradcost.core.errors import Unsupported
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


def train(
    task: Trainable,
    estimator: Estimator,
    optimizer: Optimizer,
    key: Key = Key(0),  # noqa: B008 (a key is an immutable value)
    steps: int | None = None,
    resume: Path | None = None,
) -> Iterator[StepResult]:
    """Train a task's model; yield after each step.

    - `key.fold("init")` sets the initial weights, `key.fold("data")` the order of the data, `key.fold("step", t)`
      the randomness of step t. Two estimators trained with one key get equal initial weights, batches and step keys.
    - Each parameter moves and its gradient is freed before the next parameter's gradient is computed. The whole
      gradient never exists.
    - Estimators change no buffer. If a forward pass of the model changes buffers or attributes (BatchNorm's running
      statistics, spectral normalisation, moving averages), one extra forward pass per step computes them, as a
      training step in torch would.
    - A step whose loss or slope is not finite moves no weight, buffer or optimizer state. It is yielded with that
      loss, and a `Note` is issued once. Training continues; stop the loop to end it.

    Args:
        task: the model, loss and batches, such as `tasks.Digits()`. Any object with the methods of `Trainable`.
        estimator: how each gradient is obtained, such as `mezo()`.
        optimizer: how parameters move, such as `SGD(0.1)`.
        key: the only source of randomness.
        steps: total number of steps, including those taken before `resume` was written. None: no end.
        resume: path of a file that `training.checkpoint.write` writes. If the file exists, training continues from
            it, with the same bits as an uninterrupted run. If not, or if None, training starts at step 0.
    Yields:
        StepResult of the step just taken: number, loss, slopes and state.
    Raises:
        Unsupported: the estimator cannot be used with this model, loss and batch. No weight has changed.
        BadInput: the file `resume` is damaged, or is the training checkpoint of another model, estimator, optimizer,
            key or task.
        Exception: the loss raised it. The weights are those after the last complete step. With backprop, parameters
            that the interrupted backward pass had already reached have moved.
    """
    objective = task.objective(key.fold("init"))
    first = task.batch_at(key.fold("data"), 0)
    objection = estimator.objection(objective, first)
    if objection is not None:
        raise Unsupported(objection)
    data = {"task": task} if is_dataclass(task) else {}  # the repr of another object may differ between processes
    train_state = TrainState(objective, estimator, optimizer, key=key, **data)
    if resume is not None and resume.exists():
        objective.prepare(first, key)  # finds modules outside of the model: the file may contain their buffers
        checkpoint.read(resume, train_state)
    for number in itertools.count(train_state.taken) if steps is None else range(train_state.taken, steps):
        batch = task.batch_at(key.fold("data"), number)
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
