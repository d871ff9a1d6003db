"""Wrong inputs of a first visit to the command line, each with its sentence and exit code."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape
from report_records import write_folder

from gradcost import Key, Reverse
from gradcost.checkpointing import Blocks
from gradcost.cli import spec
from gradcost.core.errors import BadInput
from gradcost.core.files import write_whole
from gradcost.core.value import value
from gradcost.planning.within import Within
from gradcost.results.records import read
from gradcost.results.status import notes_on
from gradcost.studies import environment
from gradcost.studies.folder import make_folder
from gradcost.tasks import Digits
from gradcost.tasks.task import Split, Splits
from in_process import inside


def test_the_package_can_be_run():
    ran = subprocess.run([sys.executable, "-m", "gradcost", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("gradcost ")


def test_a_row_of_a_plan_can_be_passed_as_a_method():
    assert spec.method("Within(8GiB)") == Reverse(Within(8 << 30))
    assert spec.method("Reverse(saving=Within(1.5MB))") == Reverse(Within(1_500_000))
    assert spec.method("Blocks()") == Reverse(Blocks())
    with pytest.raises(BadInput, match="is not an expression like"):
        spec.method("Within(8GiBs)")


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(
        BadInput, match=r"file cannot be a results folder \(it is a file\): choose another one .*-o DIR"
    ):
        make_folder(tmp_path / "file")
    with pytest.raises(BadInput, match=r"cannot be a results folder \(Not a directory\)"):
        make_folder(tmp_path / "file" / "below")
    ran = inside("compare", "--steps", "5", "--method", "backprop()", "-o", "file", folder=tmp_path)
    assert ran.returncode == 2
    assert "file cannot be a results folder (it is a file)" in ran.stderr


def test_a_file_that_cannot_be_written_is_named_without_a_temporary_one():
    with pytest.raises(OSError, match=r"'/proc/x.html'$"):
        write_whole(Path("/proc/x.html"), "")


def test_a_report_of_damaged_or_missing_records_says_so(tmp_path: Path):
    records = write_folder(tmp_path / "r") / "records.jsonl"
    assert notes_on(read(tmp_path / "r")) is None
    lines = records.read_text().splitlines()
    lines[2] = lines[2][: len(lines[2]) // 2]
    records.write_text("\n".join(lines) + "\n")
    assert notes_on(read(tmp_path / "r")) == "1 damaged line of records.jsonl skipped; such a trial runs again."
    records.write_text("")
    assert notes_on(read(tmp_path / "r")) == "the folder has no trial on record."
    ran = inside("report", "r", folder=tmp_path)
    assert (ran.returncode, ran.stdout.strip()) == (0, "r/report.html")
    assert "the folder has no trial on record." in ran.stderr


@value
class Empty(Digits):
    """Digits without training data."""

    def splits(self) -> Splits:
        train, *others = super().splits()
        return Splits(Split(train.x[:0], train.y[:0]), *others)


def test_the_memory_of_compare_is_named(tmp_path: Path):
    ran = inside("compare", "--memory", "10KiB", "--dry-run", folder=tmp_path)
    assert ran.returncode == 2
    assert "write --memory-beyond-weights 10KiB, without parameters, buffers and batch" in ran.stderr
    ran = inside("compare", "--memory-beyond-weights", "10KiB", "--dry-run", folder=tmp_path)
    assert ran.returncode == 4
    assert "36,136 bytes are parameters, buffers and batch" in ran.stderr  # 46,376 - 10 KiB


def test_a_page_that_cannot_be_written_there_is_an_error_of_input(tmp_path: Path):
    write_folder(tmp_path / "r")
    ran = inside("report", "r", "-o", "/proc/x.html", folder=tmp_path)
    assert ran.returncode == 2
    assert "/proc/x.html cannot be written (No such file or directory): choose another file (-o FILE)" in ran.stderr


def test_a_function_without_arguments_makes_a_batch(tmp_path: Path):
    source = """
        import torch
        def make():
            return torch.nn.Linear(3, 2)
        def batch():
            return torch.zeros(5, 3), torch.zeros(5, dtype=torch.long)
    """
    (tmp_path / "my.py").write_text(textwrap.dedent(source))
    command = ("plan", "--model", "my.py:make", "--data", "my.py:batch", "--memory", "1MiB")
    assert "batch 5" in inside(*command, folder=tmp_path).stdout


def test_a_note_is_one_line(tmp_path: Path):
    code = "import warnings; from gradcost.core.note import Note; from gradcost.cli import main; "
    code += "main.app = lambda **_: warnings.warn('mind this', Note); main.main()"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr == "note: mind this\n"


def test_the_page_names_the_date_the_machine_and_the_command(tmp_path: Path):
    quick = ("--points", "1", "--more", "0", "--confirm", "0", "--seeds", "1", "--steps", "3")
    assert inside("compare", *quick, "--method", "backprop()", "-o", "r", folder=tmp_path).returncode == 0
    environment = read(tmp_path / "r").environment
    page = (tmp_path / "r" / "report.html").read_text()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", str(environment["started"]))
    assert all(str(escape(environment[name])) in page for name in ("started", "command", "cpu"))


def test_torchs_own_warnings_are_not_those_of_a_forward_gradient():
    """torch 2.14 issued ten of them in each process, at the first dual tensor."""
    code = (
        "import torch, gradcost\n"
        "model = torch.nn.Linear(3, 1)\n"
        "objective = gradcost.Objective(model, lambda model, batch: model(batch).square().mean())\n"
        "gradcost.forward_gradient().estimate(objective, torch.ones(2, 3), gradcost.Key(0))\n"
    )
    ran = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True)
    assert "torch.jit.script" not in ran.stderr


def test_an_empty_training_split_is_a_sentence():
    with pytest.raises(BadInput, match="the train split of Empty has no examples: it needs one or more"):
        Empty().batch_at(Key(0), 0)


def test_an_installation_without_numba_measures_something_else_and_continues_no_folder(
    monkeypatch: pytest.MonkeyPatch,
):
    """Without numba, `mezo()` needs four times the memory: the same folder would hold two kinds of figures."""
    assert any(re.match("numba[>=]", each) for each in project()["dependencies"])
    before = environment.fingerprint.__wrapped__()
    monkeypatch.setattr(environment, "has_fused_path", lambda: False)
    assert environment.fingerprint.__wrapped__() != before


def project() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
