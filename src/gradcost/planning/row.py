"""One method of a plan: its forecast, whether it fits, and its cells in the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gradcost.core.units import DASH, number, size
from gradcost.estimators.estimator import Estimator
from gradcost.planning.batch import MOST
from gradcost.planning.candidates import described, label
from gradcost.planning.forecast import Forecast

COLUMNS = ("method", "peak", "fits", "forwards", "est. s/step", "steps × (theory)", "largest batch")


@dataclass(frozen=True, eq=False)
class Row:
    """One estimator of a plan.

    Args:
        estimator: the estimator.
        forecast: the cost of a step; None if the estimator cannot be used.
        refusal: why the estimator cannot be used; None if it can.
        over: bytes by which the peak exceeds the budget; 0 if it fits.
        seconds: estimated seconds per step; None without calibrated rates.
        steps: number of steps that replace one step of backprop, in theory; None if unknown.
        largest: the largest batch that fits; None if not requested.
    """

    estimator: Estimator
    forecast: Forecast | None
    refusal: str | None = None
    over: int = 0
    seconds: float | None = None
    steps: float | None = None
    largest: int | None = None

    @property
    def method(self) -> str:
        """The short name of the estimator, as in the table."""
        return described(self.estimator)

    @property
    def fits(self) -> bool:
        """Whether the estimator can be used and its peak is within the budget."""
        return self.forecast is not None and self.over == 0

    @property
    def exact(self) -> bool:
        """Whether the estimate is the exact gradient of the batch."""
        return self.estimator.exact

    def cells(self) -> list[str]:
        """Return the cells of the table, in the order of COLUMNS."""
        steps = DASH if self.steps is None else _format_ratio(self.steps)
        if self.forecast is None:
            return [self.method, DASH, "no", DASH, DASH, steps, DASH]
        fits = "yes" if self.fits else f"no, {size(self.over)} over"
        batch = DASH if self.largest is None else "any" if self.largest >= MOST else f"{self.largest:,}"
        seconds = number(self.seconds, 2)
        return [self.method, size(self.forecast.peak), fits, f"{self.forecast.forwards:.2f}", seconds, steps, batch]

    def record(self) -> dict[str, Any]:
        """Return the row as plain JSON data; "cells" maps each column of the table to its cell."""
        record = {
            "method": self.method,
            "write": label(self.estimator),
            "estimator": repr(self.estimator),
            "exact": self.exact,
            "fits": self.fits,
            "refusal": self.refusal,
            "steps": self.steps,
            "seconds": self.seconds,
            "largest": self.largest,
            "cells": dict(zip(COLUMNS[1:], self.cells()[1:], strict=True)),
        }
        if self.forecast is None:
            return record
        forecast = self.forecast
        return record | {
            "over": self.over,
            "peak": forecast.peak,
            "beyond": forecast.beyond,
            "within_kernels": forecast.within_kernels,
            "breakdown": dict(forecast.breakdown),
            "operator": forecast.memory.operator,
            "module": forecast.memory.module,
            "flops": forecast.flops,
            "forwards": forecast.forwards,
            "matmuls": forecast.matmuls,
            "moved": forecast.moved,
            "kept": forecast.kept,
            "message": forecast.message,
            "allocated": forecast.cuda and forecast.cuda.allocated,
            "reserved": forecast.cuda and forecast.cuda.reserved,
        }


def _format_ratio(ratio: float) -> str:
    """Format a ratio of steps; from 10,000 on in scientific notation, such as 1.2e5."""
    return number(ratio) if ratio < 10_000 else f"{ratio:.1e}".replace("e+0", "e").replace("e+", "e")
