"""Spikes in the slopes of a training, and the step at which its loss diverged."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

_MIN_SLOPES = 20  # fewer give no threshold
_NORMAL = 1.4826  # standard deviation / median absolute deviation of a normal variable


@dataclass(frozen=True)
class Spike:
    """A slope far above the others.

    Args:
        step: its step.
        slope: its absolute value, before any clip.
        threshold: the value that it exceeds.
    """

    step: int
    slope: float
    threshold: float


@dataclass
class SlopeMonitor:
    """Find spikes and divergence in slopes and losses, which are added step by step.

    Spike: |slope| > median + deviations * 1.4826 MAD of the last `window` slopes, or a slope that is not finite.
    - The median and the median absolute deviation (MAD) are robust to the spikes inside the window.
    - Slopes along random directions of a constant loss are near normal: 8 deviations happen once in ten million.
    - If MAD = 0 (half of the slopes are equal, as on a flat loss) or below 20 slopes there is no threshold.

    Divergence: the first loss that is not a number or above `rise` times the first loss.

    Args:
        window: number of slopes before a slope that set its threshold.
        deviations: robust standard deviations above the median.
        rise: factor of the first loss.
        spikes: the spikes so far.
        diverged: the step of the divergence; None if there is none.
        slopes: number of slopes so far.
        largest: the largest finite |slope|.
        first_loss: the first loss; None before the first step.
        before: the last `window` finite values of |slope|.
    """

    window: int = 200
    deviations: float = 8.0
    rise: float = 3.0
    spikes: list[Spike] = field(default_factory=list)
    diverged: int | None = None
    slopes: int = 0
    largest: float = 0.0
    first_loss: float | None = None
    before: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> SlopeMonitor:
        """Return the monitor that `plain` describes."""
        monitor = cls(**plain)
        monitor.spikes = [Spike(**spike) for spike in plain["spikes"]]
        return monitor

    def plain(self) -> dict[str, Any]:
        """Return all fields as JSON data; `of` reads them."""
        return asdict(self)

    def add(self, step: int, loss: float, slopes: list[float]) -> None:
        """Add the measurements of one step.

        Args:
            step: the number of the step.
            loss: its loss.
            slopes: one per probe; empty for backprop.
        """
        for slope in slopes:
            self._slope(step, abs(slope))
        if self.first_loss is None:
            self.first_loss = loss
        if self.diverged is None and not loss <= self._limit(self.first_loss):
            self.diverged = step

    def _limit(self, first: float) -> float:
        """Return the largest loss that is no divergence, given the first loss.

        - first > 0: rise * first. first < 0: the same distance above it. first = 0: no limit.
        - first not finite: the first step is the divergence.
        """
        if first == 0:
            return sys.float_info.max
        return first + (self.rise - 1) * abs(first) if math.isfinite(first) else -math.inf

    def _slope(self, step: int, size: float) -> None:
        threshold = self._threshold()
        self.slopes += 1
        if not math.isfinite(size) or size > threshold:
            self.spikes.append(Spike(step, size, threshold))
        if math.isfinite(size):
            self.largest = max(self.largest, size)
            self.before.append(size)
            if len(self.before) > self.window:
                del self.before[0]

    def _threshold(self) -> float:
        if len(self.before) < _MIN_SLOPES:
            return math.inf
        middle = median(self.before)
        spread = median(abs(size - middle) for size in self.before)
        return middle + self.deviations * _NORMAL * spread if spread > 0 else math.inf

    @property
    def first_warning(self) -> Spike | None:
        """The first spike at most `window` steps before the divergence; None if there is none."""
        if self.diverged is None:
            return None
        near = range(self.diverged - self.window, self.diverged + 1)
        return next((spike for spike in self.spikes if spike.step in near), None)
