"""MNIST, read from four IDX files in the cache folder, which `gradcost data fetch mnist` downloads."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from gradcost.core.value import value
from gradcost.tasks import data
from gradcost.tasks.architectures import Architecture, Cnn, Mlp
from gradcost.tasks.task import Split, Splits, Task

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
    models: ClassVar[dict[str, Architecture]] = {"mlp": Mlp((1024, 1024)), "cnn": Cnn()}

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
    folder = data.verified(data.MNIST)
    images, labels = _read(folder, "train")
    train = Split(images[:TRAIN], labels[:TRAIN])
    validation = Split(images[TRAIN:], labels[TRAIN:])
    return Splits(train, validation, test=_read(folder, "t10k"))


def _read(folder: Path, part: str) -> Split:
    images = _idx(folder / f"{part}-images-idx3-ubyte", header=16).to(torch.float32).div_(255)
    labels = _idx(folder / f"{part}-labels-idx1-ubyte", header=8).to(torch.int64)
    return Split(images.reshape(-1, 1, 28, 28), labels)


def _idx(path: Path, header: int) -> Tensor:
    # A bytearray is writable; torch warns about read-only bytes.
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8, offset=header)
