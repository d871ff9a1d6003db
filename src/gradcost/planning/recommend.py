"""Which row of a plan to use, in a sentence; and when none fits, the least that would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradcost.checkpointing.policies import Schedule
from gradcost.core.units import number, size
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.reverse import Reverse
from gradcost.planning.candidates import described, label
from gradcost.planning.forecast import Forecast
from gradcost.planning.forecasts import Forecasts, offloads
from gradcost.planning.row import Row


@dataclass(frozen=True, eq=False)
class Least:
    """The exact gradient with the least peak that was found: by which estimator, and what it costs."""

    estimator: Estimator
    forecast: Forecast

    def record(self) -> dict[str, Any]:
        return {
            "method": described(self.estimator),
            "write": label(self.estimator),
            "peak": self.forecast.peak,
            "forwards": self.forecast.forwards,
        }


def least_exact(forecasts: Forecasts, rows: Sequence[Row], examples: int) -> Least | None:
    """The least of the rows, of the best schedules of recomputation, and of those example by example."""
    found = [Least(row.estimator, row.forecast) for row in rows if row.exact and row.forecast is not None]
    for parts in dict.fromkeys((1, examples)):
        if forecasts.least(parts) is None:
            continue
        for point in forecasts.tradeoff(parts)[0].points[:3]:
            estimator: Estimator = Reverse(Schedule(point.items))
            estimator = estimator if parts == 1 else Accumulated(estimator, parts)
            told = forecasts.of(estimator)
            if isinstance(told, Forecast):
                found.append(Least(estimator, told))
    return min(found, key=lambda least: (least.forecast.peak, least.forecast.flops), default=None)


def recommendation(rows: Sequence[Row], budget: int, least: Least | None) -> tuple[Estimator | None, str]:
    """The estimator to use, or None, and the sentence that says why."""
    fitting = [row for row in rows if row.fits]
    exact = [row for row in fitting if row.exact]
    if exact:
        best = min(exact, key=_cost)
        by = "fastest" if best.seconds is not None else "cheapest"
        which = "one" if len(exact) == 1 else f"{by} of {len(exact)}"
        only = "the only exact gradient here that fits" if which == "one" else f"the {by} exact gradient that fits"
        return best.estimator, f"{best.method} is {only}: {_told(best)}."
    below = _below(budget, least)
    inexact = [row for row in fitting if row.steps is not None] or fitting
    if inexact:
        best = min(inexact, key=lambda row: tuple(cost * (row.steps or 1) for cost in _cost(row)[1:]))
        steps = "" if best.steps is None else f", and in theory {number(best.steps, 2)} times the steps"
        return best.estimator, f"{below} {best.method} fits: {_told(best)}{steps}."
    others = [row for row in rows if not row.exact and row.forecast is not None]
    if others:
        best = min(others, key=lambda row: (row.forecast.peak, row.forecast.flops) if row.forecast else (0, 0))
        assert best.forecast is not None
        return None, f"{below} {best.method} needs {size(best.forecast.peak)}."
    return None, below


def _cost(row: Row) -> tuple[float, ...]:
    """What is compared: seconds where they are known, or FLOPs; then bytes. Neither knows of transfers."""
    assert row.forecast is not None
    return (offloads(row.estimator), row.forecast.flops if row.seconds is None else row.seconds, row.forecast.peak)


def _told(row: Row) -> str:
    assert row.forecast is not None
    took = "" if row.seconds is None else f", about {number(row.seconds, 2)} s"
    return f"{size(row.forecast.peak)} at the peak, {row.forecast.forwards:.1f} forwards{took} a step"


def _below(budget: int, least: Least | None) -> str:
    if least is None:
        return f"no exact gradient was found that serves here, in {size(budget)} or in more."
    if least.forecast.peak <= budget:
        return (
            f"none of these exact gradients fits {size(budget)}, and {described(least.estimator)} does: "
            f"{size(least.forecast.peak)}, {least.forecast.forwards:.1f} forwards, written {label(least.estimator)}."
        )
    how = f"{described(least.estimator)}, {least.forecast.forwards:.1f} forwards"
    return (
        f"{size(budget)} is below the least that any exact gradient needs here: {size(least.forecast.peak)} ({how})."
    )
