"""Read the IDX files of MNIST and of the data sets in its format."""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from gradcost.tasks.sources import DataError
from gradcost.tasks.task import Split, Splits

UNSIGNED_BYTES = 8  # the code of the element type


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of unsigned bytes: two zero bytes, the type, the number of sizes, the sizes, the elements.

    Args:
        path: the file.
    Returns:
        uint8, with the shape that the file states.
    Raises:
        DataError: the file is not an IDX file of unsigned bytes.
    Source: LeCun, Cortes and Burges, "The MNIST database".
    """
    content = bytearray(path.read_bytes())  # a bytearray is writable; torch warns about read-only bytes
    sizes = content[3] if len(content) > 3 else 0
    start = 4 + 4 * sizes
    if len(content) < start or content[:3] != bytes([0, 0, UNSIGNED_BYTES]):
        raise DataError(f"{path.name} is not an IDX file of unsigned bytes")
    shape = struct.unpack(f">{sizes}I", content[4:start])
    if len(content) - start != prod(shape):
        raise DataError(f"{path.name} has {len(content) - start} elements, but its header states {shape}")
    return torch.frombuffer(content, dtype=torch.uint8, offset=start).reshape(shape)


def image_splits(folder: Path, train: int) -> Splits:
    """Read a data set of gray images with the file names of MNIST.

    Args:
        folder: the folder of the four files.
        train: number of official training images for training; the others are for validation.
    Returns:
        Splits. x: float32 in [0, 1], shape (N, 1, height, width). y: int64, shape (N,).
    """
    (images, labels), test = (_images(folder, part) for part in ("train", "t10k"))
    return Splits(Split(images[:train], labels[:train]), Split(images[train:], labels[train:]), test)


def _images(folder: Path, part: str) -> Split:
    images = read_idx(folder / f"{part}-images-idx3-ubyte").unsqueeze(1).to(torch.float32).div_(255)
    return Split(images, read_idx(folder / f"{part}-labels-idx1-ubyte").to(torch.int64))
