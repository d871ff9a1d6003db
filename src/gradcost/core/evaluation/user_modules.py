"""Which modules are the user's own, and which global of such a module is a given object."""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from gradcost.core.value import value

PLUGINS = "gradcost.plugins"  # the entry point group of packages that add methods, optimizers and tasks
_SCHEMES = ("stdlib", "platstdlib", "purelib", "platlib")
_INSTALLED = tuple(  # folders, each with a separator at its end
    os.path.join(os.path.abspath(folder), "")
    for folder in (
        Path(__file__).parents[2],  # gradcost
        *(sysconfig.get_path(scheme) for scheme in _SCHEMES),
        *site.getsitepackages(),  # Debian has more than one
        site.getusersitepackages(),
    )
)


def module_file(module: Any) -> str | None:
    """Return the absolute path of a module's file; None if it has none."""
    file = getattr(module, "__file__", None)
    return os.path.abspath(file) if isinstance(file, str) else None


def users_file(module: Any) -> str | None:
    """Return the file of a module of the user; None for gradcost, installed packages and the standard library."""
    file = module_file(module)
    return file if file is not None and is_users(file) else None


def is_users(file: str) -> bool:
    """Return whether a path is a file of the user: not of gradcost, an installed package or the standard library."""
    return Path(file).is_file() and not is_installed(file)


def is_installed(file: str) -> bool:
    """Return whether an absolute path is inside gradcost, an installed package or the standard library."""
    return file.startswith(_INSTALLED)


def source_file(thing: Any) -> str | None:
    """Return the user's file that defines a class or function; None for gradcost and installed packages."""
    return users_file(sys.modules.get(getattr(thing, "__module__", None) or ""))


@value
class Global:
    """An object that is found by its name in a module. It is pickled by this name, and prints as `my:make`.

    Args:
        module: the name of the module in `sys.modules`.
        name: the name of the object in the module; for a nested one with dots.
        label: the name of the module's file, without the suffix, and of the object. It is the same in every process,
            also where the file is imported under another module name.
    """

    module: str
    name: str
    label: str

    def get(self) -> Any:
        """Return the object. Its module must have been imported."""
        thing: Any = sys.modules[self.module]
        for part in self.name.split("."):
            thing = getattr(thing, part)
        return thing

    def __repr__(self) -> str:
        return self.label


def find_global(thing: Any) -> Global | None:
    """Return the name under which other processes find an object; None if it is no global of a module.

    A function or class is looked up by its own name. Any other object, such as a DataLoader, a partial or a lambda,
    is searched for among the globals of the user's modules.
    """
    own = sys.modules.get(getattr(thing, "__module__", None) or "")
    name = getattr(thing, "__qualname__", None)
    found = None if own is None or name is None else _global(own, name)
    if found is not None and "<" not in found.name and _get(found) is thing:
        return found
    for module in _users_modules():
        for name, other in list(vars(module).items()):
            if other is thing:
                return _global(module, name)
    return None


def _get(found: Global) -> Any:
    try:
        return found.get()
    except AttributeError:
        return None


def _global(module: ModuleType, name: str) -> Global:
    file = module_file(module)
    return Global(module.__name__, name, f"{module.__name__ if file is None else Path(file).stem}:{name}")


def _users_modules() -> Iterator[ModuleType]:
    """Yield the caller's script and every imported module of the user."""
    for name, module in [("__main__", sys.modules["__main__"]), *sys.modules.copy().items()]:
        if isinstance(module, ModuleType) and (name == "__main__" or users_file(module) is not None):
            yield module
