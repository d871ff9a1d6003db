"""Data sets that the package does not contain: fetched once into the user's cache folder, verified at every use.

Only `fetch` uses the network; importing and training do not. `fetch` needs the extra `gradcost[tasks]`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from gradcost.core.errors import MissingExtra
from gradcost.tasks.dataset import Dataset as Dataset
from gradcost.tasks.sources import DataError, Source, checksum


def fetch(dataset: Dataset, progress: Callable[[str], None] = lambda line: None) -> Path:
    """Download the files of a data set into the cache; do nothing if the verified files are already there.

    - The sources are tried in order. Each one writes to a temporary folder, next to the final one.
    - Once every file has the right MD5, each is moved to the final folder by an atomic rename.
    - A failed or interrupted download leaves the cache unchanged.

    Args:
        dataset: the data set, such as `MNIST`.
        progress: called with a line of text before and after each source is tried.
    Returns:
        The folder with the files.
    Raises:
        DataError: every source failed, or the cache folder cannot be written. If every source failed, the message
            lists the reasons, and the files to download by hand and where to put them.
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
                reason = _download(source, dataset, Path(scratch))
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

    This reads every file once (MNIST, 55 MB: about 0.1 s) and does not use the network.

    Args:
        dataset: the data set, such as `MNIST`.
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
    """Return what is wrong with the first missing or damaged file; None if all files are right."""
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


def _download(source: Source, dataset: Dataset, scratch: Path) -> str | None:
    """Download from one source into `scratch`; return the reason if that failed, else None."""
    try:
        source.fetch(scratch)
    except (DataError, MissingExtra, OSError) as error:
        return str(error)
    return _problem(dataset, scratch)


def _move(dataset: Dataset, scratch: Path, folder: Path) -> None:
    # Move file by file: a folder cannot be replaced atomically, and the user may have other files in it.
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
