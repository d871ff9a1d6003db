"""The rows that the figures draw, from the records alone; a curve is thinned to what a figure can show."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import ceil, inf, isfinite
from statistics import mean, median
from typing import Any

from gradcost.results.records import Curve, Results
from gradcost.results.statistics import expected_best, time_to_target
from gradcost.results.summary import Row, span, summarise, tuning
from gradcost.results.tuning import finals
from gradcost.results.wording import percent

WINDOWS = 100  # points a curve, over all its steps
_ENDED = ("finished", "diverged")  # by themselves; a run that failed says nothing
Points = Callable[[Curve], tuple[tuple[int, ...], tuple[float | None, ...]]]


def training(curve: Curve) -> tuple[tuple[int, ...], tuple[float | None, ...]]:
    """The training loss of each recorded step."""
    return curve.step, curve.loss


def validation(curve: Curve) -> tuple[tuple[int, ...], tuple[float | None, ...]]:
    """The validation loss of each evaluation."""
    return curve.validation_step, curve.validation_loss


def slopes(curve: Curve) -> tuple[tuple[int, ...], tuple[float | None, ...]]:
    """The largest |slope| since the last recorded step."""
    return curve.step, curve.slope


def window(results: Results, points: Points) -> int:
    """How many steps are gathered to one point of a curve, whole strides of the recording: 1 when the curve is short
    enough as it is."""
    curves = [points(t.curve)[0] for t in results.trials if t.phase == "final"]
    longest = max(curves, key=len, default=())
    return 1 if len(longest) <= WINDOWS else _stride(longest) * ceil(len(longest) / WINDOWS)


def _stride(steps: tuple[int, ...]) -> int:
    return steps[1] - steps[0] if len(steps) > 1 else 1


def curves(results: Results, points: Points, gather: Callable[[list[float]], float] = mean) -> list[dict[str, Any]]:
    """The median over the seeds at each step, and the least and the greatest seed about it.

    gather: makes one value of those that fall into one point of a curve.

    A run that diverged counts as the greatest from there on; where the median is such a one there is no row.
    """
    width = window(results, points)
    rows = []
    for method in _methods(results):
        at: dict[int, dict[int, float]] = {}  # by step, then by run
        runs = [trial for trial in finals(results.trials, method) if trial.status in _ENDED]
        for place, trial in enumerate(runs):
            for step, value in _thinned(*points(trial.curve), width, gather):
                at.setdefault(step, {})[place] = value
        ends = {place: trial.steps for place, trial in enumerate(runs) if trial.status == "diverged"}
        spreads = {
            step: _spread([*values.values()], sum(end <= step and i not in values for i, end in ends.items()))
            for step, values in sorted(at.items())
        }
        rows += [
            {"method": method, "place": i, "step": step, **spread}
            for i, (step, spread) in enumerate(spreads.items())
            if isfinite(spread["median"])
        ]
    return rows


def _spread(values: list[float], lost: int) -> dict[str, float]:
    """Median, least and greatest, to the five digits that a figure can show; `lost` more runs have diverged."""
    ends = {"median": median([*values, *[inf] * lost]), "low": min(values), "high": max(values)}
    return {name: float(f"{x:.5g}") for name, x in ends.items()}


def _thinned(
    steps: tuple[int, ...],
    values: tuple[float | None, ...],
    width: int,
    gather: Callable[[list[float]], float],
) -> list[tuple[int, float]]:
    """What `gather` makes of each window of `width` steps, at its middle; a window of one step is the step."""
    if not steps:
        return []
    windows: dict[int, list[float]] = {}
    first, stride = steps[0], _stride(steps)
    for step, value in zip(steps, values, strict=False):
        if value is not None:
            windows.setdefault((step - first) // width, []).append(value)
    middle = 0 if width == 1 else (width - stride) // 2
    return [(first + i * width + middle, gather(found)) for i, found in windows.items()]


Rows = list[dict[str, Any]]


def frontier(results: Results) -> tuple[Rows, Rows, Rows]:
    """Accuracy against memory: a row a method, a row a seed of it that finished, and a row a seed that diverged."""
    rows, seeds, fallen = [], [], []
    for row in summarise(results):
        found = row.accuracy
        if found is None or not row.peak_bytes:
            continue
        place = {"method": row.method, "bytes": row.peak_bytes}
        ends = {name: max(getattr(found, name), 0.0) for name in ("median", "low", "high")}
        told = {"middle": percent(found.median), "reach": span(found), "lost": not isfinite(found.median)}
        family = re.sub(r"\d[\d.e-]*", "#", f"{row.estimator} {row.optimizer}")
        rows.append({**place, **ends, **told, "seeds": found.n, "family": family})
        for trial in finals(results.trials, row.method):
            run = {**place, "seed": trial.seed, "status": trial.status}
            if trial.status == "diverged":
                fallen.append(run)
            elif trial.status == "finished" and trial.test and trial.test.accuracy is not None:
                seeds.append({**run, "accuracy": trial.test.accuracy})
    return rows, seeds, fallen


def breakdowns(results: Results) -> list[dict[str, Any]]:
    """What the bytes at each method's peak are for, where it was recorded."""
    methods = set(_methods(results))
    return [
        {"method": cost.method, "breakdown": held, "peak": sum(held.values())}
        | {"operator": cost.operator, "module": cost.module}
        for cost in results.costs
        if cost.method in methods and (held := {name: n for name, n in (cost.breakdown or {}).items() if n})
    ]


