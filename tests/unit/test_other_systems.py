"""What is missing on Windows is not needed: every module is imported, and a comparison runs, without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# What Windows does not have is removed from each process before gradcost is imported.
WINDOWS = """
import multiprocessing, os, signal, sys
import filelock, psutil, torch  # their versions for Linux need what Linux has
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("setpgid", "getpgrp", "killpg", "set_blocking", "sched_getaffinity", "O_NOFOLLOW", "O_NONBLOCK"):
    if hasattr(os, name):
        delattr(os, name)
delattr(signal, "SIGHUP")
multiprocessing.get_all_start_methods = lambda: ["spawn"]
sys.modules["msvcrt"] = None
"""
IMPORT_ALL = f"""{WINDOWS}
import importlib, pkgutil, gradcost
for module in pkgutil.walk_packages(gradcost.__path__, "gradcost."):
    if not module.name.endswith("__main__") and ".integrations." not in module.name:  # those take long
        importlib.import_module(module.name)
"""


def test_every_module_is_imported_without_what_only_unix_has():
    ran = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.slow
def test_a_comparison_runs_by_processes_that_are_spawned(tmp_path: Path):
    main = f"""{WINDOWS}
import fcntl_stand_in
from gradcost.cli.main import main
if __name__ == "__main__":
    main()
"""
    (tmp_path / "fcntl_stand_in.py").write_text("import filelock; filelock.lock_descriptor = lambda *_, **__: True\n")
    (tmp_path / "run.py").write_text(main)
    quick = ("--points", "1", "--more", "0", "--confirm", "0", "--seeds", "1", "--steps", "3")
    command = [sys.executable, "run.py", "compare", *quick, "--method", "backprop()", "-o", "r"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "backprop()" in ran.stdout
