"""The 1,797 handwritten digits of 8 x 8 that come with scikit-learn: nothing to download."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import torch

from gradcost.core.key import Key
from gradcost.core.value import value
from gradcost.tasks.architectures import Architecture, Logistic, Mlp
from gradcost.tasks.data import DataError
from gradcost.tasks.task import Split, Splits, Task, permutation

TRAIN, VALIDATION = 1197, 300


@value
class Digits(Task):
    """Optical recognition of digits: x [N, 1, 8, 8] float32 in [0, 1], y [N] of 10 classes.

    1,197 examples to train, 300 to validate, 300 to test, dealt out once by a fixed permutation. Source:
    Alpaydin and Kaynak (1998), the test part of the UCI set (CC BY 4.0), as `sklearn.datasets.load_digits`.
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
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            'the task digits needs scikit-learn, which is not installed: pip install "gradcost[tasks]".'
        ) from error
    images, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(images, dtype=torch.float32).div(16).reshape(-1, 1, 8, 8)
    y = torch.as_tensor(labels, dtype=torch.int64)
    order = permutation(Key(0).fold("digits"), len(x))
    train, validation, test = order.tensor_split([TRAIN, TRAIN + VALIDATION])
    return Splits(*(Split(x[part], y[part]) for part in (train, validation, test)))
