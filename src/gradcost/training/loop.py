"""Training as a generator: one step at a time, with any estimator."""

from __future__ import annotations

import itertools
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
    """What can be trained: every `Task`, or an object of your own with these two."""

    def objective(self, key: Key) -> Objective:
        """The model to train, initialised from the key, with its loss."""
        ...

    def batch_at(self, key: Key, step: int) -> Any:
        """The batch of a step: the same one for the same key."""
        ...


@dataclass(frozen=True, eq=False)
class StepResult:
    """A step that was taken: its number from 0, the loss before it, and what the estimator measured.

    objective: what is being trained; its weights are those after the step. loss: a scalar tensor on the model's
    device; reading its number waits for the device. slopes: one a probe, None for backprop. clipped: the share
    of slopes that a clip cut, None where there is none. stepping: what `training.checkpoint.write` keeps.
    batch, key: what the step was taken with.
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
    """Take steps, yielding after each; without `steps`, for as long as it is asked.

    The key's folds "init", "data" and ("step", t) set the weights, the order of the data and what step t
    draws, so runs of different estimators under one key differ in nothing else. Each leaf's gradient is used
    and dropped before the next, so neither a seeded gradient nor backprop's is ever there as a whole. Where a
    layer keeps running statistics (BatchNorm in training) they advance by one forward before the step: an
    estimate moves none.

    resume: a file that `training.checkpoint.write` wrote; where it is there, the training goes on from it, with the
    same bits as one that never stopped.

    Raises: ValueError with the estimator's objection, before a weight is changed; and what the loss raises,
    with the weights as the last whole step left them (for backprop, as far as its backward came).
    """
    objective = task.objective(key.fold("init"))
    first = task.batch_at(key.fold("data"), 0)
    objection = estimator.objection(objective, first)
    if objection is not None:
        raise Unsupported(objection)
    train_state = TrainState(objective, estimator, optimizer)
    if resume is not None and resume.exists():
        checkpoint.read(resume, train_state)
    for number in itertools.count(train_state.taken) if steps is None else range(train_state.taken, steps):
        batch = task.batch_at(key.fold("data"), number)
        drawn = key.fold("step", number)
        found = train_state.step(batch, drawn)
        yield StepResult(number, objective, found.loss, found.slopes, found.clipped, train_state, batch, drawn)
