"""Time: the median of many steps, with the doubt that their spread leaves."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

WIDE = 0.10  # an interquartile range over this share of the median is no calibration
MEASURABLE = 0.3  # seconds of sampling at least: the system counts busy time in hundredths
BUSY = 0.10  # nor is one during which others used more than this share of one core


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one step: the raw samples in the order they were taken, and what they say.

    first: the first call of all, in the warm-up: it may compile, allocate and load. others: how many cores other
    programs used meanwhile, None where the system does not tell. It is watched because a spread alone is blind
    to it: threads that wait for one another on a shared core are slow in lock step (40 times, with an
    interquartile range of 0.1%).
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
        """The interquartile range as a share of the median."""
        low, high = self.quartiles
        return (high - low) / self.median

    @property
    def doubt(self) -> str | None:
        """Why the reading is not to be relied on, in a sentence, or None."""
        if self.others is not None and self.others > BUSY:
            return f"other programs used {self.others:.1f} cores meanwhile; time it again when the machine is quiet"
        if self.spread > WIDE:
            return (
                f"the middle half of {len(self.samples)} steps spreads over {100 * self.spread:.0f}% of their median"
            )
        return None


def time_steps(
    step: Callable[[], object], samples: int = 30, warmup: int = 3, attempts: int = 3, lasting: float = MEASURABLE
) -> Timing:
    """Time `step` alone: a warm-up, then `samples` runs or `lasting` seconds of them, whichever is longer.

    A reading that doubts itself is taken again, up to `attempts` times, and the one that others disturbed least
    stands, then the one of least spread. Where the step uses GPUs each sample waits for them, at its start and
    its end, so that it holds all that the step set off and nothing else.
    """
    warm = [_one(step, _used()) for _ in range(warmup)]
    readings = []
    for _ in range(attempts):
        readings.append(replace(_sampled(step, samples, lasting), first=warm[0] if warm else None))
        if readings[-1].doubt is None:
            break
    return min(readings, key=lambda reading: (max(reading.others or 0.0, BUSY), reading.spread))


def _sampled(step: Callable[[], object], samples: int, lasting: float) -> Timing:
    gpus = _used()
    taken = []
    busy, own, begin = _busy_seconds(), time.process_time(), time.perf_counter()
    while len(taken) < samples or time.perf_counter() - begin < lasting:
        taken.append(_one(step, gpus))
    elapsed, after = time.perf_counter() - begin, _busy_seconds()
    if busy is None or after is None:
        return Timing(tuple(taken))
    return Timing(tuple(taken), max(0.0, after - busy - (time.process_time() - own)) / elapsed)


def _one(step: Callable[[], object], gpus: list[int]) -> float:
    _wait(gpus)
    start = time.perf_counter()
    step()
    _wait(gpus)
    return 1e3 * (time.perf_counter() - start)


def _wait(gpus: list[int]) -> None:
    for gpu in gpus:
        torch.cuda.synchronize(gpu)


def _used() -> list[int]:
    """The GPUs that hold tensors of this process; to wait for others would set them up first."""
    if not torch.cuda.is_initialized():
        return []
    return [gpu for gpu in range(torch.cuda.device_count()) if torch.cuda.memory_allocated(gpu)]


def _busy_seconds() -> float | None:
    """Processor seconds that the whole machine has spent on anything but waiting, since it started."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(field) for field in file.readline().split()[1:]]
    except (OSError, ValueError):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks[:8]
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
