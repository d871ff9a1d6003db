"""MNIST from the four raw IDX files in the cache (`gradcost data fetch mnist`)."""

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

TRAIN = 50_000


@value
class Mnist(Task):
    """MNIST: x [N, 1, 28, 28] float32 in [0, 1], y [N] of 10 classes.

    The first 50,000 of the official training images train, the last 10,000 of them validate, the official
    10,000 test. Source: LeCun, Bottou, Bengio, Haffner (1998).
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
    # a bytearray, because torch warns about a view of bytes that cannot be written
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8, offset=header)
