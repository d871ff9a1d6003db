"""Files and folders: atomic writes, and the cache folder."""

from __future__ import annotations

import os
from pathlib import Path

from gradcost.core.errors import MissingExtra


def write_whole(path: Path, data: bytes | str) -> Path:
    """Write a file atomically: a reader sees the complete old file or the complete new one, also after a crash.

    Args:
        path: the file. A missing folder is created.
        data: the content; text is written as UTF-8.
    Returns:
        `path`.
    Raises:
        OSError: the disk refuses; the old file is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def cache_folder() -> Path:
    """Return the folder for data sets and calibrations: `GRADCOST_CACHE` if it is set, else the platform's cache.

    Raises:
        MissingExtra: `GRADCOST_CACHE` is not set, and pooch, which finds the platform's cache, is not installed.
    """
    if folder := os.environ.get("GRADCOST_CACHE"):
        return Path(folder).expanduser().absolute()
    try:
        import pooch
    except ImportError as error:
        raise MissingExtra(
            'The cache folder needs pooch, which is not installed: pip install "gradcost[tasks]", or set '
            "GRADCOST_CACHE to a folder."
        ) from error
    return Path(pooch.os_cache("gradcost"))
