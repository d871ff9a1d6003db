"""Closed standard streams, and settings of the terminal that are no numbers, are no tracebacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from report_records import write_folder

from gradcost.cli import main

CLOSED = "gradcost: standard output is closed, so no result can be shown: send it to a file.\n"
COMMAND = f"{sys.executable} -m gradcost"
# A script that runs one trial in a worker process, and writes the record's status to a file.
SCRIPT = """
import sys
from pathlib import Path
from gradcost import SGD, Trial, backprop
from gradcost.studies.executors import Local
from gradcost.studies.processes import Work
from gradcost.tasks.digits import Digits

folder = Path(sys.argv[1])
(record,) = Local(1).perform([Trial(Digits(), "b", backprop(), SGD(0.1), 2)], Work("code", folder))
(folder / "status").write_text(f"{record['status']} {record.get('reason')}")
"""


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | environment
    return subprocess.run(
        ["sh", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("option", ["", "--json"])
def test_a_result_that_cannot_be_shown_is_refused(tmp_path: Path, option: str):
    write_folder(tmp_path / "st")
    ran = shell(f"{COMMAND} status st {option} >&-", tmp_path)
    assert (ran.returncode, ran.stderr) == (2, CLOSED)


def test_other_closed_streams_do_not_matter(tmp_path: Path):
    write_folder(tmp_path / "st")
    ran = shell(f"{COMMAND} status st --json 2>&- <&-", tmp_path)
    assert ran.returncode == 0
    assert json.loads(ran.stdout)["folder"] == "st"


@pytest.mark.slow
def test_a_worker_of_a_script_with_closed_streams_runs_its_trial(tmp_path: Path):
    """Before, each trial failed: its process exited with code 1."""
    (tmp_path / "script.py").write_text(SCRIPT)
    shell(f"{sys.executable} script.py . <&- >&- 2>&-", tmp_path)
    assert (tmp_path / "status").read_text() == "finished None"


def test_a_closed_stream_leaves_its_number_to_no_other_file(tmp_path: Path):
    code = "import os, sys; from gradcost.core.streams import open_closed_streams; names = open_closed_streams(); "
    code += "print(*sorted(names), *map(os.get_inheritable, range(3)), os.fstat(0) == os.fstat(1) == os.fstat(2), "
    code += "open_closed_streams(), file=open('said', 'w'))"
    ran = shell(f'{sys.executable} -c "{code}" <&- >&- 2>&-', tmp_path)
    assert ran.returncode == 0
    assert (tmp_path / "said").read_text() == "stderr stdin stdout True True True True set()\n"


@pytest.mark.parametrize("text", ["²", "abc", "", "0", "-5", "9" * 5000])
def test_a_width_that_is_no_number_is_left_out(monkeypatch: pytest.MonkeyPatch, text: str):
    for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH"):
        monkeypatch.setenv(name, text)
    main._without_bad_widths()
    assert {"COLUMNS", "LINES", "TERMINAL_WIDTH"}.isdisjoint(os.environ)
    monkeypatch.setenv("COLUMNS", "110")
    main._without_bad_widths()
    assert os.environ["COLUMNS"] == "110"


def test_a_command_shows_its_answer_whatever_the_width(tmp_path: Path):
    write_folder(tmp_path / "st")
    ran = shell(f"{COMMAND} status st", tmp_path, COLUMNS="²", LINES="²", TERMINAL_WIDTH="²")
    assert ran.returncode == 0
    assert "st   no process works on it" in ran.stdout


def test_a_folder_for_temporary_files_with_a_long_path_is_named(tmp_path: Path):
    """Only a process that has no server of workers yet makes the socket."""
    long = tmp_path / ("x" * 120)
    long.mkdir()
    (tmp_path / "script.py").write_text(SCRIPT)
    ran = shell(f"{sys.executable} script.py .", tmp_path, TMPDIR=str(long))
    assert (
        f"BadInput: the folder for temporary files has a path that is too long for a socket: {long}. Set TMPDIR"
        in (ran.stderr).replace("gradcost.core.errors.", "")
    )
