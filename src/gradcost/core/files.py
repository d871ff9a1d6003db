"""Files and folders: atomic writes, and the cache folder."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from gradcost.core.errors import MissingExtra


def write_whole(path: Path, data: bytes | str) -> Path:
    """Write a file atomically: a reader sees the complete old file or the complete new one, even after a crash.

    The complete file survives a power failure, too: the file and its folder are synced. A device, such as /dev/null,
    is written and not replaced.

    Args:
        path: the file to write. Missing parent folders are created.
        data: the content; text is written as UTF-8.
    Returns:
        `path`.
    Raises:
        OSError: the file cannot be written; the old file is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = data.encode() if isinstance(data, str) else data
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return path
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)  # a killed process with the same id left it, or someone else a link
    try:
        with temporary.open("xb") as file:  # "x" does not follow a link
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # name the file, not the temporary one
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
    _sync_folder(path.parent)
    return path


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some network file systems cannot, and some folders cannot be read
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def no_link(path: str, flags: int) -> int:
    """Open a file, as the `opener` of `open`. A symbolic link raises OSError: a link could lead out of the folder."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


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
