"""Time a step: the median of many runs, and whether the reading is reliable."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

WIDE = 0.10  # a reading is doubtful if its interquartile range exceeds this share of the median
BUSY = 0.10  # or if other programs use more than this share of one core
MEASURABLE = 0.3  # seconds of sampling at least: the system counts busy time in hundredths of a second


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one step.

    The load of other programs is recorded because the spread alone can miss it. Threads that wait for one another on
    a shared core are uniformly slow: 40 times, with an interquartile range of 0.1%.

    Args:
        samples: milliseconds of each run, in order.
        others: number of cores that other programs used; None where the system does not report it.
        first: milliseconds of the very first call, in the warm-up; it may compile, allocate and load.
    """

    samples: tuple[float, ...]
    others: float | None = None
    first: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.samples, n=4)
        return low, high

    @property
    def spread(self) -> float:
        """Return the interquartile range as a share of the median."""
        low, high = self.quartiles
        return (high - low) / self.median

    @property
    def doubt(self) -> str | None:
        """Return why the reading is unreliable, or None."""
        if self.others is not None and self.others > BUSY:
            return f"other programs used {self.others:.1f} cores meanwhile; time it again on an idle machine"
        if self.spread > WIDE:
            return (
                f"the middle half of {len(self.samples)} steps spreads over {100 * self.spread:.0f}% of their median"
            )
        return None


def time_steps(
    step: Callable[[], object], samples: int = 30, warmup: int = 3, attempts: int = 3, lasting: float = MEASURABLE
) -> Timing:
    """Time a step: a warm-up, then `samples` runs or `lasting` seconds of runs, whichever is longer.

    If the process uses GPUs, each sample synchronizes with them at its start and its end.

    Args:
        step: the function to time.
        samples: least number of timed runs.
        warmup: number of runs before.
        attempts: number of readings at most; a doubtful reading is repeated.
        lasting: least seconds of sampling.
    Returns:
        The first reading without doubt; else the one least disturbed by other programs, then the one of least spread.
    """
    warm = [_timed(step, _used_gpus()) for _ in range(warmup)]
    readings = []
    for _ in range(attempts):
        readings.append(replace(_reading(step, samples, lasting), first=warm[0] if warm else None))
        if readings[-1].doubt is None:
            break
    return min(readings, key=lambda reading: (max(reading.others or 0.0, BUSY), reading.spread))


def _reading(step: Callable[[], object], samples: int, lasting: float) -> Timing:
    gpus = _used_gpus()
    milliseconds = []
    busy_before, process_before, start = _busy_seconds(), time.process_time(), time.perf_counter()
    while len(milliseconds) < samples or time.perf_counter() - start < lasting:
        milliseconds.append(_timed(step, gpus))
    elapsed, busy_after = time.perf_counter() - start, _busy_seconds()
    if busy_before is None or busy_after is None:
        return Timing(tuple(milliseconds))
    process = time.process_time() - process_before
    return Timing(tuple(milliseconds), max(0.0, busy_after - busy_before - process) / elapsed)


def _timed(step: Callable[[], object], gpus: list[int]) -> float:
    _synchronize(gpus)
    start = time.perf_counter()
    step()
    _synchronize(gpus)
    return 1e3 * (time.perf_counter() - start)


def _synchronize(gpus: list[int]) -> None:
    for gpu in gpus:
        torch.cuda.synchronize(gpu)


def _used_gpus() -> list[int]:
    """Return the GPUs with tensors of this process. Synchronizing with another would initialize it."""
    if not torch.cuda.is_initialized():
        return []
    return [gpu for gpu in range(torch.cuda.device_count()) if torch.cuda.memory_allocated(gpu)]


def _busy_seconds() -> float | None:
    """Return the busy processor seconds of the whole machine since its start; None where unknown."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(field) for field in file.readline().split()[1:]]
    except (OSError, ValueError):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks[:8]
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
