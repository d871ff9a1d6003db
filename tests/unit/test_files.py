"""Files are written whole, and never through a link that someone else has put there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from gradcost.core.files import locked, write_whole
from gradcost.results import ledger


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
