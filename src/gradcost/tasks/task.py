"""Tasks: data in three splits, a model, a batch for every step, and a score."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcost.core.errors import BadInput
from gradcost.core.isolation import eval_mode, seeded_generators
from gradcost.core.key import Key
from gradcost.core.metric import ACCURACY, Metric
from gradcost.core.note import Note
from gradcost.core.objective import Objective
from gradcost.tasks.architectures import Architecture
from gradcost.tasks.metrics import IGNORED, NO_TARGETS

SCORED_AT_ONCE = 1000  # examples per forward pass


class Split(NamedTuple):
    """Examples. The first dimension of both fields counts them.

    Args:
        x: the inputs.
        y: the targets, int64. A target of -100 is not counted.
    """

    x: Tensor
    y: Tensor


Batch = Split


class Splits(NamedTuple):
    """The three parts of a data set.

    Args:
        train: the examples to train on.
        validation: the examples on which learning rates are chosen.
        test: the examples for the final score, which is computed once.
    """

    train: Split
    validation: Split
    test: Split


def note_left_out(name: str, kept: Splits, examples: Sequence[int], length: int) -> None:
    """Issue a `Note` with the number of examples of each split that are left out because they are too long.

    Args:
        name: what the examples are.
        kept: the splits without them.
        examples: number of examples of each split with them.
        length: the largest number of tokens.
    """
    left_out = [total - len(part.x) for part, total in zip(kept, examples, strict=True)]
    if any(left_out):
        parts = zip(left_out, examples, ("training", "validation", "test"), strict=True)
        counts = ", ".join(f"{count:,} of {total:,} for {part}" for count, total, part in parts)
        message = f"{name} that do not fit into {length} tokens are left out: {counts}. A larger length keeps them."
        warnings.warn(message, Note, stacklevel=2)


class Score(NamedTuple):
    """The score of a model on a split.

    Args:
        loss: mean cross-entropy per target, in nats.
        accuracy: fraction of correct predictions, 0 to 1.
        targets: number of targets in the split; None if the task does not count them.
    """

    loss: float
    accuracy: float
    targets: int | None = None


class Task(ABC):
    """A classification task as an immutable value. A subclass defines `inputs`, `classes` and `splits`.

    Class attributes:
    - `models`: maps the names of architectures on the command line to the architectures;
    - `steps`: the default number of steps on the command line;
    - `metric`: what ranks the runs. `score` returns a value of that name.

    Args:
        model: the architecture.
        batch: number of examples per batch.
    """

    models: ClassVar[dict[str, Architecture]]
    steps: ClassVar[int] = 2000
    metric: ClassVar[Metric] = ACCURACY
    model: Architecture
    batch: int

    @property
    @abstractmethod
    def inputs(self) -> tuple[int, ...]:
        """The shape of one example, known without loading the data."""

    @property
    @abstractmethod
    def classes(self) -> int:
        """The number of classes: each target is one of 0, 1, ..., classes - 1."""

    @abstractmethod
    def splits(self) -> Splits:
        """Return the data, on the CPU. They are loaded once per process and shared, so do not change them in place.

        Returns:
            Splits(train, validation, test).
        Raises:
            DataError: the data are missing or damaged.
            MissingExtra: a package that is needed to read the data is not installed.
        """

    def objective(self, key: Key) -> Objective:
        """Return a newly initialised model with the cross-entropy as its loss, on the CPU.

        Args:
            key: the source of the initial weights. Equal keys give equal weights.
        Returns:
            An Objective. Its `data` is `once_through`, for estimators that need the full gradient.
        """
        with seeded_generators(key.fold("init")):
            model = self.model.build(self.inputs, self.classes)
        return Objective(model, cross_entropy, data=self.once_through)

    def once_through(self) -> Iterator[Batch]:
        """Yield the training split once, in order, in batches of `batch` examples; the last batch may be smaller."""
        train = self.splits().train
        for x, y in zip(train.x.split(self.batch), train.y.split(self.batch), strict=True):
            yield Batch(x, y)

    @property
    def steps_per_epoch(self) -> int:
        """The number of full batches in the training split. Each epoch omits the examples that do not fill a batch.

        Raises:
            BadInput: `batch` is not between 1 and the size of the training split.
        """
        examples = len(self.splits().train.x)
        if not examples:
            raise BadInput(f"the train split of {type(self).__name__} has no examples: it needs one or more.")
        if not 1 <= self.batch <= examples:
            raise BadInput(
                f"batch is {self.batch!r}, but the training split has {examples} examples: choose 1 to {examples}."
            )
        return examples // self.batch

    def batch_at(self, key: Key, step: int) -> Batch:
        """Return the training batch of one step, on the CPU. It depends only on `key` and `step`.

        Law: no example occurs twice in an epoch of `steps_per_epoch` batches. Each epoch has its own random order.

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
        return shuffled_batch(self, key, step)

    def score(self, model: nn.Module, split: Split) -> Score:
        """Return the mean loss and accuracy of a model on a split, by the function `score`.

        A subclass may return a named tuple with more numbers; a study records all of them.

        Args:
            model: the model of `objective`, such as after training.
            split: one of the three `splits()`.
        Returns:
            Score(loss, accuracy, targets).
        """
        return score(model, split)


