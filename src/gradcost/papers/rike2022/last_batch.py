"""The paper's test loss, the mean over the last batch of a shuffled pass, and how much it varies over shuffles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.value import value
from gradcost.tasks.architectures import Architecture
from gradcost.tasks.task import Batch, Split, Splits, Task, one_by_one, permutation

SHUFFLES = 1000


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
class LastBatch:
    """A task whose score also contains the mean loss over the last batch of a shuffled pass over the split.

    With N examples in batches of B, the last batch has N mod B examples, or B if that is 0: 16 for the 10,000 test
    images of MNIST and B = 64. The mean over so few examples depends on the shuffle, so the score includes
    quantiles of this mean over shuffles. Every model is scored on the same shuffles, so differences between models
    are paired.

    Args:
        task: the task on which models are trained and scored.
    """

    task: Task

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
