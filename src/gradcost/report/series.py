"""Compute the data of the figures from the records. Long curves are thinned to about 100 points."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, inf, isfinite
from statistics import fmean, median
from typing import Any

from gradcost.report.families import family
from gradcost.results.records import Curve, Results
from gradcost.results.statistics import expected_best, time_to_target
from gradcost.results.summary import MethodSummary, span, summarise, tuning
from gradcost.results.tuning import final_runs, runs_of
from gradcost.results.wording import percent

WINDOWS = 100  # largest number of points of a thinned curve
_ENDED = ("finished", "diverged")  # failed runs are omitted
# Returns the steps and the values of one curve of a run.
Points = Callable[[Curve], tuple[tuple[int, ...], tuple[float | None, ...]]]


def training(curve: Curve) -> tuple[tuple[int, ...], tuple[float | None, ...]]:
    """Return the training loss at each recorded step."""
    return curve.step, curve.loss


def validation(curve: Curve) -> tuple[tuple[int, ...], tuple[float | None, ...]]:
    """Return the validation loss at each evaluation."""
    return curve.validation_step, curve.validation_loss


def slopes(curve: Curve) -> tuple[tuple[int, ...], tuple[float | None, ...]]:
    """Return the largest |slope| since the previous recorded step, at each recorded step."""
    return curve.step, curve.slope


def window(results: Results, points: Points) -> int:
    """Return the number of steps per point of a thinned curve, a multiple of the recording interval, or 1."""
    curves = [points(t.curve)[0] for t in results.trials if t.phase == "final"]
    longest = max(curves, key=len, default=())
    return 1 if len(longest) <= WINDOWS else _stride(longest) * ceil(len(longest) / WINDOWS)


def _stride(steps: tuple[int, ...]) -> int:
    """Return the number of steps between two recorded steps."""
    return steps[1] - steps[0] if len(steps) > 1 else 1


def curves(results: Results, points: Points, gather: Callable[[list[float]], float] = fmean) -> list[dict[str, Any]]:
    """Return the median over seeds at each step, and the lowest and highest seed.

    From its divergence on, the value of a run counts as infinite. A step whose median is infinite has no row.

    Args:
        results: from `read`.
        points: selects the curve: `training`, `validation` or `slopes`.
        gather: reduces the values of one window of steps to one value.
    Returns:
        One dictionary per method and step: "method", "place" (index of the step), "step", "median", "low" and "high".
    """
    width = window(results, points)
    rows = []
    for method in _methods(results):
        by_step: dict[int, dict[int, float]] = {}  # the value of each run, by the index of the run
        runs = [trial for trial in final_runs(results, method) if trial.status in _ENDED]
        for i, trial in enumerate(runs):
            for step, value in _thinned(*points(trial.curve), width, gather):
                by_step.setdefault(step, {})[i] = value
        divergences = {i: trial.steps for i, trial in enumerate(runs) if trial.status == "diverged"}
        spreads = {
            step: _spread([*values.values()], sum(end <= step and i not in values for i, end in divergences.items()))
            for step, values in sorted(by_step.items())
        }
        rows += [
            {"method": method, "place": i, "step": step, **spread}
            for i, (step, spread) in enumerate(spreads.items())
            if isfinite(spread["median"])
        ]
    return rows


def _spread(values: list[float], diverged: int) -> dict[str, float]:
    """Return median, lowest and highest, to five digits. The median includes `diverged` more values, all infinite."""
    ends = {"median": median([*values, *[inf] * diverged]), "low": min(values), "high": max(values)}
    return {name: float(f"{x:.5g}") for name, x in ends.items()}


def _thinned(
    steps: tuple[int, ...],
    values: tuple[float | None, ...],
    width: int,
    gather: Callable[[list[float]], float],
) -> list[tuple[int, float]]:
    """Return (step, value) for each window of `width` steps; the step is the middle of the window."""
    if width == 1:
        return [(step, value) for step, value in zip(steps, values, strict=False) if value is not None]
    if not steps:
        return []
    windows: dict[int, list[float]] = {}
    first, stride = steps[0], _stride(steps)
    for step, value in zip(steps, values, strict=False):
        if value is not None:
            windows.setdefault((step - first) // width, []).append(value)
    middle = (width - stride) // 2
    return [(first + i * width + middle, gather(members)) for i, members in windows.items()]


Rows = list[dict[str, Any]]  # the data of one layer of a figure


def frontier(results: Results) -> tuple[Rows, Rows, Rows]:
    """Return the data of accuracy against memory: one row per method, per finished run, and per diverged run."""
    rows, seeds, diverged = [], [], []
    for row in summarise(results):
        accuracy = row.accuracy
        if accuracy is None or not row.peak_bytes:
            continue
        place = {"method": row.method, "bytes": row.peak_bytes}
        ends = {name: max(getattr(accuracy, name), 0.0) for name in ("median", "low", "high")}
        texts = {"middle": percent(accuracy.median), "reach": span(accuracy), "lost": not isfinite(accuracy.median)}
        kind = family(row.estimator, row.optimizer)
        rows.append({**place, **ends, **texts, "seeds": accuracy.n, "family": kind})
        for trial in final_runs(results, row.method):
            run = {**place, "seed": trial.seed, "status": trial.status}
            if trial.status == "diverged":
                diverged.append(run)
            elif trial.status == "finished" and trial.test and trial.test.accuracy is not None:
                seeds.append({**run, "accuracy": trial.test.accuracy})
    return rows, seeds, diverged


def breakdowns(results: Results) -> list[dict[str, Any]]:
    """Return the bytes at each method's peak by purpose, for methods whose peak was recorded."""
    methods = set(_methods(results))
    return [
        {"method": cost.method, "breakdown": used, "peak": sum(used.values())}
        | {"operator": cost.operator, "module": cost.module}
        for cost in results.costs
        if cost.method in methods and (used := {name: n for name, n in (cost.breakdown or {}).items() if n})
    ]


