"""CIFAR-10, read from six binary files in the cache folder, which `gradcost data fetch cifar10` downloads."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch

from gradcost.core.value import value
from gradcost.tasks import catalogue, data
from gradcost.tasks.architectures import Architecture, Cnn, Mlp, Vgg
from gradcost.tasks.task import Split, Splits, Task

SHAPE = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the three planes


@value
class Cifar10(Task):
    """CIFAR-10: x float32 in [0, 1], shape (N, 3, 32, 32); y of 10 classes, shape (N,).

    Splits: the first 40,000 official training images for training, the last 10,000 for validation, and the 10,000
    official test images for test. In memory: 737 MB.

    Args:
        model: the architecture.
        batch: number of images per batch.
    Source: Krizhevsky (2009), "Learning multiple layers of features from tiny images".
    """

    model: Architecture = Vgg()
    batch: int = 64
    models: ClassVar[dict[str, Architecture]] = {
        "vgg": Vgg(),
        "vgg-32": Vgg(width=32),
        "vgg-16": Vgg(width=16),
        "cnn": Cnn(),
        "mlp": Mlp((1024, 1024)),
    }

    @property
    def inputs(self) -> tuple[int, ...]:
        return SHAPE

    @property
    def classes(self) -> int:
        return 10

    def splits(self) -> Splits:
        return _splits()


@lru_cache(maxsize=1)
def _splits() -> Splits:
    folder = data.verified(catalogue.CIFAR10)
    *training, validation = [f"data_batch_{number}.bin" for number in range(1, 6)]
    return Splits(_read(folder, training), _read(folder, [validation]), _read(folder, ["test_batch.bin"]))


def _read(folder: Path, names: list[str]) -> Split:
    content = bytearray().join((folder / name).read_bytes() for name in names)
    records = torch.frombuffer(content, dtype=torch.uint8).reshape(-1, RECORD)
    images = records[:, 1:].to(torch.float32).div_(255).reshape(-1, *SHAPE)
    return Split(images, records[:, 0].to(torch.int64))
