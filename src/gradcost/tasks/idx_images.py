"""The task of MNIST and Fashion-MNIST, whose files have the same names and form."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

from gradcost.core.value import value
from gradcost.tasks.architectures import Architecture, Cnn, Logistic, Mlp
from gradcost.tasks.data import Dataset, verified
from gradcost.tasks.idx import image_splits
from gradcost.tasks.task import Splits, Task

TRAIN = 50_000  # of the 60,000 official training images; the other 10,000 are the validation split


@value
class IdxImages(Task):
    """Gray images of ten classes in four IDX files with the names of MNIST.

    Args:
        model: the architecture.
        batch: number of images per batch.
    """

    model: Architecture = Mlp((1024, 1024))
    batch: int = 64
    dataset: ClassVar[Dataset]
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
        return _splits(self.dataset)


@lru_cache(maxsize=2)
def _splits(dataset: Dataset) -> Splits:
    return image_splits(verified(dataset), TRAIN)
