"""The rows that the figures draw, from the records alone; a curve is thinned to what a figure can show."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from statistics import mean
from typing import Any

from gradcost.report.summary import Row, finals, summarise, tuning
from gradcost.study.records import Curve, Results, Trial

WINDOWS = 100  # points a curve, over all its steps
Points = Callable[[Curve], tuple[tuple[int, ...], tuple[float | None, ...]]]


def training(curve: Curve) -> tuple[tuple[int, ...], tuple[float | None, ...]]:
    """The training loss of each recorded step."""
    return curve.step, curve.loss


def validation(curve: Curve) -> tuple[tuple[int, ...], tuple[float | None, ...]]:
    """The validation loss of each evaluation."""
    return curve.validation_step, curve.validation_loss


def window(results: Results, points: Points) -> int:
    """How many steps are averaged to one point of a curve: 1 when the curve is short enough as it is."""
    curves = [points(t.curve)[0] for t in results.trials if t.phase == "final"]
    if max(map(len, curves), default=0) <= WINDOWS:
        return 1
    return ceil((max(max(steps) for steps in curves if steps) + 1) / WINDOWS)


def curves(results: Results, points: Points) -> list[dict[str, Any]]:
    """The mean over the finished seeds at each step, and the least and the greatest seed about it."""
    width = window(results, points)
    rows = []
    for method in _methods(results):
        at: dict[int, list[float]] = {}
        for trial in _finished(results, method):
            for step, value in _thinned(*points(trial.curve), width):
                at.setdefault(step, []).append(value)
        rows += [
            {"method": method, "place": i, "step": step, **_spread(values)}
            for i, (step, values) in enumerate(sorted(at.items()))
        ]
    return rows


def _spread(values: list[float]) -> dict[str, float]:
    """Mean, least and greatest, to the five digits that a figure can show."""
    ends = {"mean": mean(values), "low": min(values), "high": max(values)}
    return {name: float(f"{x:.5g}") for name, x in ends.items()}


def _thinned(steps: tuple[int, ...], values: tuple[float | None, ...], width: int) -> list[tuple[int, float]]:
    """The mean of each window of `width` steps, at the window's middle; a window of one step is the step."""
    windows: dict[int, list[float]] = {}
    for step, value in zip(steps, values, strict=False):
        if value is not None:
            windows.setdefault(step // width, []).append(value)
    return [(i * width + width // 2, mean(found)) for i, found in windows.items()]


def frontier(results: Results) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Accuracy against memory: a row a method, and a row a seed of it."""
    rows, seeds = [], []
    for row in summarise(results):
        found = row.accuracy
        if found is None or not row.peak_bytes:
            continue
        place = {"method": row.method, "bytes": row.peak_bytes}
        low, high = (found.mean if end is None else end for end in (found.low, found.high))
        rows.append({**place, "mean": found.mean, "low": low, "high": high, "seeds": found.n})
        for trial in _finished(results, row.method):
            if trial.test and trial.test.accuracy is not None:
                seeds.append({**place, "accuracy": trial.test.accuracy, "seed": trial.seed})
    return rows, seeds


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


def bars(results: Results, get: Callable[[Row], dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a method of what `get` finds, where it finds all of it."""
    found = [{"method": row.method, **get(row)} for row in summarise(results)]
    return [row for row in found if None not in row.values()]


def _methods(results: Results) -> list[str]:
    return [row.method for row in summarise(results)]


def _finished(results: Results, method: str) -> list[Trial]:
    return [t for t in finals(results.trials, method) if t.status == "finished"]
