"""MNIST, read from four IDX files in the cache folder, which `gradcost data fetch mnist` downloads."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

from gradcost.core.value import value
from gradcost.tasks import data
from gradcost.tasks.architectures import Architecture, Cnn, Logistic, Mlp
from gradcost.tasks.idx import image_splits
from gradcost.tasks.task import Splits, Task

TRAIN = 50_000  # of the 60,000 official training images; the other 10,000 are the validation split


@value
class Mnist(Task):
    """MNIST: x float32 in [0, 1], shape (N, 1, 28, 28); y of 10 classes, shape (N,).

    Splits: the first 50,000 official training images for training, the last 10,000 for validation, and the 10,000
    official test images for test.

    Args:
        model: the architecture.
        batch: number of images per batch.
    Source: LeCun, Bottou, Bengio, Haffner (1998).
    """

    model: Architecture = Mlp((1024, 1024))
    batch: int = 64
    models: ClassVar[dict[str, Architecture]] = {
        "mlp": Mlp((1024, 1024)),
        "cnn": Cnn(),
        "logistic": Logistic(),
    }

    @property
    def inputs(self) -> tuple[int, ...]:
        return (1, 28, 28)

    @property
    def classes(self) -> int:
        return 10

    def splits(self) -> Splits:
        return _splits()


@lru_cache(maxsize=1)
def _splits() -> Splits:
    return image_splits(data.verified(data.MNIST), TRAIN)
