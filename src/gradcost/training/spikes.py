"""Find spikes in the slopes of a training run, and the step at which its loss diverges."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

_MIN_SLOPES = 20  # with fewer slopes there is no threshold, so no spike
_STD_PER_MAD = 1.4826  # standard deviation / median absolute deviation of a normal variable


@dataclass(frozen=True)
class Spike:
    """A slope far above the preceding slopes, or a slope that is not finite.

    Args:
        step: the step of the slope.
        slope: |slope|, before any clip.
        threshold: the limit for |slope| at that step; inf if there was none.
    """

    step: int
    slope: float
    threshold: float


@dataclass
class SlopeMonitor:
    """Find spikes of the slopes and divergence of the loss. `add` receives the measurements of each step.

    Spike: |slope| > median + deviations * 1.4826 MAD, or a slope that is not finite. The median and the median
    absolute deviation (MAD) are those of |slope| over the last `window` finite slopes.
    - Median and MAD are robust to earlier spikes inside the window.
    - Under an unchanging gradient, slopes along random directions are nearly normal. With `deviations` = 8, chance
      then exceeds the threshold once in 16 million slopes.
    - There is no threshold while fewer than 20 slopes are known, or if MAD = 0 (at least half of the slopes are
      equal, as on a flat loss).

    Divergence: the first loss that is not a number or is above `rise` times the loss of the first step.

    Args:
        window: number of preceding slopes that set the threshold of a slope.
        deviations: distance of the threshold above the median, in robust standard deviations (1.4826 MAD).
        rise: the loss diverges above this multiple of the first loss.
        spikes: the spikes so far.
        diverged: the step at which the loss diverged; None if it has not.
        slopes: number of slopes so far.
        largest: the largest finite |slope|.
        first_loss: the loss of the first step; None before it.
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
        """Return the monitor whose fields `plain()` returned."""
        monitor = cls(**plain)
        monitor.spikes = [Spike(**spike) for spike in plain["spikes"]]
        return monitor

    def plain(self) -> dict[str, Any]:
        """Return all fields as JSON data, which `of` converts back to a monitor."""
        return asdict(self)

    def add(self, step: int, loss: float, slopes: list[float]) -> None:
        """Add the measurements of one step.

        Args:
            step: the number of the step.
            loss: the loss of the step.
            slopes: the slopes of the step, one per probe; empty for backprop.
        """
        for slope in slopes:
            self._add_slope(step, abs(slope))
        if self.first_loss is None:
            self.first_loss = loss
        if self.diverged is None and not loss <= self._largest_loss(self.first_loss):
            self.diverged = step

    def _largest_loss(self, first: float) -> float:
        """Return the largest loss that is not a divergence.

        - Finite `first`: first + (rise - 1) |first|, which is rise * first if first > 0. No limit if first = 0.
        - `first` not finite: -inf, so that the first step counts as diverged.
        """
        if first == 0:
            return sys.float_info.max
        return first + (self.rise - 1) * abs(first) if math.isfinite(first) else -math.inf

    def _add_slope(self, step: int, size: float) -> None:
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
        return middle + self.deviations * _STD_PER_MAD * spread if spread > 0 else math.inf

    @property
    def first_warning(self) -> Spike | None:
        """The first spike at most `window` steps before the divergence; None if there is none."""
        if self.diverged is None:
            return None
        near = range(self.diverged - self.window, self.diverged + 1)
        return next((spike for spike in self.spikes if spike.step in near), None)
