"""Files and folders: atomic writes, and the cache folder."""

from __future__ import annotations

import os
from pathlib import Path

from gradcost.core.errors import MissingExtra


def write_whole(path: Path, data: bytes | str) -> Path:
    """Write a file atomically: a reader sees the complete old file or the complete new one, even after a crash.

    Args:
        path: the file to write. Missing parent folders are created.
        data: the content; text is written as UTF-8.
    Returns:
        `path`.
    Raises:
        OSError: the file cannot be written; the old file is unchanged.
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
    """Return the folder for data sets and calibrations.

    It is the value of the environment variable `GRADCOST_CACHE`. If the variable is not set, it is the folder
    "gradcost" in the operating system's user cache; pooch knows its path.

    Raises:
        MissingExtra: `GRADCOST_CACHE` is not set and pooch is not installed.
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
