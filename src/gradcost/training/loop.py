"""The training loop: a generator of steps, for every estimator."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from gradcost.core.errors import Unsupported
from gradcost.core.key import Key
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
            A new Objective. `train` changes its parameters in place.
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
        objective: what is trained; its weights are those after the step.
        loss: the loss before the step: a scalar tensor on the model's device. Reading its value waits for the device.
        slopes: float64, shape (probes,); None for backprop.
        clipped: the share of slopes that `Clipped` cut, in [0, 1]; None without a clip.
        train_state: the state after the step; `training.checkpoint.write` saves it.
        batch: the batch of the step.
        key: the key of the step.
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
      the randomness of step t. Two estimators under one key differ in nothing else.
    - Each parameter's gradient is used and dropped before the next one is made, so the whole gradient never exists.
    - Running statistics (BatchNorm in training) advance by one forward pass before each step, because an estimate
      changes none.

    Args:
        task: the model, loss and batches, such as `tasks.Digits()`. Any object with the methods of `Trainable`.
        estimator: how each gradient is obtained, such as `mezo()`.
        optimizer: how parameters move, such as `SGD(0.1)`.
        key: the only source of randomness.
        steps: the number of the last step plus one, counted from the start of the training. None: no end.
        resume: a file that `training.checkpoint.write` wrote. If it exists, the training continues from it with the
            same bits as an uninterrupted one. None: start from step 0.
    Yields:
        StepResult: number, loss, slopes and state of the step that was just taken.
    Raises:
        Unsupported: the estimator's objection, before any weight is changed.
        BadInput: the file `resume` is not a training checkpoint of this model.
        Exception: what the loss raises. The weights are those after the last complete step (for backprop, parameters
            that the backward pass reached have already moved).
    """
    objective = task.objective(key.fold("init"))
    objection = estimator.objection(objective, task.batch_at(key.fold("data"), 0))
    if objection is not None:
        raise Unsupported(objection)
    train_state = TrainState(objective, estimator, optimizer)
    if resume is not None and resume.exists():
        checkpoint.read(resume, train_state)
    for number in itertools.count(train_state.taken) if steps is None else range(train_state.taken, steps):
        batch = task.batch_at(key.fold("data"), number)
        step_key = key.fold("step", number)
        result = train_state.step(batch, step_key)
        yield StepResult(number, objective, result.loss, result.slopes, result.clipped, train_state, batch, step_key)
