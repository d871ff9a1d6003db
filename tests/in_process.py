"""The command line in the process of the tests, where torch is already imported."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from gradcost.cli import console
from gradcost.cli.main import app

WIDE = {"COLUMNS": "200"}  # typer wraps its messages at the width of the terminal
console.out.width = 240  # as in a pipe: pytest-xdist sets COLUMNS, which the console reads when it is imported


def inside(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `gradcost ARGUMENTS` with `folder` as the working directory, for tests of what a command does.

    Its workers are forked from a process that all tests of this process share. A test of signals or of a killed
    parent needs a process of its own.

    Returns:
        The result in the form of `subprocess.run`. An exception that a real process would show as a traceback is
        raised.
    """
    for name in [name for name in sys.modules if name.startswith("gradcost_user_")]:
        del sys.modules[name]  # a user's file that another test imported
    with contextlib.chdir(folder):
        ran = CliRunner().invoke(app, arguments, env=WIDE)
    if not isinstance(ran.exception, SystemExit | None):
        raise ran.exception
    return subprocess.CompletedProcess(arguments, ran.exit_code, ran.stdout, ran.stderr)
