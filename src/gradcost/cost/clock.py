"""Time: the median of many steps, with the doubt that their spread leaves."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

WIDE = 0.10  # an interquartile range over this share of the median is no calibration


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one step: the raw samples in the order they were taken, and what they say."""

    samples: tuple[float, ...]
    load: float  # the machine's load average over the last minute, when the sampling ended

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.samples, n=4)
        return low, high

    @property
    def doubt(self) -> str | None:
        """Why the reading is not to be relied on, in a sentence, or None."""
        low, high = self.quartiles
        if high - low <= WIDE * self.median:
            return None
        spread = 100 * (high - low) / self.median
        return f"the middle half of {len(self.samples)} steps spreads over {spread:.0f}% of their median"


def time_steps(step: Callable[[], object], samples: int = 30, warmup: int = 3, attempts: int = 3) -> Timing:
    """Time `step` alone: a warm-up, then `samples` runs; a reading that doubts itself is taken again, up to
    `attempts` times, and the one of least spread stands. On a GPU each sample waits for the device."""
    for _ in range(warmup):
        step()
    readings = []
    for _ in range(attempts):
        readings.append(_sampled(step, samples))
        if readings[-1].doubt is None:
            break
    return min(readings, key=lambda r: (r.quartiles[1] - r.quartiles[0]) / r.median)


def _sampled(step: Callable[[], object], samples: int) -> Timing:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    taken = []
    for _ in range(samples):
        wait()
        start = time.perf_counter()
        step()
        wait()
        taken.append(1e3 * (time.perf_counter() - start))
    return Timing(tuple(taken), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0)
