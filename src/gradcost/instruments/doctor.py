"""Describe what of this installation affects results and timings, what is missing, and how to get it."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gradcost.instruments.timing import time_steps
from gradcost.noise.add import has_gpu_path


@dataclass(frozen=True)
class Finding:
    """One fact about this installation.

    Args:
        what: the subject.
        found: the fact.
        advice: what to do, if something is missing or doubtful; None if nothing is.
    """

    what: str
    found: str
    advice: str | None = None


def diagnose() -> tuple[Finding, ...]:
    """Return facts about optional packages, threads, allocators, GPUs, and the noise of timings. Cost: one second.

    Returns:
        The findings. `advice` is set where something is missing or doubtful.
    """
    return (*_extras(), _torch(), *_threads(), _allocator(), *_gpus(), *_clock())


_OWN = ("all", "docs", "test")  # extras of extras, and those of developers


def _extras() -> Iterator[Finding]:
    wanted: dict[str, list[str]] = {}
    try:
        requirements = importlib.metadata.requires("gradcost") or []
    except importlib.metadata.PackageNotFoundError:  # run from its source, never installed
        return
    for requirement in requirements:
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)[^;]*;.*extra == ['\"](\w+)['\"].*", requirement)
        if match and match[2] not in _OWN:
            wanted.setdefault(match[2], []).append(match[1])
    for extra, packages in wanted.items():
        versions = {name: _version(name) for name in packages}
        missing = [name for name, version in versions.items() if version is None]
        present = [f"{name} {version}" for name, version in versions.items() if version is not None]
        found = ", ".join([*present, *(f"no {name}" for name in missing)])
        yield Finding(f"extra {extra}", found, f'pip install "gradcost[{extra}]"' if missing else None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> Finding:
    """Look up every private name of torch that gradcost uses: another version of torch may lack one."""
    missing = sorted(name for name in _private_names() if not _is_known(name))
    found = f"{torch.__version__}, " + (f"without {', '.join(missing)}" if missing else "with all that is used of it")
    advice = "this torch is not supported yet: install the one of constraints-newest.txt"
    return Finding("torch", found, advice if missing else None)


_PRIVATE = {"torch._C": r"(?:torch\._C|_c)", "torch._C._functorch": "functorch"}  # and how the source writes them


def _private_names() -> set[str]:
    """Return the names below `torch._C` and `torch._C._functorch` that occur in the source of this package."""
    package = Path(__file__).parents[1]
    names: set[str] = set()
    for file in package.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for prefix, alias in _PRIVATE.items():
            names |= {f"{prefix}.{name}" for name in re.findall(rf"(?<![\w.]){alias}\.(\w+)", text)}
    return names


def _is_known(name: str) -> bool:
    try:
        functools.reduce(getattr, name.split(".")[1:], torch)
    except AttributeError:
        return False
    return True


def _threads() -> Iterator[Finding]:
    threads, cores = torch.get_num_threads(), _cores()
    setting = os.environ.get("OMP_NUM_THREADS")
    found = f"{threads} of {cores} cores" + (f" (OMP_NUM_THREADS={setting})" if setting else "")
    many = f"torch has more threads than there are cores: set OMP_NUM_THREADS={cores}"
    yield Finding("threads", found, many if threads > cores else None)


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _allocator() -> Finding:
    preloaded = os.environ.get("LD_PRELOAD", "")
    known = next((name for name in ("jemalloc", "tcmalloc", "mimalloc") if name in preloaded), None)
    return Finding("CPU allocator", f"{known} (LD_PRELOAD)" if known else "that of the system")


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        reason = "this torch was built without CUDA" if torch.version.cuda is None else "CUDA finds no device"
        yield Finding("GPU", f"none: {reason}")
        return
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        yield Finding(
            f"GPU {number}", f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}"
        )
    backend = torch.cuda.get_allocator_backend()
    advice = None if backend == "native" else "peaks of memory are measured with the native allocator only"
    yield Finding("GPU allocator", backend, advice)
    compiled, slow = "one pass (Triton)", "operations of torch, many times slower"
    advice = "install triton, a C compiler such as gcc, and the headers of Python"
    yield Finding("GPU noise", *((compiled, None) if has_gpu_path() else (slow, advice)))


def _clock() -> Iterator[Finding]:
    yield Finding("clock", f"{time.get_clock_info('perf_counter').resolution * 1e9:.0f} ns resolution")
    square = torch.ones(192, 192)
    timing = time_steps(lambda: square @ square, samples=50, attempts=1)
    others = "unknown" if timing.others is None else f"{timing.others:.2f} cores"
    found = f"{100 * timing.spread:.1f}% spread of {timing.median:.3g} ms, other programs use {others}"
    yield Finding("noise of timings", found, timing.doubt)
