"""Files are written whole, and never through a link that someone else has put there."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_records import write_folder

from gradcost import SGD, Key, mezo, train
from gradcost.core.errors import BadInput
from gradcost.core.files import cache_folder, locked, read_regular, write_whole
from gradcost.results import ledger
from gradcost.results.status import status
from gradcost.tasks.digits import Digits
from gradcost.training import StepLog, read_log
from in_process import inside


def test_a_file_is_replaced_whole_and_nothing_else_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_whole(tmp_path / "sub" / "file", "old")
    assert path.read_text() == "old"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_whole(path, b"new")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
    assert write_whole(path, b"new").read_text() == "new"


def test_a_link_with_the_name_of_the_temporary_file_is_not_followed(tmp_path: Path):
    target = tmp_path / "precious"
    target.write_text("precious")
    (tmp_path / f".file.{os.getpid()}").symlink_to(target)
    write_whole(tmp_path / "file", "new")
    assert (target.read_text(), (tmp_path / "file").read_text()) == ("precious", "new")
    assert not (tmp_path / "file").is_symlink()


def test_a_device_is_written_and_not_replaced(tmp_path: Path):
    """As root in a container, `report -o /dev/null` replaced the device by a file."""
    reader, writer = os.openpty()
    device = Path(os.ttyname(writer))
    write_whole(device, "x")
    assert os.read(reader, 1) == b"x"
    assert not device.is_file()
    for descriptor in (reader, writer):
        os.close(descriptor)


@pytest.mark.parametrize("name", ["lock", "records.jsonl"])
def test_a_link_in_a_results_folder_from_elsewhere_changes_no_other_file(tmp_path: Path, name: str):
    """Before, the first command in such a folder replaced the content of the file that its lock led to."""
    target, folder = tmp_path / "precious", tmp_path / "results"
    target.write_text("precious")
    folder.mkdir()
    (folder / name).symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"), locked(folder):
        ledger.append(folder, {"kind": "trial"})
    assert target.read_text() == "precious"


@pytest.mark.parametrize("content", [b"abc", b"1 2", b"\xff", b"5" * 5000, b"", b"-3", "²".encode()])
def test_a_lock_without_a_process_id_belongs_to_another_process(tmp_path: Path, content: bytes):
    folder = write_folder(tmp_path / "st")
    (folder / "lock").write_bytes(content)
    with (folder / "lock").open() as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        ran = inside("status", "st", folder=tmp_path)
        assert ran.returncode == 0
        assert "another process works on it" in ran.stdout
        with pytest.raises(BadInput, match="st is in use by another process: wait for it"), locked(folder):
            pass
    assert "no process works on it" in inside("status", "st", folder=tmp_path).stdout


def within(seconds: float, call: Callable[[], object]) -> object:
    """Return what `call` returns. A call that waits for ever fails the test."""
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, "it hangs"
    return results[0]


def test_a_fifo_is_refused_and_never_waited_for(tmp_path: Path):
    fifo, other = tmp_path / "fifo", write_folder(tmp_path / "st")
    os.mkfifo(fifo)

    def refusal(call: Callable[[Path], object]) -> str:
        with pytest.raises(BadInput) as told:
            call(fifo)
        return str(told.value)

    def append(path: Path) -> None:
        folder = tmp_path / "records"
        folder.mkdir()
        os.rename(path, folder / "records.jsonl")
        try:
            ledger.append(folder, {"kind": "trial"})
        finally:
            os.rename(folder / "records.jsonl", path)

    for call in (read_regular, read_log, append):
        said = within(10, lambda call=call: refusal(call))
        assert "is not a regular file, but a FIFO" in str(said)
    assert "FIFO or a socket that no process reads" in str(within(10, lambda: refusal(lambda p: write_whole(p, "x"))))
    for name in ("lock", "trials/x/checkpoint"):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(other / name)
    with pytest.raises(BadInput, match=r"lock is not a regular file"), locked(other):
        pass
    assert "lock is not a regular file" in str(within(10, lambda: refusal(lambda _: status(other))))
    (other / "lock").unlink()
    found: Any = within(10, lambda: status(other))
    assert [(each.trial, each.step) for each in found.kept] == [("x", None)]


def test_a_fifo_that_a_process_reads_is_written(tmp_path: Path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    content: list[bytes] = []
    reader = threading.Thread(target=lambda: content.append(fifo.read_bytes()), daemon=True)
    reader.start()
    for _ in range(500):
        try:
            write_whole(fifo, b"x" * 100_000)
            break
        except BadInput:  # the reader has not opened it yet
            time.sleep(0.01)
    reader.join(10)
    assert content == [b"x" * 100_000]


def test_replay_refuses_weights_that_are_no_regular_file(tmp_path: Path):
    (tmp_path / "my.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(2, 2)\n")
    for _ in train(Digits(batch=16), mezo(), SGD(0.01), Key(1), 1, log=StepLog(tmp_path / "log")):
        pass
    os.mkfifo(tmp_path / "fifo")
    ran: Any = within(
        20, lambda: inside("replay", "log", "--weights", "fifo", "--model", "my.py:make", "-o", "w", folder=tmp_path)
    )
    assert (ran.returncode, ran.stderr) == (2, "gradcost: fifo is not a regular file: give a file of weights.\n")


def test_a_cache_folder_in_a_home_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRADCOST_CACHE", "~there-is-no-such-user/x")
    with pytest.raises(BadInput, match="GRADCOST_CACHE is ~there-is-no-such-user/x, the home folder"):
        cache_folder()
