"""Find the user's file that defines a task or a study, and import it in a worker process.

A worker unpickles trials, so it needs the classes of the user's task. The import of a script ends at its first call
of `compare` or `run_study`, so a script works without `if __name__ == "__main__":`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from hashlib import blake2b
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from gradcost.core.errors import BadInput
from gradcost.core.evaluation.user_modules import Global, module_file, users_file

PREFIX = "gradcost_user_"  # prefix of the names of modules that are imported by path
_importing: ContextVar[bool] = ContextVar("importing", default=False)


class _StudyCalled(BaseException):
    """Ends the import of a script at its first call of `compare` or `run_study`."""


def refuse_while_importing() -> None:
    """End the import of the user's file, if this call is part of that import: a worker must not start a study."""
    if _importing.get():
        raise _StudyCalled


@dataclass(frozen=True)
class UserCode:
    """A Python file of the user, and how the calling process imported it.

    Args:
        file: its absolute path.
        stamp: a hash of its bytes.
        module: the name of its module. None: it is imported by its path.
        is_main: whether it is the caller's script. pickle refers to classes of the script by "__main__".
    """

    file: str
    stamp: str
    module: str | None
    is_main: bool

    def load(self) -> None:
        """Import the file in this process, under the module name that pickled trials contain."""
        if self.module is None:
            module = load_file(self.file)
        else:
            spec = importlib.util.find_spec(self.module)
            if spec is None:
                raise BadInput(f"a worker cannot import {self.module}: add its folder to PYTHONPATH.")
            module = sys.modules.get(self.module) or _execute(spec)
        if self.is_main:
            sys.modules["__main__"] = module

    @property
    def is_changed(self) -> bool:
        return stamp(self.file) != self.stamp


def locate(file: str) -> UserCode:
    """Return the `UserCode` of a file, with the module name under which this process imported it."""
    file = os.path.abspath(file)
    main = sys.modules["__main__"]
    if module_file(main) == file:
        spec = getattr(main, "__spec__", None)
        return UserCode(file, stamp(file), None if spec is None else spec.name, True)
    names = [name for name, module in sys.modules.copy().items() if module_file(module) == file]
    by_name = next((name for name in names if not name.startswith((PREFIX, "__mp_main__"))), None)
    return UserCode(file, stamp(file), by_name, False)


def stamp(file: str) -> str:
    """Hash a file's bytes to 12 hexadecimal digits."""
    return blake2b(Path(file).read_bytes(), digest_size=6).hexdigest()


def user_file(*parts: Any) -> str | None:
    """Return the user's file that defines a class or global used in `parts`; None if there is no such file.

    A worker imports this file. Files of gradcost and of installed packages do not count. If there are several files,
    the caller's script is returned, or without it the file of the first part. The name of a trial covers the code of
    all of them (`environment.plug_in_code`).

    Raises:
        BadInput: it was defined in an interactive session.
    """
    files: dict[str, str] = {}
    for name, module in (origin for part in parts for origin in origins(part)):
        file = users_file(sys.modules.get(module))
        if file is not None:
            files[module] = file
        elif module == "__main__":
            raise BadInput(
                f"{name} is defined in an interactive session, where worker processes cannot import it: put "
                "it in a .py file and import that."
            )
    return files.get("__main__") or next(iter(files.values()), None)


def origins(part: Any) -> Iterator[tuple[str, str]]:
    """Yield (name, name of the module) of a value's class or global and, recursively, of its fields or items."""
    if isinstance(part, Global):
        yield part.name, part.module
    yield type(part).__name__, type(part).__module__
    if is_dataclass(part):
        items = [getattr(part, field.name) for field in fields(part)]
    elif isinstance(part, Mapping):
        items = list(part.values())
    else:
        items = list(part) if isinstance(part, tuple | list) else []
    for item in items:
        yield from origins(item)


def load_file(path: str) -> ModuleType:
    """Import a Python file by its path, under a name that is the same in every process.

    Its folder goes to the end of `sys.path`, so it can import the files beside it. A file beside it that has the name
    of an installed package or of a standard module, such as `random.py`, is not imported.

    Raises:
        BadInput: it is not a Python file, or a file of the same name in another folder was imported before.
    """
    name = PREFIX + Path(path).stem.replace("%", "%25").replace(".", "%2E")  # a dot would name a package
    if name in sys.modules:
        known = module_file(sys.modules[name])
        if known is not None and not os.path.samefile(known, path):
            raise BadInput(f"{known} and {path} are two files of one name: rename one of them.")
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise BadInput(f"{path} is not a Python file: its name must end in .py.")
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    return _execute(spec)


def _execute(spec: ModuleSpec) -> ModuleType:
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    token = _importing.set(True)
    try:
        with contextlib.suppress(_StudyCalled):  # the module keeps all definitions above the call
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    finally:
        _importing.reset(token)
    return module
