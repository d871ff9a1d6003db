"""What a series of slopes and losses says of a training: spikes, and where it diverged."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

_LEAST = 20  # slopes from which a median and a deviation are taken
_NORMAL = 1.4826  # the median absolute deviation times this is a normal variable's standard deviation


@dataclass(frozen=True)
class Spike:
    """A slope far above the others: at which step, how large (before any clip), and the threshold that it passed."""

    step: int
    slope: float
    threshold: float


@dataclass
class SlopeMonitor:
    """Slopes and losses in the order of the steps, looked at as they come.

    A slope is a spike when |slope| is above median + deviations * 1.4826 MAD of the `window` slopes before it, or is
    no number: the median and its deviation hardly notice the spikes that are in the window themselves. Slopes along
    random directions of a loss that stands still are near normal, and pass 8 deviations once in ten million. Where
    half of the slopes are alike, as where a loss is flat, there is no such threshold and no spike.

    The training has diverged at the first loss that is no number or above `rise` times the first one.
    """

    window: int = 200
    deviations: float = 8.0
    rise: float = 3.0
    spikes: list[Spike] = field(default_factory=list)
    diverged: int | None = None
    slopes: int = 0
    largest: float = 0.0
    first_loss: float | None = None
    before: list[float] = field(default_factory=list)  # the last `window` of them

    @classmethod
    def of(cls, plain: dict[str, Any]) -> SlopeMonitor:
        """The series that `plain` told of."""
        made = cls(**plain)
        made.spikes = [Spike(**spike) for spike in plain["spikes"]]
        return made

    def plain(self) -> dict[str, Any]:
        """All of it, for JSON: what to go on from."""
        return asdict(self)

    def add(self, step: int, loss: float, slopes: list[float]) -> None:
        """What one step measured."""
        for slope in slopes:
            self._slope(step, abs(slope))
        if self.first_loss is None:
            self.first_loss = loss
        if self.diverged is None and not loss <= self._most(self.first_loss):
            self.diverged = step

    def _most(self, first: float) -> float:
        """`rise` times the first loss, and as far above it where that is negative. Of 0 that is no measure, and any
        number will do; a first loss that is no number is a divergence itself."""
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
        if len(self.before) < _LEAST:
            return math.inf
        middle = median(self.before)
        spread = median(abs(size - middle) for size in self.before)
        return middle + self.deviations * _NORMAL * spread if spread > 0 else math.inf

    @property
    def first_warning(self) -> Spike | None:
        """The first spike among the `window` steps before the divergence, and at it: what came before the end."""
        if self.diverged is None:
            return None
        near = range(self.diverged - self.window, self.diverged + 1)
        return next((spike for spike in self.spikes if spike.step in near), None)
