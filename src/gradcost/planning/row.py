"""One method of a plan: its forecast, whether it fits, and its cells in the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradcost.core.units import DASH, number, size
from gradcost.estimators.estimator import Estimator
from gradcost.planning.batch import MOST
from gradcost.planning.candidates import described, label
from gradcost.planning.forecast import Forecast

_FIXED_COLUMNS = 4  # always shown; each later column only if a row has a value in it
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

    @property
    def steps_text(self) -> str:
        """`steps` as in the table: from 10,000 on in scientific notation, such as 1.2e5."""
        if self.steps is None:
            return DASH
        if self.steps < 10_000:
            return number(self.steps)
        return f"{self.steps:.1e}".replace("e+0", "e").replace("e+", "e")

    def cells(self) -> list[str]:
        """Return the cells of the table, in the order of COLUMNS."""
        steps = self.steps_text
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


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the columns of a table of these rows, and its cells, without columns in which no row has a value."""
    cells = [row.cells() for row in rows]
    shown = [i for i in range(len(COLUMNS)) if i < _FIXED_COLUMNS or any(row[i] != DASH for row in cells)]
    return [COLUMNS[i] for i in shown], [[row[i] for i in shown] for row in cells]