def grid(results: Results) -> list[dict[str, Any]]:
    """Return one row per tuning run. A diverged run has the height of its cross as "accuracy", below 0."""
    rows, cross_row = [], 0
    methods = summarise(results)
    height = min(0.035, 0.25 / max(len(methods), 1))
    for row in methods:
        tried = tuning(runs_of(results, row.method), row.method)
        cross_row += any(t.status == "diverged" for t in tried)
        for trial in tried:
            point = {"method": row.method, "lr": trial.lr, "status": trial.status}
            accuracy = trial.validation.accuracy if trial.validation else None
            if trial.status == "finished" and accuracy is not None:
                rows.append({**point, "accuracy": accuracy, "chosen": trial.lr == row.lr})
            elif trial.status == "diverged":
                rows.append({**point, "accuracy": -height * cross_row, "chosen": False})
    return rows


def estimates(results: Results, what: str) -> tuple[Rows, Rows]:
    """Return rows with the "cosine" or "error" of each method and two standard errors, and rows of the theory."""
    rows, curves = [], {}
    methods = set(_methods(results))
    for quality in results.qualities:
        value, spread = getattr(quality, what), getattr(quality, f"{what}_se") or 0.0
        if quality.method not in methods or not quality.probes or value is None or value <= 0:
            continue
        ends = {"value": value, "low": max(value - 2 * spread, value / 4), "high": value + 2 * spread}
        cut = {"cut": value - 2 * spread < value / 4}  # the low end is cut for the logarithmic axis
        theory = quality.theory or {}
        curve = [(n, y) for n, y in zip(theory.get("probes", ()), theory.get(what, ()), strict=True) if n and y]
        expected = dict(curve).get(quality.probes)
        predicted = {"theory": "unknown" if expected is None else f"{expected:.3g}"}
        setting = {"draws": quality.draws, "dimension": quality.dimension}
        rows.append({"method": quality.method, "probes": quality.probes} | ends | predicted | setting | cut)
        if curve:
            curves.setdefault(tuple(curve), len(curves))
    lines = [{"curve": i, "probes": n, "value": y} for curve, i in curves.items() for n, y in curve]
    return rows, lines


def spikes(results: Results) -> tuple[Rows, dict[str, tuple[int, int]]]:
    """Return one row per spike of the final runs, and {method: (number of spikes, number of slopes)}."""
    rows, counted = [], {}
    for method in _methods(results):
        runs = [run for run in final_runs(results, method) if run.slopes]
        if runs:
            slopes = [run.slopes or {} for run in runs]
            counted[method] = (sum(each["spikes"] for each in slopes), sum(each["number"] for each in slopes))
        for run in runs:
            origin = {"method": method, "seed": run.seed}
            rows += [{**origin, **spike} for spike in (run.slopes or {})["first"] if spike["slope"] is not None]
    return rows, counted


def bars(results: Results, get: Callable[[MethodSummary], dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per method with the values of `get`; a method with a value None is omitted."""
    rows = [{"method": row.method, **get(row)} for row in summarise(results)]
    return [row for row in rows if None not in row.values()]


def _methods(results: Results) -> list[str]:
    return [row.method for row in summarise(results)]


def expected(results: Results) -> list[dict[str, Any]]:
    """Return each method's expected best accuracy of 1, 2, ... tuning points. Diverged points count as guessing."""
    rows = []
    for method in _methods(results):
        scores = []
        for run in tuning(runs_of(results, method), method):
            accuracy = run.validation.accuracy if run.validation else None
            if run.status == "diverged":
                accuracy = results.study.chance or 0.0
            if run.status in _ENDED and accuracy is not None:
                scores.append(accuracy)
        rows += [
            {"method": method, "points": n, "best": float(f"{expected_best(scores, n):.5g}")}
            for n in range(1, len(scores) + 1)
        ]
    return rows


def reaching(results: Results) -> tuple[list[dict[str, Any]], bool, list[str]]:
    """Return the fraction of runs of each method that reached the target accuracy, as a function of time.

    Returns:
        (rows, timed, never). timed: True for times in seconds, False for steps because some method has no seconds per
        step. never: methods that never reached the target; they have no rows.
    """
    ended = {m: [t for t in final_runs(results, m) if t.status in _ENDED] for m in _methods(results)}
    runs = {method: trials for method, trials in ended.items() if trials}
    seconds = {cost.method: cost.ms / 1000 for cost in results.costs if cost.ms is not None}
    timed = set(runs) <= set(seconds)
    per_step = {method: seconds[method] if timed else 1.0 for method in runs}
    rows, never = [], []
    last = max((per_step[m] * max(results.study.steps, *(t.steps for t in runs[m])) for m in runs), default=0.0)
    for method, trials in runs.items():
        reached = [t.reached if t.status == "finished" else None for t in trials]
        times = [None if step is None else step * per_step[method] for step in reached]
        ends = [last if t.status == "diverged" else t.steps * per_step[method] for t in trials]
        curve = time_to_target(times, ends)
        if not curve.times:
            never.append(method)
            continue
        points = [(0.0, 0.0, 0.0, 0.0), *zip(curve.times, curve.share, curve.low, curve.high, strict=True)]
        points.append((max(max(ends), *curve.times), *points[-1][1:]))
        for place, values in enumerate(points):
            point = dict(zip(("time", "share", "low", "high"), (float(f"{x:.5g}") for x in values), strict=True))
            rows.append({"method": method, "step": 0 < place < len(points) - 1, **point})
    return rows, timed, never
