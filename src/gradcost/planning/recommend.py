"""Choose a row of a plan and explain the choice; if nothing fits, state the least memory that is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradcost.checkpointing.policies import Everything, Schedule
from gradcost.core.units import number, size
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.estimators.structure import micro_batches
from gradcost.planning.candidates import described, label, splits_mixed
from gradcost.planning.forecast import Forecast
from gradcost.planning.forecasts import Forecasts, offloads
from gradcost.planning.row import Row


@dataclass(frozen=True, eq=False)
class Least:
    """An estimator of the exact gradient, and its forecast."""

    estimator: Estimator
    forecast: Forecast

    def record(self) -> dict[str, Any]:
        return {
            "method": described(self.estimator),
            "write": label(self.estimator),
            "peak": self.forecast.peak,
            "forwards": self.forecast.forwards,
        }


def least_exact(forecasts: Forecasts, rows: Sequence[Row], examples: int, budget: int) -> Least | None:
    """Return the exact gradient with the smallest peak; None if there is none.

    Candidates: the rows, the best checkpointing schedules, and these schedules with micro-batches of one example. If
    a schedule fits the budget: `Within(budget)` instead, which costs the fewest FLOPs.
    """
    candidates = [Least(row.estimator, row.forecast) for row in rows if row.exact and row.forecast is not None]
    for parts in dict.fromkeys((1, examples)):
        if forecasts.least(parts) is None:
            continue
        estimator: Estimator = Reverse(Schedule(forecasts.tradeoff(parts)[0].least().items))
        estimator = estimator if parts == 1 else Accumulated(estimator, parts)
        result = forecasts.of(estimator)
        if isinstance(result, Forecast):
            candidates.append(Least(estimator, result))
    least = min(candidates, key=lambda least: (least.forecast.peak, least.forecast.flops), default=None)
    if least is not None and least.forecast.peak <= budget:
        estimator, result = forecasts.within(budget, micro_batches(least.estimator))
        least = Least(estimator, result) if isinstance(result, Forecast) else least
    return least


def recommendation(
    rows: Sequence[Row], budget: int, least: Least | None, mixing: str | None = None
) -> tuple[Estimator | None, str]:
    """Return the estimator to use, None if no row fits, and a sentence that explains the choice.

    Args:
        rows: the rows of the plan.
        budget: bytes for the whole step.
        least: the exact gradient with the smallest peak.
        mixing: the layer that mixes the examples of a batch, as in `mixing_layer`. Micro-batches are then chosen
            only if no other exact gradient fits.
    """
    fitting = [row for row in rows if row.fits]
    exact = [row for row in fitting if row.exact]
    if exact:
        best = min(exact, key=lambda row: (splits_mixed(row.estimator, mixing), *_preference(row)))
        rank = "fastest" if best.seconds is not None else "cheapest"
        which = f"the {rank} exact gradient that fits" if len(exact) > 1 else "the only exact gradient here that fits"
        if any(offloads(row.estimator) for row in exact) and not offloads(best.estimator):
            which += " without offloading"
        return best.estimator, f"Use {best.method}, {which}: {_cost_text(best)}."
    reason = _why_none_exact(budget, least, is_asked=any(row.exact for row in rows))
    inexact = [row for row in fitting if row.steps is not None] or fitting
    if inexact:
        best = min(inexact, key=lambda row: (_preference(row)[1] * (row.steps or 1), *_preference(row)[2:]))
        steps = "" if best.steps is None else f", and in theory {best.steps_text} times the steps"
        return best.estimator, f"{reason} Use {best.method}, which fits: {_cost_text(best)}{steps}."
    others = [row for row in rows if not row.exact and row.forecast is not None]
    if others:
        best = min(others, key=lambda row: (row.forecast.peak, row.forecast.flops) if row.forecast else (0, 0))
        assert best.forecast is not None
        return None, f"{reason} {best.method} needs {size(best.forecast.peak)}."
    return None, reason


def _preference(row: Row) -> tuple[float, ...]:
    """Sort key: no offloading (its transfers are not counted), seconds or FLOPs, the shortest expression, bytes."""
    assert row.forecast is not None
    cost = row.forecast.flops if row.seconds is None else row.seconds
    return (offloads(row.estimator), cost, len(label(row.estimator)), row.forecast.peak)


def _cost_text(row: Row) -> str:
    assert row.forecast is not None
    duration = "" if row.seconds is None else f", about {number(row.seconds, 2)} s"
    return f"{size(row.forecast.peak)} at the peak, {row.forecast.forwards:.1f} forwards{duration} a step"


def _why_none_exact(budget: int, least: Least | None, is_asked: bool) -> str:
    """Return why no row has an exact gradient that fits, with the least memory that an exact gradient needs."""
    if least is None:
        return "No exact gradient can be computed here, whatever the budget."
    if least.forecast.peak <= budget:
        none = f"None of these exact gradients fits {size(budget)}" if is_asked else "No exact gradient was asked for"
        return (
            f"{none}, but {described(least.estimator)} {'does' if is_asked else f'fits {size(budget)}'}: "
            f"{size(least.forecast.peak)}, {least.forecast.forwards:.1f} forwards, written {label(least.estimator)}."
        )
    needed = f"{size(least.forecast.peak)} ({described(least.estimator)}, {least.forecast.forwards:.1f} forwards)"
    return f"{size(budget)} is less than any exact gradient needs with these settings: {needed}."


def main_rows(rows: Sequence[Row], choice: Estimator | None) -> list[Row]:
    """Return the rows to read first, at most 6, in the order of the table: the choice, and one of each family.

    Families: backprop without recomputation, with it, with micro-batches, forward mode, finite differences, and each
    other type of estimator. Of a family it is the row that fits with the fewest FLOPs; if none fits, the one with the
    smallest peak.

    Args:
        rows: the rows of a plan.
        choice: the estimator that the plan recommends.
    """
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(family(row.estimator), []).append(row)
    chosen = [row for row in rows if row.estimator == choice]
    firsts = [min(members, key=_order) for members in families.values()]
    kept = [*chosen, *(row for row in firsts if row not in chosen)][:6]
    return [row for row in rows if row in kept]


def _order(row: Row) -> tuple[bool, bool, float, float]:
    if row.forecast is None:
        return True, True, 0.0, 0.0
    flops, peak = row.forecast.flops, row.forecast.peak
    return False, not row.fits, *((flops, peak) if row.fits else (peak, flops))


def family(estimator: Estimator) -> str:
    """Return the family of an estimator, as in `main_rows`."""
    match estimator:
        case Reverse(Everything()):
            return "backprop"
        case Probing(slope=slope):
            return "forward mode" if slope.exact else "finite differences"
    return type(estimator).__name__
