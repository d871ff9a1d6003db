"""Files of something else under the names of ours, and outputs onto files that are read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gradcost.cli.reproduction import write_page
from gradcost.core.errors import BadInput
from gradcost.papers.panchal2025.cost import FILE, _end_with_a_whole_line, read_costs
from gradcost.results.ledger import refuse_own
from gradcost.studies.user_code import load_file
from in_process import inside

SMALL = ("--task", "digits", "--steps", "2", "--seeds", "1", "--tuning-points", "1", "--extra-points", "0")
COMPARE = ("compare", *SMALL, "--confirm-seeds", "0", "--method", "backprop()", "-j", "1", "-o", "v")


@pytest.mark.parametrize("name", ["environment.json", "records.jsonl", "lock"])
def test_a_folder_with_files_of_something_else_is_refused(tmp_path: Path, name: str):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / name).write_text('{"mine": 1}\n')
    ran = inside(*COMPARE, folder=tmp_path)
    assert ran.returncode == 2
    assert "choose another folder" in " ".join(ran.stderr.split())
    assert (tmp_path / "v" / name).read_text() == '{"mine": 1}\n'


@pytest.mark.parametrize("name", ["records.jsonl", "study.json", "costs.jsonl", "weights.safetensors", "mine.py"])
def test_no_page_replaces_a_file_that_is_read(tmp_path: Path, name: str):
    (tmp_path / name).write_text("precious")
    with pytest.raises(BadInput, match="give another name"):
        refuse_own(tmp_path / "other", tmp_path / name)
    with pytest.raises(BadInput, match="give another name"):
        write_page(tmp_path / name, "page")
    assert (tmp_path / name).read_text() == "precious"
    write_page(tmp_path / "new" / "page.md", "page")
    write_page(tmp_path / "new" / "page.md", "again")
    assert (tmp_path / "new" / "page.md").read_text() == "again"


def test_a_fifo_as_page_or_example_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "f.py")
    assert inside("init", "f.py", "--force", folder=tmp_path).returncode == 2
    os.mkfifo(tmp_path / "page")
    with pytest.raises(BadInput):
        write_page(tmp_path / "page", "page")


def test_an_example_does_not_follow_a_link(tmp_path: Path):
    (tmp_path / "l.py").symlink_to(tmp_path / "elsewhere.py")
    assert inside("init", "l.py", folder=tmp_path).returncode == 2
    assert not (tmp_path / "elsewhere.py").exists()


def test_forecasts_are_not_rewritten_and_foreign_ones_are_kept(tmp_path: Path):
    path = tmp_path / FILE
    path.write_bytes(b"precious, no newline")
    with pytest.raises(BadInput, match="not a file of forecasts"):
        _end_with_a_whole_line(path)
    assert path.read_bytes() == b"precious, no newline"
    path.write_bytes(b'{"a": 1}\n{"b"')
    _end_with_a_whole_line(path)
    assert path.read_bytes() == b'{"a": 1}\n'
    changed = path.stat().st_ino
    _end_with_a_whole_line(path)
    assert path.stat().st_ino == changed


@pytest.mark.parametrize(
    "line", [b"\xff\xfe\n", b'{"peak":' + b"[" * 5000 + b"1" + b"]" * 5000 + b"}\n"], ids=["bytes", "deep"]
)
def test_a_damaged_line_of_forecasts_is_a_sentence(tmp_path: Path, line: bytes):
    (tmp_path / FILE).write_bytes(line)
    with pytest.raises(BadInput, match="line 1"):
        read_costs(tmp_path)


def test_two_files_of_one_name_are_refused(tmp_path: Path):
    """Before, the second one was the first: a training took the model of another file."""
    for folder in ("p", "q"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same_name_of_two.py").write_text(f"A = {folder!r}\n")
    first = str(tmp_path / "p" / "same_name_of_two.py")
    assert load_file(first).A == load_file(first).A == "p"
    with pytest.raises(BadInput, match="rename one of them"):
        load_file(str(tmp_path / "q" / "same_name_of_two.py"))
