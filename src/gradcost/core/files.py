"""Files and folders: atomic writes, and the cache folder."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from gradcost.core.errors import BadInput, MissingExtra


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
        BadInput: the file is a FIFO that no process reads.
        OSError: the file cannot be written; the old file is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = data.encode() if isinstance(data, str) else data
    if path.exists() and not path.is_file():
        _write_through(path, content)
        return path
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return path


_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # Windows has neither this flag nor FIFOs in folders

# Errors of a path that the user has chosen, not of the machine.
_WRONG_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENAMETOOLONG)


def write_chosen(path: Path, data: bytes | str) -> Path:
    """Write a file like `write_whole`; a path where no file can be is an error of input.

    Raises:
        BadInput: no file can be written there.
        OSError: the machine failed; the old file is unchanged.
    """
    try:
        return write_whole(path, data)
    except OSError as error:
        if error.errno not in _WRONG_PATH:
            raise
        raise BadInput(f"{path} cannot be written ({error.strerror}): choose another file (-o FILE).") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`. It replaces `path` at the end of the context, if nothing is raised.

    Law: as `write_whole`, for code that writes a file itself. The file has the permissions of any new file.

    Args:
        path: the file to write. Missing parent folders are created.
    Raises:
        BadInput: `path` exists and is no file, such as a folder or a device.
        OSError: the file cannot be written; the old file is unchanged.
    """
    if path.exists() and not path.is_file():
        raise BadInput(f"{path} is a {'folder' if path.is_dir() else 'device'}, and no file: give another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)  # a killed process with the same id left it, or someone else a link
    try:
        with temporary.open("xb") as file:  # "x" does not follow a link
            permissions = os.fstat(file.fileno()).st_mode
        yield temporary
        os.chmod(temporary, permissions)  # the context may have replaced the file
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # name the file, not the temporary one
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
    _sync_folder(path.parent)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder, so that one process writes there at a time. The lock is released when the process ends.

    Raises:
        BadInput: another process has locked the folder, and the message contains its process id; or the lock is not
            a regular file.
        OSError: the folder cannot be written, or its lock is a symbolic link.
    """
    with open(folder / "lock", "ab+", opener=no_link) as file:
        if not try_lock(file):
            pid = holder(file)
            user = f"process {pid}" if pid else "another process"
            raise BadInput(
                f"{folder} is in use by {user}: wait for it, or choose another folder (on the command line: -o DIR)."
            ) from None
        file.seek(0)
        if (text := file.read(64).strip(b"\0\n ")) and not process_id(text):
            raise BadInput(f"{folder / 'lock'} is not a lock of gradcost: move it away, or choose another folder.")
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        file.flush()
        yield


def _write_through(path: Path, content: bytes) -> None:
    """Write a device, or a FIFO that a process reads."""
    try:
        descriptor = os.open(path, os.O_WRONLY | _NO_WAIT)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise BadInput(
                f"{path} is a FIFO or a socket that no process reads: write another file, or start its reader first."
            ) from None
        raise
    if _NO_WAIT:
        os.set_blocking(descriptor, True)
    with open(descriptor, "wb") as file:
        file.write(content)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some network file systems cannot, and some folders cannot be read
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def regular(path: str, flags: int) -> int:
    """Open a regular file, as the `opener` of `open`.

    Raises:
        BadInput: it is a FIFO, a socket or a device, which may never have anything to read.
        OSError: the file cannot be opened.
    """
    refusal = BadInput(f"{path} is not a regular file, but a FIFO, a socket or a device: remove it, or name a file.")
    try:
        descriptor = os.open(path, flags | _NO_WAIT, 0o666)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a FIFO that no process reads
            raise refusal from None
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # `open` refuses a folder itself
        os.close(descriptor)
        raise refusal
    return descriptor


def no_link(path: str, flags: int) -> int:
    """Open a file like `regular`. A symbolic link raises OSError, too: a link could lead out of the folder."""
    return regular(path, flags | getattr(os, "O_NOFOLLOW", 0))


def read_regular(path: Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        BadInput: it is a FIFO, a socket or a device.
        OSError: the file cannot be read.
    """
    with open(path, "rb", opener=regular) as file:
        return file.read()


def try_lock(file: IO[bytes]) -> bool:
    """Lock an open file for this process, on any system; return False if another process has locked it."""
    from filelock import lock_descriptor  # imports asyncio, which takes a while

    return lock_descriptor(file.fileno(), blocking=False)


def holder(file: IO[bytes]) -> int:
    """Return the id of the process that has locked a file; 0 if unknown."""
    try:
        file.seek(0)
        return process_id(file.read())
    except OSError:  # on Windows, a locked file cannot be read
        return 0


def process_id(lock: bytes) -> int:
    """Return the process id that a lock file contains; 0 if it contains none."""
    text = lock.strip()
    return int(text) if text.isdigit() and len(text) < 20 else 0


def cache_folder() -> Path:
    """Return the folder for data sets and calibrations.

    It is the value of the environment variable `GRADCOST_CACHE`. If the variable is not set, it is the folder
    "gradcost" in the operating system's user cache; pooch knows its path.

    Raises:
        BadInput: `GRADCOST_CACHE` is below the home folder of a user who has none.
        MissingExtra: `GRADCOST_CACHE` is not set and pooch is not installed.
    """
    if folder := os.environ.get("GRADCOST_CACHE"):
        try:
            return Path(folder).expanduser().absolute()
        except RuntimeError:
            raise BadInput(
                f"GRADCOST_CACHE is {folder}, the home folder of a user who has none: set it to an absolute path."
            ) from None
    try:
        import pooch
    except ImportError as error:
        raise MissingExtra(
            'The cache folder needs pooch, which is not installed: pip install "gradcost[tasks]", or set '
            "GRADCOST_CACHE to a folder."
        ) from error
    return Path(pooch.os_cache("gradcost"))
