"""The environment of a study: package versions, the machine, and a fingerprint of the code that trials execute."""

from __future__ import annotations

import ast
import functools
import itertools
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

from gradcost.core.evaluation.user_modules import PLUGINS, is_users, module_file
from gradcost.noise.add import has_fused_path
from gradcost.studies.user_code import origins

_SOURCE = Path(__file__).parents[2]  # the folder that contains the package
_SITES = {"site-packages", "dist-packages"}  # folders of installed packages, such as those of `pip install --user`
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
        user_file: the user's Python file that defines the task or the study. It is hashed too, with the files that
            it imports, directly or indirectly, from its folder or from the package that it is in.
    Returns:
        12 hexadecimal digits.
    """
    digest = blake2b(_own_code(), digest_size=6)
    if not has_fused_path():
        digest.update(b"noise by plain torch")
    if user_file is not None:
        digest.update(_code_with_siblings(Path(user_file)))
    return digest.hexdigest()


@functools.cache
def _own_code() -> bytes:
    """Return the names and the code of the files of gradcost that trials execute."""
    files = sorted(executed_files())
    return b"".join(file.relative_to(_SOURCE).as_posix().encode() + b"\0" + _code(file) for file in files)


def plug_in_code(*parts: Any) -> list[str]:
    """Return a hash of each file of a plug-in or of the user that defines a class or global used in `parts`.

    The parts are those of a trial, such as an estimator and a task. A hash covers the file, and the files that it
    imports from its folder or from its own package. Parts that gradcost defines have none.
    """
    packages = _plug_in_packages()
    names = {module for part in parts for _, module in origins(part)}
    files = {name: module_file(sys.modules.get(name)) for name in names}
    return sorted(
        {
            _stamp(file)
            for name, file in files.items()
            if file is not None and (name.partition(".")[0] in packages or _is_users_source(file))
        }
    )


@functools.cache
def _is_users_source(file: str) -> bool:
    return file.endswith(".py") and is_users(file) and _SITES.isdisjoint(Path(file).parts)


@functools.cache
def _plug_in_packages() -> set[str]:
    return {entry.module.partition(".")[0] for entry in entry_points(group=PLUGINS)}


@functools.cache
def _stamp(file: str) -> str:
    return blake2b(_code_with_siblings(Path(file)), digest_size=6).hexdigest()


def _code_with_siblings(file: Path) -> bytes:
    return b"".join(os.fsencode(each.name) + b"\0" + _code(each) for each in _with_siblings(file))


def _with_siblings(file: Path) -> list[Path]:
    """Return a file, then the files of its folder and its package that it imports, directly or indirectly."""
    file = Path(os.path.abspath(file))
    found, waiting = {file}, [file]
    while waiting:
        new = set(_siblings(waiting.pop(), file.parent)) - found
        found, waiting = found | new, [*waiting, *new]
    return [file, *sorted(found - {file})]


def _siblings(file: Path, folder: Path) -> Iterator[Path]:
    """Yield what the imports of a file may execute: files in `folder`, or in the package that contains the file."""
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _absolute(file, folder, alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            for names in ([*module, alias.name] for alias in node.names):
                if node.level:
                    yield from _in_package(file.parent, [])
                    for package in file.parents[node.level - 1 : node.level]:
                        yield from _in_package(package, names)
                else:
                    yield from _absolute(file, folder, names)


def _absolute(file: Path, folder: Path, names: list[str]) -> Iterator[Path]:
    """Yield what `import a.b` in a file may execute, if a is in `folder`, or is a package that contains the file."""
    yield from (beside for beside in _found(folder, names[0]) if _is_users_source(str(beside)))
    for package in file.parents:
        if package.name == names[0] != "gradcost":  # `executed_files` are those of gradcost
            yield from _in_package(package, names[1:])


def _in_package(package: Path, names: list[str]) -> Iterator[Path]:
    """Yield what the import of a.b in a package may execute: the package, the packages around it, and a."""
    inits = (folder / "__init__.py" for folder in (package, *package.parents))
    yield from itertools.takewhile(Path.is_file, inits)
    if names:
        yield from _found(package, names[0])


def _found(folder: Path, name: str) -> list[Path]:
    """Return the files that an import of `name` from a folder may execute: a module, or all of a package."""
    module, package = folder / f"{name}.py", folder / name
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
