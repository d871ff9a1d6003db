"""Where a study ran: what a reader needs to judge its figures, and whether code changed under them."""

from __future__ import annotations

import functools
import os
import platform
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# What the numbers of a trial depend on: whole rooms, and single files.
_ROOMS = (".", "directions", "estimators", "training", "tasks")
_FILES = ("study/trial.py", "study/perform.py", "study/seen.py", "diagnostics/spikes.py")


@functools.cache
def fingerprint(user_file: str | None = None) -> str:
    """Twelve hexadecimal digits of the source that trials run; another one, and they are run anew. What the user's
    file imports from elsewhere is not looked at."""
    package = Path(__file__).parents[1]
    files = [file for room in _ROOMS for file in sorted((package / room).glob("*.py"))]
    files += [package / file for file in _FILES]
    digest = blake2b(digest_size=6)
    for file in files + ([Path(user_file)] if user_file else []):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def stamp(file: str | None) -> str | None:
    """Twelve hexadecimal digits of what a file holds now; None where there is none."""
    return None if file is None else blake2b(Path(file).read_bytes(), digest_size=6).hexdigest()


def describe(threads: int, code: str) -> dict[str, str | int]:
    """Versions and the machine, without its name: `threads` are those of the timings, `code` the fingerprint."""
    found: dict[str, str | int] = {"python": platform.python_version()}
    for package in ("gradcost", "torch", "numpy", "numba"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found | {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "threads": threads,
        "code": code,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