def grid(results: Results) -> list[dict[str, Any]]:
    """The tuning runs: the accuracy of each, or the lane that its cross stands in when it diverged."""
    rows, lane = [], 0
    methods = summarise(results)
    height = min(0.035, 0.25 / max(len(methods), 1))
    for row in methods:
        tried = tuning(results.trials, row.method)
        lane += any(t.status == "diverged" for t in tried)
        for trial in tried:
            made = {"method": row.method, "lr": trial.lr, "status": trial.status}
            accuracy = trial.validation.accuracy if trial.validation else None
            if trial.status == "finished" and accuracy is not None:
                rows.append({**made, "accuracy": accuracy, "chosen": trial.lr == row.lr})
            elif trial.status == "diverged":
                rows.append({**made, "accuracy": -height * lane, "chosen": False})
    return rows


def estimates(results: Results, what: str) -> tuple[Rows, Rows]:
    """`what`, cosine or error, of each method against its probes with two standard errors; and theory's curves."""
    rows, curves = [], {}
    methods = set(_methods(results))
    for quality in results.qualities:
        value, spread = getattr(quality, what), getattr(quality, f"{what}_se") or 0.0
        if quality.method not in methods or not quality.probes or value is None or value <= 0:
            continue
        ends = {"value": value, "low": max(value - 2 * spread, value / 4), "high": value + 2 * spread}
        cut = {"cut": value - 2 * spread < value / 4}
        theory = quality.theory or {}
        told = [(n, y) for n, y in zip(theory.get("probes", ()), theory.get(what, ()), strict=True) if n and y]
        own = dict(told).get(quality.probes)
        named = {"theory": "unknown" if own is None else f"{own:.3g}"}
        known = {"draws": quality.draws, "dimension": quality.dimension}
        rows.append({"method": quality.method, "probes": quality.probes} | ends | named | known | cut)
        if told:
            curves.setdefault(tuple(told), len(curves))
    lines = [{"curve": i, "probes": n, "value": y} for told, i in curves.items() for n, y in told]
    return rows, lines


def spikes(results: Results) -> tuple[Rows, dict[str, tuple[int, int]]]:
    """A row a spike of a final run; and of each method that measures slopes how many spiked, of how many."""
    rows, counted = [], {}
    for method in _methods(results):
        runs = [run for run in finals(results.trials, method) if run.slopes]
        if runs:
            found = [run.slopes or {} for run in runs]
            counted[method] = (sum(told["spikes"] for told in found), sum(told["number"] for told in found))
        for run in runs:
            named = {"method": method, "seed": run.seed}
            rows += [{**named, **spike} for spike in (run.slopes or {})["first"] if spike["slope"] is not None]
    return rows, counted


def bars(results: Results, get: Callable[[Row], dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a method of what `get` finds, where it finds all of it."""
    found = [{"method": row.method, **get(row)} for row in summarise(results)]
    return [row for row in found if None not in row.values()]


def _methods(results: Results) -> list[str]:
    return [row.method for row in summarise(results)]


def expected(results: Results) -> list[dict[str, Any]]:
    """The expected best accuracy of 1, 2, ... of each method's tuning points; one that diverged is guessing."""
    rows = []
    for method in _methods(results):
        scores = []
        for run in tuning(results.trials, method):
            found = run.validation.accuracy if run.validation else None
            if run.status == "diverged":
                found = results.study.chance or 0.0
            if run.status in _ENDED and found is not None:
                scores.append(found)
        rows += [
            {"method": method, "points": n, "best": float(f"{expected_best(scores, n):.5g}")}
            for n in range(1, len(scores) + 1)
        ]
    return rows


def reaching(results: Results) -> tuple[list[dict[str, Any]], bool, list[str]]:
    """Who has reached the target by when; whether time is in seconds, else in steps; and who never did."""
    ended = {m: [t for t in finals(results.trials, m) if t.status in _ENDED] for m in _methods(results)}
    runs = {method: found for method, found in ended.items() if found}
    clock = {cost.method: cost.ms / 1000 for cost in results.costs if cost.ms is not None}
    timed = set(runs) <= set(clock)
    price = {method: clock[method] if timed else 1.0 for method in runs}
    rows, never = [], []
    last = max((price[m] * max(results.study.steps, *(t.steps for t in runs[m])) for m in runs), default=0.0)
    for method, found in runs.items():
        came = [t.reached if t.status == "finished" else None for t in found]
        times = [None if step is None else step * price[method] for step in came]
        ends = [last if t.status == "diverged" else t.steps * price[method] for t in found]
        curve = time_to_target(times, ends)
        if not curve.times:
            never.append(method)
            continue
        points = [(0.0, 0.0, 0.0, 0.0), *zip(curve.times, curve.share, curve.low, curve.high, strict=True)]
        points.append((max(max(ends), *curve.times), *points[-1][1:]))
        for place, values in enumerate(points):
            made = dict(zip(("time", "share", "low", "high"), (float(f"{x:.5g}") for x in values), strict=True))
            rows.append({"method": method, "step": 0 < place < len(points) - 1, **made})
    return rows, timed, never
