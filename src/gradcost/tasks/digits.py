"""The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels. No download is needed."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import torch

from gradcost.core.errors import require
from gradcost.core.key import Key
from gradcost.core.value import value
from gradcost.tasks.architectures import Architecture, Logistic, Mlp
from gradcost.tasks.task import Split, Splits, Task, permutation

TRAIN, VALIDATION = 1197, 300


@value
class Digits(Task):
    """Handwritten digits: x float32 in [0, 1], shape (N, 1, 8, 8); y of 10 classes, shape (N,).

    Splits: 1,197 examples for training, 300 for validation and 300 for test, after one fixed permutation.

    Args:
        model: the architecture.
        batch: number of images per batch.
    Source: Alpaydin and Kaynak (1998), the test part of the UCI set (CC BY 4.0), as `sklearn.datasets.load_digits`.
    """

    model: Architecture = Mlp((64,))
    batch: int = 64
    models: ClassVar[dict[str, Architecture]] = {"logistic": Logistic(), "mlp": Mlp((64,))}

    @property
    def inputs(self) -> tuple[int, ...]:
        return (1, 8, 8)

    @property
    def classes(self) -> int:
        return 10

    def splits(self) -> Splits:
        return _splits()


@lru_cache(maxsize=1)
def _splits() -> Splits:
    images, labels = require("sklearn.datasets", "The task digits", "tasks").load_digits(return_X_y=True)
    x = torch.as_tensor(images, dtype=torch.float32).div(16).reshape(-1, 1, 8, 8)
    y = torch.as_tensor(labels, dtype=torch.int64)
    order = permutation(Key(0).fold("digits"), len(x))
    train, validation, test = order.tensor_split([TRAIN, TRAIN + VALIDATION])
    return Splits(*(Split(x[part], y[part]) for part in (train, validation, test)))
