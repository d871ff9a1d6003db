"""The environment of a study: package versions, the machine, and a fingerprint of the code that trials execute."""

from __future__ import annotations

import ast
import functools
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

import torch

from gradcost.core.evaluation.user_modules import PLUGINS, module_file
from gradcost.noise.add import has_fused_path
from gradcost.studies.user_code import origins

_SOURCE = Path(__file__).parents[2]  # the folder that contains the package
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

# Every trial runs the worker. Its task, estimator and optimizer are known only at run time, so all of them count.
_ENTRY_POINTS = ("studies/worker.py", "estimators/*.py", "training/*.py", "tasks/*.py")


@functools.cache
def fingerprint(user_file: str | None = None) -> str:
    """Return a hash of the code that trials execute. If it changes, all trials run again.

    The hash covers the worker, the estimators, the optimizers, the tasks and every gradcost module that they import.
    It is computed from syntax trees without docstrings and comments, so rewording those does not change it. Where
    numba does not work, trials need more memory and time, so they have another fingerprint.

    Args:
        user_file: the user's Python file that defines the task or the study. It is hashed too, with the files beside
            it that it imports, directly or indirectly.
    Returns:
        12 hexadecimal digits.
    """
    digest = blake2b(digest_size=6)
    for file in sorted(executed_files()):
        digest.update(file.relative_to(_SOURCE).as_posix().encode() + b"\0" + _code(file))
    if not has_fused_path():
        digest.update(b"noise by plain torch")
    if user_file is not None:
        digest.update(_code_with_siblings(Path(user_file)))
    return digest.hexdigest()


def plug_in_code(*parts: Any) -> list[str]:
    """Return a hash of the code of each plug-in whose classes occur in `parts`, such as an estimator or a task.

    The hash covers the module that defines the class and the files beside it that it imports.
    """
    packages = _plug_in_packages()
    names = {module for part in parts for _, module in origins(part)} if packages else set[str]()
    files = [module_file(sys.modules.get(name)) for name in sorted(names) if name.partition(".")[0] in packages]
    return [_stamp(file) for file in files if file is not None]


@functools.cache
def _plug_in_packages() -> set[str]:
    return {entry.module.partition(".")[0] for entry in entry_points(group=PLUGINS)}


@functools.cache
def _stamp(file: str) -> str:
    return blake2b(_code_with_siblings(Path(file)), digest_size=6).hexdigest()


def _code_with_siblings(file: Path) -> bytes:
    return b"".join(os.fsencode(each.name) + b"\0" + _code(each) for each in _with_siblings(file))


def _with_siblings(file: Path) -> list[Path]:
    """Return a file, then the files beside it that it imports, directly or indirectly, by name."""
    found, waiting = {file}, [file]
    while waiting:
        for node in ast.walk(_tree(waiting.pop())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            new = {beside for name in names for beside in _beside(file, name)} - found
            found, waiting = found | new, [*waiting, *new]
    return [file, *sorted(found - {file})]


def _beside(file: Path, name: str) -> list[Path]:
    """Return the files that `import name` may execute if it is found beside `file`: a module, or all of a package."""
    first = name.partition(".")[0] or "_"
    module, package = file.with_name(f"{first}.py"), file.with_name(first)
    if module.is_file() and not (package / "__init__.py").is_file():
        return [module]
    return [each for each in sorted(package.rglob("*.py")) if each.is_file()] if package.is_dir() else []


def executed_files() -> set[Path]:
    """Return the source files of gradcost that a trial may execute: the entry points and all they import."""
    package = Path(__file__).parents[1]
    files: set[Path] = set()
    waiting = [file for pattern in _ENTRY_POINTS for file in package.glob(pattern)]
    while waiting:
        file = waiting.pop()
        if file not in files:
            files.add(file)
            waiting += _imported(file)
    return files


def _imported(file: Path) -> Iterator[Path]:
    """Yield the gradcost modules that a file imports, at its top or inside a function."""
    for node in ast.walk(_tree(file)):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("gradcost."):
            continue
        module = _SOURCE.joinpath(*(node.module or "").split("."))
        if module.with_suffix(".py").exists():
            yield module.with_suffix(".py")
            continue
        submodules = [module / f"{alias.name}.py" for alias in node.names]
        yield from (submodule for submodule in submodules if submodule.exists())
        if not all(submodule.exists() for submodule in submodules):
            yield module / "__init__.py"


def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _code(file: Path) -> bytes:
    """Return a file's code in a normal form: no comments, no docstrings, no layout."""
    tree = _tree(file)
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree).encode()


def describe(threads: int, code: str, device: str | None = None) -> dict[str, str | int]:
    """Return the versions of the packages and the type of the machine, without its host name.

    Args:
        threads: the number of torch threads.
        code: the `fingerprint` of the code.
        device: where the trials run. On a GPU its name is included.
    """
    versions: dict[str, str | int] = {"python": platform.python_version()}
    for package in ("gradcost", "torch", "numpy", "numba"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    machine: dict[str, str | int] = {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "threads": threads,
        "code": code,
    }
    return versions | machine | _gpu(device)


def _gpu(device: str | None) -> dict[str, str | int]:
    if device is None or torch.device(device).type != "cuda":
        return {}  # asking would initialize CUDA
    try:
        return {"gpu": torch.cuda.get_device_name(device)}
    except (RuntimeError, AssertionError):
        return {"gpu": "unknown"}


def provenance() -> dict[str, str]:
    """Return when a study was started, and the command that started it, for the page of its report."""
    name = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    program = ["gradcost"] if name in ("gradcost", "__main__.py") else ["python", name]
    return {
        "started": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join([*program, *sys.argv[1:]]),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
