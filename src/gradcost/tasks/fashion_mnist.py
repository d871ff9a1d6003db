"""Fashion-MNIST: four IDX files in the cache folder, which `gradcost data fetch fashion_mnist` downloads."""

from __future__ import annotations

from typing import ClassVar

from gradcost.core.value import value
from gradcost.tasks import catalogue, data
from gradcost.tasks.idx_images import IdxImages


@value
class FashionMnist(IdxImages):
    """Fashion-MNIST: x float32 in [0, 1], shape (N, 1, 28, 28); y of 10 classes, shape (N,).

    Splits: the first 50,000 official training images for training, the last 10,000 for validation, and the 10,000
    official test images for test.

    Args:
        model: the architecture.
        batch: number of images per batch.
    Source: Xiao, Rasul, Vollgraf (2017), arXiv 1708.07747.
    """

    dataset: ClassVar[data.Dataset] = catalogue.FASHION_MNIST
