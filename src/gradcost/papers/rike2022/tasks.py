"""Two wrappers of a task: the paper's test loss, and the data, batches and loss of the authors' notebooks.

Both are in one file, because the fingerprint of a study covers one file outside of the library's own tasks.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, log
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.value import value
from gradcost.tasks.architectures import Architecture
from gradcost.tasks.task import Batch, Split, Splits, Task, one_by_one, permutation, shuffled_batch

SHUFFLES = 1000
SPLIT_SEED = 0  # cells 5 and 8 of the notebooks: torch.manual_seed(0), then random_split
EPS = torch.finfo(torch.float32).eps  # the notebooks clamp probabilities to [EPS, 1 - EPS]
LOSS_BOUNDS = (-log(1 - EPS), -log(EPS))  # 1.2e-7 and 15.94: the least and the largest loss of one example


class LastBatchScore(NamedTuple):
    """The score of a model on a split: the mean over all targets, and the paper's metric.

    Args:
        loss: the mean loss over all targets.
        accuracy: the accuracy over all targets, in [0, 1].
        targets: number of targets in the split.
        error: the standard error of `loss`, from the spread of the losses over targets.
        last: the mean loss over the last batch of one fixed shuffle.
        last_low: the 5% quantile, over 1,000 shuffles of the split, of the mean loss over the last batch.
        last_high: the 95% quantile of the same means.
        zero: fraction of the same means that print as 0.000.
    """

    loss: float
    accuracy: float
    targets: int
    error: float
    last: float
    last_low: float
    last_high: float
    zero: float


@value
class NotebookData:
    """A task with the data, the batches and the training loss of the notebooks.

    - Split: torch's permutation from seed 0 divides the training and validation examples, as in the notebooks.
    - Epoch: every training example occurs once; the last batch is smaller if the batch size does not divide them.
    - Loss: cross-entropy of probabilities that are clamped to [1.2e-7, 1 - 1.2e-7]. The loss of an example is at most
      15.94, and its slope is 0 where the clamp acts. The notebooks clamp in forward-gradient runs only.

    Args:
        task: the task that has the examples and the model.
        validation: number of validation examples. None: as many as in `task`.
    """

    task: Task
    validation: int | None = None

    @property
    def model(self) -> Architecture:
        return self.task.model

    @property
    def batch(self) -> int:
        return self.task.batch

    @property
    def classes(self) -> int:
        return self.task.classes

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches of an epoch, the incomplete one included."""
        return ceil(len(self.splits().train.x) / self.batch)

    def splits(self) -> Splits:
        return _random_splits(self.task, self.validation)

    def objective(self, key: Key) -> Objective:
        return Objective(self.task.objective(key).model, clamped_cross_entropy)

    def batch_at(self, key: Key, step: int) -> Batch:
        """Return the training batch of one step. It depends only on `key` and `step`.

        Args:
            key: the source of the order of the data.
            step: the number of the step, from 0.
        """
        return shuffled_batch(self, key, step)


@lru_cache(maxsize=1)
def _random_splits(task: Task, validation: int | None) -> Splits:
    train, held_out, test = task.splits()
    x, y = torch.cat([train.x, held_out.x]), torch.cat([train.y, held_out.y])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SPLIT_SEED))
    first, second = order.tensor_split([len(x) - (len(held_out.x) if validation is None else validation)])
    return Splits(Split(x[first], y[first]), Split(x[second], y[second]), test)


def clamped_cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of `model(batch.x)`, with every probability clamped to [1.2e-7, 1 - 1.2e-7].

    Args:
        model: maps inputs to logits of shape (N, classes).
        batch: Split(x, y) with targets of shape (N,).
    Returns:
        A scalar, in nats per target.
    """
    probability = model(batch.x).softmax(-1).gather(-1, batch.y[:, None])
    return -probability.clamp(EPS, 1 - EPS).log().mean()


@value
class LastBatch:
    """A task whose score also contains the mean loss over the last batch of a shuffled pass over the split.

    With N examples in batches of B, the last batch has N mod B examples, or B if that is 0: 16 for the 10,000 test
    images of MNIST and B = 64. The mean over so few examples depends on the shuffle, so the score includes
    quantiles of this mean over shuffles. Every model is scored on the same shuffles, so differences between models
    are paired.

    Args:
        task: the task on which models are trained and scored. The losses of `NotebookData` are clamped as in
            training.
    """

    task: Task | NotebookData

    @property
    def model(self) -> Architecture:
        return self.task.model

    @property
    def batch(self) -> int:
        return self.task.batch

    @property
    def classes(self) -> int:
        return self.task.classes

    def splits(self) -> Splits:
        return self.task.splits()

    def objective(self, key: Key) -> Objective:
        return self.task.objective(key)

    def batch_at(self, key: Key, step: int) -> Batch:
        return self.task.batch_at(key, step)

    def score(self, model: nn.Module, split: Split) -> LastBatchScore:
        """Return the score of a model.

        Args:
            model: the trained model.
            split: the examples to score.
        Returns:
            LastBatchScore, with means in float64.
        Raises:
            BadInput: the split is empty.
        """
        losses, is_correct = one_by_one(model, split)
        losses = losses.double()
        if isinstance(self.task, NotebookData):
            losses = losses.clamp(*LOSS_BOUNDS)
        last = last_batch_losses(losses, self.batch)
        low, high = torch.quantile(last, torch.tensor([0.05, 0.95], dtype=last.dtype)).tolist()
        return LastBatchScore(
            loss=losses.mean().item(),
            accuracy=is_correct.double().mean().item(),
            targets=len(losses),
            error=losses.std(correction=0).item() / len(losses) ** 0.5,
            last=last[0].item(),
            last_low=low,
            last_high=high,
            zero=(last < 0.0005).double().mean().item(),
        )


def last_batch_losses(losses: Tensor, batch: int) -> Tensor:
    """Return the mean loss over the last batch for each of 1,000 fixed shuffles, shape (1000,).

    Args:
        losses: the loss of every example, shape (N,).
        batch: the batch size.
    """
    size = len(losses) % batch or batch  # of the last batch
    shuffles = (permutation(Key(0).fold("last batch", shuffle), len(losses)) for shuffle in range(SHUFFLES))
    return torch.stack([losses[order[-size:]].mean() for order in shuffles])
