"""Find spikes in the slopes of a training run, and detect the divergence of its loss."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from gradcost.core.divergence import DivergenceMonitor

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
    """Find spikes of the slopes. `add` receives the measurements of each step. `loss` detects divergence.

    Spike: |slope| > median + deviations * 1.4826 MAD, or a slope that is not finite. The median and the median
    absolute deviation (MAD) are those of |slope| over the last `window` finite slopes.
    - Median and MAD are robust to earlier spikes inside the window.
    - Under an unchanging gradient, slopes along random directions are nearly normal. With `deviations` = 8, chance
      then exceeds the threshold once in 16 million slopes.
    - There is no threshold while fewer than 20 slopes are known, or if MAD = 0 (at least half of the slopes are
      equal, as on a flat loss).

    Args:
        window: number of preceding slopes that set the threshold of a slope.
        deviations: distance of the threshold above the median, in robust standard deviations (1.4826 MAD).
        loss: applies the rule of divergence to the losses so far.
        spikes: the spikes so far.
        slopes: number of slopes so far.
        largest: the largest finite |slope|.
        before: the last `window` finite values of |slope|.
    """

    window: int = 200
    deviations: float = 8.0
    loss: DivergenceMonitor = field(default_factory=DivergenceMonitor)
    spikes: list[Spike] = field(default_factory=list)
    slopes: int = 0
    largest: float = 0.0
    before: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> SlopeMonitor:
        """Return the monitor whose fields `plain()` returned."""
        monitor = cls(**plain)
        monitor.spikes = [Spike(**spike) for spike in plain["spikes"]]
        monitor.loss = DivergenceMonitor(**plain["loss"])
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
        self.loss.add(step, loss)

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
    def diverged(self) -> int | None:
        """The step from which on the loss has diverged; None if it has not."""
        return self.loss.diverged

    @property
    def first_warning(self) -> Spike | None:
        """The first spike at most `window` steps before the divergence; None if there is none."""
        if self.diverged is None:
            return None
        near = range(self.diverged - self.window, self.diverged + 1)
        return next((spike for spike in self.spikes if spike.step in near), None)
