"""One method of a plan: its forecast, whether it fits, and its cells in the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gradcost.core.units import DASH, number, size
from gradcost.estimators.estimator import Estimator
from gradcost.planning.candidates import described, label
from gradcost.planning.forecast import Forecast
from gradcost.planning.forecasts import MOST, is_exact

COLUMNS = ("method", "peak", "fits", "forwards", "est. s/step", "steps × (theory)", "largest batch")


@dataclass(frozen=True, eq=False)
class Row:
    """One method of a plan.

    forecast: what a step costs; None where it cannot serve, and `refusal` says why. over: bytes of its peak above
    the budget, 0 when it fits. seconds: a step's, estimated from calibrated rates; None without them. steps: how
    many times backpropagation's steps the theory expects, None where it says nothing. largest: the largest batch
    that fits, None when it was not asked for.
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
        return described(self.estimator)

    @property
    def fits(self) -> bool:
        return self.forecast is not None and self.over == 0

    @property
    def exact(self) -> bool:
        return is_exact(self.estimator)

    def cells(self) -> list[str]:
        """What the table's COLUMNS say."""
        steps = DASH if self.steps is None else _times(self.steps)
        if self.forecast is None:
            return [self.method, DASH, "no", DASH, DASH, steps, DASH]
        fits = "yes" if self.fits else f"no, {size(self.over)} over"
        most = DASH if self.largest is None else "any" if self.largest >= MOST else f"{self.largest:,}"
        took = number(self.seconds, 2)
        return [self.method, size(self.forecast.peak), fits, f"{self.forecast.forwards:.2f}", took, steps, most]

    def record(self) -> dict[str, Any]:
        found = {
            "method": self.method,
            "write": label(self.estimator),
            "estimator": repr(self.estimator),
            "exact": self.exact,
            "fits": self.fits,
            "refusal": self.refusal,
            "steps": self.steps,
            "seconds": self.seconds,
            "largest": self.largest,
        }
        if self.forecast is None:
            return found
        told = self.forecast
        return found | {
            "over": self.over,
            "peak": told.peak,
            "beyond": told.beyond,
            "breakdown": dict(told.breakdown),
            "operator": told.memory.operator,
            "module": told.memory.module,
            "flops": told.flops,
            "forwards": told.forwards,
            "matmuls": told.matmuls,
            "moved": told.moved,
            "kept": told.kept,
            "message": told.message,
        }


def _times(ratio: float) -> str:
    return number(ratio) if ratio < 10_000 else f"{ratio:.1e}".replace("e+0", "e").replace("e+", "e")
