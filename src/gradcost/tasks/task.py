"""Tasks: data split three ways, a model, and a batch for every step; all of it a function of a key."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcost.core.errors import BadInput
from gradcost.core.isolation import randomness
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.tasks.architectures import Architecture

SCORED_AT_ONCE = 1000


class Split(NamedTuple):
    """Examples: inputs `x` and targets `y` (int64), with the examples along the first dimension of both."""

    x: Tensor
    y: Tensor


Batch = Split


class Splits(NamedTuple):
    """What is trained on, what is tuned on, and what is looked at once."""

    train: Split
    validation: Split
    test: Split


class Score(NamedTuple):
    """Over a whole split: mean cross-entropy in nats a target, and share of right predictions, 0 to 1."""

    loss: float
    accuracy: float
    targets: int | None = None  # how many were scored; None where a task of one's own does not count them


class Task(ABC):
    """A classification problem as a value: the fields of a subclass say which model and which batch size.

    `models` names the architectures that the command line offers for the task; `steps` is how long a run is
    there unless something else is asked for.
    """

    models: ClassVar[dict[str, Architecture]]
    steps: ClassVar[int] = 2000
    model: Architecture
    batch: int

    @property
    @abstractmethod
    def inputs(self) -> tuple[int, ...]:
        """The shape of one example; needs no data that would have to be fetched."""

    @property
    @abstractmethod
    def classes(self) -> int:
        """How many classes a target may name."""

    @abstractmethod
    def splits(self) -> Splits:
        """The data on the CPU, loaded once a process and shared: read it, do not write to it.

        Raises: gradcost.tasks.data.DataError when the data, or what reads it, is not there.
        """

    def objective(self, key: Key) -> Objective:
        """The cross-entropy of a fresh model, on the CPU, whose initial weights are a function of `key`."""
        with randomness(key.fold("init")):
            model = self.model.build(self.inputs, self.classes)
        return Objective(model, cross_entropy, data=self.once_through)

    def once_through(self) -> Iterator[Batch]:
        """The whole training split in its own order, in batches of the size of a step's; the last may be smaller."""
        train = self.splits().train
        for x, y in zip(train.x.split(self.batch), train.y.split(self.batch), strict=True):
            yield Batch(x, y)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the training split; the rest of an epoch's shuffled examples sits it out.

        Raises: ValueError when the batch is not between one example and the whole split.
        """
        examples = len(self.splits().train.x)
        if not 1 <= self.batch <= examples:
            raise BadInput(
                f"a batch of {self.batch!r} cannot be drawn from {examples} training examples: choose 1 to "
                f"{examples}."
            )
        return examples // self.batch

    def batch_at(self, key: Key, step: int) -> Batch:
        """The training batch of step `step` (from 0), on the CPU: a function of `key` and `step` alone.

        Law: an epoch of `steps_per_epoch` batches holds no example twice, and every epoch is shuffled anew.

        Raises: ValueError when the batch size does not fit the split, or the step is negative.
        """
        if step < 0:
            raise BadInput(f"steps count from 0; there is no step {step}.")
        epoch, place = divmod(step, self.steps_per_epoch)
        train = self.splits().train
        order = permutation(key.fold("epoch", epoch), len(train.x))
        drawn = order[place * self.batch : (place + 1) * self.batch]
        return Batch(train.x[drawn], train.y[drawn])

    def score(self, model: nn.Module, split: Split) -> Score:
        """Mean loss and accuracy of a model over the whole of `split`: `score` below.

        A task that is no `Task` may give a named tuple with numbers beside these two: a study puts them on record.
        """
        return score(model, split)


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy (nats, scalar) of `model(batch.x)`: logits [..., classes] for targets [...]."""
    logits = model(batch.x)
    return F.cross_entropy(logits.flatten(0, -2), batch.y.flatten())


def score(model: nn.Module, split: Split) -> Score:
    """Mean loss and accuracy over every target of `split`, in evaluation mode, summed in float64.

    Raises: ValueError when the split is empty.
    """
    losses, right = one_by_one(model, split)
    return Score(losses.mean(dtype=torch.float64).item(), right.sum().item() / len(right), len(right))


def one_by_one(model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
    """Of every target of `split`, in its order and on the CPU: the cross-entropy in nats, and whether the prediction
    is right; [targets] both, in evaluation mode.

    The examples go to the device of the model's parameters, 1,000 at a time. Every module's mode is put back, also
    after an error. Raises: ValueError when the split is empty.
    """
    if not len(split.x):
        raise BadInput("an empty split has no score: give it at least one example.")
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
    """An order of 0 to `examples` - 1 (int64), a function of `key`; it is shared, so do not write to it."""
    return torch.randperm(examples, generator=torch.Generator().manual_seed(key.seed & (1 << 63) - 1))
