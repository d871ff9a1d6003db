"""A test loss that is the mean over the last batch of a shuffled pass, and what such a number is worth."""

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
    """`loss` and `accuracy` over all `targets` of the split, and beside them what its last batch would have said.

    error: the standard error of `loss` as a mean over examples. last: the mean loss of the last batch of one fixed
    shuffle. last_low, last_high: the 5% and 95% quantiles of that mean over 1,000 shuffles of the same examples.
    zero: the share of those shuffles in which three decimals print 0.000.
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
    """`task`, whose scores also tell the mean loss of the last batch of a shuffled pass over the split.

    N examples in batches of B leave N mod B of them for the last (B where nothing is left over): 16 of MNIST's
    10,000 in batches of 64. The mean over so few is a draw of a sampler, so its spread is told with it. The shuffles
    are the same for every model, so that differences between models are paired.
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
        """Raises: ValueError when the split is empty."""
        losses, right = one_by_one(model, split)
        losses = losses.double()
        last = last_batches(losses, self.batch)
        low, high = torch.quantile(last, torch.tensor([0.05, 0.95], dtype=last.dtype)).tolist()
        return LastBatchScore(
            loss=losses.mean().item(),
            accuracy=right.double().mean().item(),
            targets=len(losses),
            error=losses.std(correction=0).item() / len(losses) ** 0.5,
            last=last[0].item(),
            last_low=low,
            last_high=high,
            zero=(last < 0.0005).double().mean().item(),
        )


def last_batches(losses: Tensor, batch: int) -> Tensor:
    """The mean loss of the last batch of each of 1,000 shuffles [1000], from the loss of every example [N]."""
    count = len(losses) % batch or batch
    shuffles = (permutation(Key(0).fold("last batch", shuffle), len(losses)) for shuffle in range(SHUFFLES))
    return torch.stack([losses[order[-count:]].mean() for order in shuffles])
