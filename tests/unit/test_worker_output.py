"""What trials print goes to a file for each trial, and their warnings are counted once."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import gradcost
from gradcost import mezo
from gradcost.core.value import value
from gradcost.studies import events
from gradcost.studies.output import OUTPUT, warned
from gradcost.tasks import Digits
from gradcost.tasks.task import Batch

LINES = """\
/home/me/my.py:10: FutureWarning: this loader is slow
  warnings.warn("this loader is slow", FutureWarning)
a line that says Warning: without a place
"""


def written(folder: Path, trial: str, text: str) -> None:
    (folder / OUTPUT).mkdir(exist_ok=True)
    (folder / OUTPUT / f"{trial}.txt").write_text(text)


def test_equal_warnings_of_many_trials_are_one(tmp_path: Path):
    assert warned(tmp_path, ["a"]) is None
    written(tmp_path, "a", LINES)
    written(tmp_path, "b", LINES + LINES + "<string>:1: UserWarning: another\n")
    written(tmp_path, "c", "progress 10%\n")
    written(tmp_path, "d", LINES)
    found = warned(tmp_path, ["a", "b", "c", "missing"])
    assert found is not None
    assert (found.warnings, found.trials) == (2, 2)
    assert found.example == "FutureWarning: this loader is slow"
    assert found.folder == tmp_path / OUTPUT


def test_a_link_and_bytes_that_are_no_text_do_no_harm(tmp_path: Path):
    written(tmp_path, "a", LINES)
    (tmp_path / OUTPUT / "b.txt").symlink_to(tmp_path / OUTPUT / "a.txt")
    (tmp_path / OUTPUT / "c.txt").write_bytes(b"\xff\xfe: UserWarning: \x1b[31mred\n")
    assert warned(tmp_path, ["b"]) is None
    found = warned(tmp_path, ["c"])
    assert found is not None


def test_a_process_prints_to_a_file_with_its_children_and_a_silent_one_leaves_none(tmp_path: Path):
    code = (
        "import os, subprocess, sys, warnings\nfrom pathlib import Path\n"
        "from gradcost.studies.output import remove_if_empty, to_file\n"
        f"path = Path({str(tmp_path / OUTPUT / 'a.txt')!r})\nto_file(path)\n"
        "remove_if_empty(path)\nassert not path.exists()\nto_file(path)\n"
        "print('one')\nwarnings.warn('two')\nsubprocess.run(['echo', 'three'])\nremove_if_empty(path)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("", "")
    text = (tmp_path / OUTPUT / "a.txt").read_text()
    assert text.startswith("one\n")
    assert "UserWarning: two\n" in text
    assert text.endswith("three\n")


@value
class Noisy(Digits):
    """Digits that print and warn."""

    def batch_at(self, key: Any, step: int) -> Batch:
        if step == 3:
            print("a line of the task")
            warnings.warn("a warning of the task", FutureWarning, stacklevel=1)
        return super().batch_at(key, step)


@pytest.mark.slow
def test_a_comparison_of_a_noisy_task_prints_nothing_and_counts(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    seen: list[events.Event] = []
    settings: Any = {"steps": 5, "seeds": 1, "tuning_points": 2, "extra_points": 0, "confirm_seeds": 0, "workers": 1}
    gradcost.compare(Noisy(), [mezo()], folder=tmp_path / "r", on_event=seen.append, **settings)
    printed = capfd.readouterr()
    assert "of the task" not in printed.out + printed.err
    (event,) = [event for event in seen if isinstance(event, events.TrialsWarned)]
    assert (event.warned.trials, event.warned.warnings) == (3, 1)
    assert event.warned.example == "FutureWarning: a warning of the task"
    texts = [path.read_text() for path in (tmp_path / "r" / OUTPUT).iterdir()]
    assert len(texts) == 3
    assert all(text.startswith("a line of the task\n") for text in texts)
