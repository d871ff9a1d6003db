"""Tasks: data in three splits, a model, and a batch for every step, all set by a key."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcost.core.errors import BadInput
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.tasks.architectures import Architecture

SCORED_AT_ONCE = 1000  # examples


class Split(NamedTuple):
    """Examples, along the first dimension of both fields.

    Args:
        x: the inputs.
        y: the targets, int64.
    """

    x: Tensor
    y: Tensor


Batch = Split


class Splits(NamedTuple):
    """The three parts of a data set.

    Args:
        train: for training.
        validation: for choosing learning rates.
        test: for the final score, computed once.
    """

    train: Split
    validation: Split
    test: Split


class Score(NamedTuple):
    """A model's score over a split.

    Args:
        loss: mean cross-entropy per target, in nats.
        accuracy: share of correct predictions, 0 to 1.
        targets: number of targets scored; None if the task does not count them.
    """

    loss: float
    accuracy: float
    targets: int | None = None


class Task(ABC):
    """A classification task as an immutable value. A subclass defines `inputs`, `classes` and `splits`.

    Class attributes:
    - `models`: the architectures that the command line offers, by name;
    - `steps`: the default number of steps on the command line.

    Args:
        model: the architecture.
        batch: examples in a step's batch.
    """

    models: ClassVar[dict[str, Architecture]]
    steps: ClassVar[int] = 2000
    model: Architecture
    batch: int

    @property
    @abstractmethod
    def inputs(self) -> tuple[int, ...]:
        """The shape of one example. It is known before the data are fetched."""

    @property
    @abstractmethod
    def classes(self) -> int:
        """The number of classes of a target."""

    @abstractmethod
    def splits(self) -> Splits:
        """Return the data, on the CPU. They are loaded once per process and shared: do not write to them.

        Returns:
            Splits(train, validation, test).
        Raises:
            DataError: the data are missing or damaged.
            MissingExtra: a package that reads them is not installed.
        """

    def objective(self, key: Key) -> Objective:
        """Return the cross-entropy of a new model, on the CPU.

        Args:
            key: the source of the initial weights. Equal keys give equal weights.
        Returns:
            An Objective whose `data` is `once_through`.
        """
        with seeded_generators(key.fold("init")):
            model = self.model.build(self.inputs, self.classes)
        return Objective(model, cross_entropy, data=self.once_through)

    def once_through(self) -> Iterator[Batch]:
        """Yield the training split once, in order, in batches of `batch` examples; the last may be smaller."""
        train = self.splits().train
        for x, y in zip(train.x.split(self.batch), train.y.split(self.batch), strict=True):
            yield Batch(x, y)

    @property
    def steps_per_epoch(self) -> int:
        """The number of full batches in the training split. Each epoch leaves out the remaining examples.

        Raises:
            BadInput: `batch` is not between 1 and the size of the training split.
        """
        examples = len(self.splits().train.x)
        if not 1 <= self.batch <= examples:
            raise BadInput(
                f"batch is {self.batch!r}, but the training split has {examples} examples: choose 1 to {examples}."
            )
        return examples // self.batch

    def batch_at(self, key: Key, step: int) -> Batch:
        """Return the training batch of one step, on the CPU: a function of `key` and `step` alone.

        Law: an epoch of `steps_per_epoch` batches contains no example twice. Each epoch has its own random order.

        Args:
            key: the source of the order of the data.
            step: the number of the step, from 0.
        Returns:
            Split(x, y) of `batch` examples.
        Raises:
            BadInput: `batch` does not fit the training split, or `step` is negative.
        """
        if step < 0:
            raise BadInput(f"step must be 0 or more, not {step}: steps count from 0.")
        epoch, place = divmod(step, self.steps_per_epoch)
        train = self.splits().train
        order = permutation(key.fold("epoch", epoch), len(train.x))
        indices = order[place * self.batch : (place + 1) * self.batch]
        return Batch(train.x[indices], train.y[indices])

    def score(self, model: nn.Module, split: Split) -> Score:
        """Return the mean loss and accuracy of a model over a split, as the function `score` does.

        Another class of task may return a named tuple with more numbers; a study records all of them.

        Args:
            model: what `objective` made.
            split: one of `splits()`.
        Returns:
            Score(loss, accuracy, targets).
        """
        return score(model, split)


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of `model(batch.x)` against `batch.y`.

    Args:
        model: maps inputs to logits of shape (..., classes).
        batch: Split(x, y) with targets of shape (...).
    Returns:
        A scalar, in nats per target.
    """
    logits = model(batch.x)
    return F.cross_entropy(logits.flatten(0, -2), batch.y.flatten())


def score(model: nn.Module, split: Split) -> Score:
    """Return the mean loss and accuracy over all targets of a split, in evaluation mode, summed in float64.

    Args:
        model: maps inputs to logits of shape (..., classes). Its modes are restored.
        split: the examples.
    Returns:
        Score(loss, accuracy, targets).
    Raises:
        BadInput: the split is empty.
    """
    losses, right = one_by_one(model, split)
    return Score(losses.mean(dtype=torch.float64).item(), right.sum().item() / len(right), len(right))


def one_by_one(model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
    """Return the loss and the correctness of each target of a split, in evaluation mode.

    The examples are moved to the device of the model's parameters, 1,000 at a time. The mode of each module is
    restored, also after an error.

    Args:
        model: maps inputs to logits of shape (..., classes).
        split: the examples.
    Returns:
        (losses, right), both of shape (targets,), in order, on the CPU. losses: cross-entropy in nats. right: bool.
    Raises:
        BadInput: the split is empty.
    """
    if not len(split.x):
        raise BadInput("an empty split has no score: pass at least one example.")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return _one_by_one(model, split)
    finally:
        for module, mode in modes:
            module.training = mode


def _one_by_one(model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
    device = next((parameter.device for parameter in model.parameters()), split.x.device)
    losses, right = [], []
    for x, y in zip(split.x.split(SCORED_AT_ONCE), split.y.split(SCORED_AT_ONCE), strict=True):
        logits, targets = model(x.to(device)).flatten(0, -2), y.to(device).flatten()
        losses.append(F.cross_entropy(logits, targets, reduction="none").cpu())
        right.append((logits.argmax(-1) == targets).cpu())
    return torch.cat(losses), torch.cat(right)


@lru_cache(maxsize=8)
def permutation(key: Key, examples: int) -> Tensor:
    """Return a random order of 0 to `examples` - 1. It is cached and shared: do not write to it.

    Args:
        key: the source of randomness.
        examples: the length.
    Returns:
        int64, shape (examples,).
    """
    return torch.randperm(examples, generator=torch.Generator().manual_seed(key.seed & (1 << 63) - 1))