def shuffled_batch(task: Any, key: Key, step: int) -> Batch:
    """Return the batch of one step of a task with `splits()`, `batch` and `steps_per_epoch` (`Task.batch_at`)."""
    epoch, place = divmod(step, task.steps_per_epoch)
    train = task.splits().train
    order = permutation(key.fold("epoch", epoch), len(train.x))
    indices = order[place * task.batch : (place + 1) * task.batch]
    return Batch(train.x[indices], train.y[indices])


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
    """Return the mean loss and accuracy over all targets of a split, in evaluation mode. The mean is in float64.

    Targets of -100 are not counted.

    Args:
        model: maps inputs to logits of shape (..., classes). The mode of each module is restored.
        split: the examples to score.
    Returns:
        Score(loss, accuracy, targets).
    Raises:
        BadInput: the split is empty, or all its targets are -100.
    """
    losses, right = one_by_one(model, split)
    return Score(losses.mean(dtype=torch.float64).item(), right.sum().item() / len(right), len(right))


def one_by_one(model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
    """Return the loss of each target of a split, and whether its prediction is correct, in evaluation mode.

    The examples are moved to the device of the model's parameters, 1,000 at a time. The mode of each module (training
    or evaluation) is restored, also after an error.

    Args:
        model: maps inputs to logits of shape (..., classes).
        split: the examples to score.
    Returns:
        (losses, right), both of shape (targets,), in the order of the targets that count, on the CPU. losses:
        cross-entropy in nats. right: bool, True for a correct prediction.
    Raises:
        BadInput: the split is empty, or all its targets are -100.
    """
    if not len(split.x):
        raise BadInput("an empty split has no score: pass at least one example.")
    with eval_mode(model), torch.no_grad():
        losses, right = _one_by_one(model, split)
    if not len(losses):
        raise BadInput(NO_TARGETS)
    return losses, right


def _one_by_one(model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
    device = next((parameter.device for parameter in model.parameters()), split.x.device)
    losses, right = [], []
    for x, y in zip(split.x.split(SCORED_AT_ONCE), split.y.split(SCORED_AT_ONCE), strict=True):
        logits, targets = model(x.to(device)).flatten(0, -2), y.to(device).flatten()
        counted = targets != IGNORED
        losses.append(F.cross_entropy(logits, targets, reduction="none")[counted].cpu())
        right.append((logits.argmax(-1) == targets)[counted].cpu())
    return torch.cat(losses), torch.cat(right)


@lru_cache(maxsize=8)
def permutation(key: Key, examples: int) -> Tensor:
    """Return a random permutation of 0 to `examples` - 1. It is cached and shared, so do not change it in place.

    Args:
        key: the source of randomness.
        examples: the length of the permutation.
    Returns:
        int64, shape (examples,).
    """
    return torch.randperm(examples, generator=torch.Generator().manual_seed(key.seed & (1 << 63) - 1))
