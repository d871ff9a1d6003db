"""The data from which the page computes the answer for a budget that the reader sets: `report.js` reads it."""

from __future__ import annotations

from math import isfinite
from typing import Any

from gradcost.report.theme import protocol
from gradcost.results.guessing import guess_of, targets_of
from gradcost.results.rankings import FLOPS, SECONDS, STEPS, FinalCurves, final_curves
from gradcost.results.records import Results
from gradcost.results.statistics import interval
from gradcost.results.summary import summarise
from gradcost.results.verdict import is_sure

_POINTS = 60  # of a curve of one run, at most


def answer(results: Results) -> dict[str, Any] | None:
    """Return what the slider needs; None if no method has runs and costs to compare.

    Keys: "axes" (name, title and range of each budget, and the figure with this axis), "methods" (labels, costs and
    curves of the seeds), "metric", "ends" (by n, the place of an interval's lower end among n sorted values),
    "chance", "guess" (a phrase), "limit" (the least accuracy that is more than guessing), "sure" and "note".
    """
    curves = [each for each in final_curves(results) if each.runs]
    axes = [axis for axis in (_memory(results, curves), *_resources(curves)) if axis is not None]
    if not curves or not axes:
        return None
    metric, guess = results.study.metric, guess_of(results.study)
    exact = {row.method: row.exact for row in summarise(results)}
    counts = {len(each.runs) for each in curves}
    return {
        "axes": axes,
        "methods": [_method(each, exact[each.method], results.study.memory) for each in curves],
        "metric": {"name": metric.name, "sign": -1 if metric.lower_is_better else 1, "percent": metric.is_accuracy},
        "ends": {n: interval(range(n)).low for n in counts},
        "chance": results.study.chance,
        "guess": None if guess is None else guess.text,
        "limit": None if guess is None else guess.limit(_targets(results)),
        "sure": is_sure(results),
        "note": f"{protocol(results)} These scores are of the validation split, at the step that uses up the budget. "
        "No method was tuned for a smaller budget. The sentences above and the table are of the test split.",
    }


def _targets(results: Results) -> int | None:
    return targets_of((run for run in results.trials if run.phase == "final"), "validation")


def _method(each: FinalCurves, exact: bool, memory: int | None) -> dict[str, Any]:
    cost = each.cost
    perstep = {resource.name: resource.per_step(cost) for resource in (FLOPS, SECONDS, STEPS)}
    return {
        "method": each.method,
        "exact": exact,
        "memory": cost.peak_bytes,
        "fits": memory is None or cost.peak_bytes is None or cost.peak_bytes <= memory,
        "ms": cost.ms,
        "steps": each.steps,
        "per": perstep,
        "doubt": cost.doubt is not None,
        "runs": {str(seed): _thinned(*run) for seed, run in each.runs.items()},
    }


def _thinned(steps: list[float], values: list[float]) -> list[list[float | None]]:
    """Return steps and scores at `_POINTS` places or fewer, the last one included. None is a diverged run's score."""
    stride = max(1, -(-len(steps) // _POINTS))
    kept = sorted({*range(0, len(steps), stride), len(steps) - 1})
    return [[steps[i] for i in kept], [float(f"{values[i]:.5g}") if isfinite(values[i]) else None for i in kept]]


def _memory(results: Results, curves: list[FinalCurves]) -> dict[str, Any] | None:
    peaks = [each.cost.peak_bytes for each in curves if each.cost.peak_bytes]
    if not peaks:
        return None
    high = results.study.memory or max(peaks)
    return {"name": "memory", "title": "memory", "figure": "accuracy-memory", "low": min(*peaks, high), "high": high}


def _resources(curves: list[FinalCurves]) -> list[dict[str, Any]]:
    """Return the axes FLOPs, seconds and steps, up to the largest budget that the runs of every method cover."""
    axes = []
    for resource in (FLOPS, SECONDS, STEPS):
        costs = [(each, cost) for each in curves if (cost := resource.per_step(each.cost))]
        if not costs:
            continue
        high = min(each.steps * cost for each, cost in costs)
        low = min(min(each.first * cost for each, cost in costs), high)
        axes.append(
            {"name": resource.name, "title": resource.noun, "figure": f"quality-{resource.name}"}
            | {"low": low, "high": high}
        )
    return axes
