"""What is missing on Windows is not needed: every module is imported, and a comparison runs, without it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gradcost

# What Windows does not have is removed from each process before gradcost is imported.
MODULES = ("fcntl", "grp", "pty", "pwd", "resource", "termios", "tty")
OS = ("setpgid", "setsid", "getpgid", "getpgrp", "getuid", "geteuid", "killpg", "set_blocking", "getloadavg", "uname")
OS += ("sched_getaffinity", "sched_setaffinity", "mkfifo", "nice", "sysconf", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC")
SIGNAL = ("SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "SIGPIPE", "alarm", "setitimer")
# They are not removed: a simulated comparison needs them, because its Python starts and ends processes by them.
USED_BY_PYTHON = ("fork", "waitpid", "SIGKILL", "pthread_sigmask")
WINDOWS = f"""
import multiprocessing, os, signal, sys
import filelock, psutil, torch  # their versions for Linux need what Linux has
for name in {MODULES!r}:
    sys.modules[name] = None
for module, names in ((os, {OS!r}), (signal, {SIGNAL!r})):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
multiprocessing.get_all_start_methods = lambda: ["spawn"]
sys.modules["msvcrt"] = None
"""
LONG = ("gradcost.integrations.transformers", "gradcost.integrations.four_bit")  # they import transformers
WITH_TRITON = ("gradcost.noise.gpu",)
IMPORT_ALL = f"""{WINDOWS}
import importlib, pkgutil, gradcost
for module in pkgutil.walk_packages(gradcost.__path__, "gradcost."):
    if not module.name.endswith("__main__") and module.name not in {LONG + WITH_TRITON!r}:
        importlib.import_module(module.name)
"""
SOURCE = Path(gradcost.__file__).parent


def test_every_module_is_imported_without_what_only_unix_has():
    ran = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def is_guarded(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a branch asks with `hasattr` or a constant made by `getattr`, or a `try` expects that it is missing."""
    while (parent := parents.get(node)) is not None:
        is_condition = isinstance(parent, ast.If | ast.IfExp | ast.BoolOp)
        if is_condition and re.search(r"hasattr\(|\b_NO_WAIT\b", ast.unparse(getattr(parent, "test", parent))):
            return True
        if isinstance(parent, ast.Try) and any("Error" in ast.unparse(each.type or each) for each in parent.handlers):
            return True
        node = parent
    return False


def unguarded(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    only_unix, found = {*OS, *SIGNAL, *USED_BY_PYTHON}, []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found += [(node, name.name) for name in names if name.name in MODULES]
            case ast.ImportFrom(module=str(module)):
                found += [(node, module)] if module in MODULES else []
            case ast.Attribute(value=ast.Name(id="os" | "signal"), attr=name) if name in only_unix:
                found.append((node, name))
            case ast.Constant(value=str(text)) if text.startswith("/proc/"):
                found.append((node, text))
    place = path.relative_to(SOURCE).as_posix()
    yield from (f"{place} {node.lineno}: {name}" for node, name in found if not is_guarded(node, parents))


def test_what_only_unix_has_is_used_where_a_test_guards_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert [each for path in sorted(SOURCE.rglob("*.py")) for each in unguarded(path)] == []
    monkeypatch.setitem(globals(), "SOURCE", tmp_path)
    wrong = 'import fcntl\nimport os\nos.killpg(1, 9)\nif hasattr(os, "fork"):\n    os.fork()\nopen("/proc/stat")\n'
    (tmp_path / "wrong.py").write_text(wrong)
    found = list(unguarded(tmp_path / "wrong.py"))
    assert found == [
        "wrong.py 1: fcntl",
        "wrong.py 3: killpg",
        "wrong.py 6: /proc/stat",
    ]


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
