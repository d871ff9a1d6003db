"""Compare two results folders: what they were run with, and each method's score and cost."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isfinite, isnan

from gradcost.core.metric import Metric
from gradcost.core.units import DASH, number
from gradcost.results.contrast import test_score
from gradcost.results.records import Results
from gradcost.results.statistics import Interval, interval, score_difference
from gradcost.results.summary import MethodSummary, summarise
from gradcost.results.tuning import final_runs

COLUMNS = ("method", "first", "second", "second - first", "memory", "FLOPs", "ms")
_UNCOMPARED = ("comparison", "weights_bytes")  # follow from other fields
_MANY = 60  # characters of a setting that are shown


@dataclass(frozen=True)
class Difference:
    """A method in two folders.

    Args:
        method: its label in both.
        first: its summary in the first folder; None: it is not there.
        second: its summary in the second folder.
        paired: the score of the second folder less that of the first, over seeds that both have; None without a
            common seed. A run that diverged is infinitely bad.
    """

    method: str
    first: MethodSummary | None
    second: MethodSummary | None
    paired: Interval | None

    def cells(self, metric: Metric) -> list[str]:
        """Return the row of a table with `COLUMNS`. Costs are ratios: second / first.

        Args:
            metric: what the scores are.
        """
        first, second = self.first, self.second
        return [
            self.method,
            *(DASH if row is None or row.score is None else metric.text(row.score.median) for row in (first, second)),
            _signed(self.paired, metric),
            *(_ratio(first, second, name) for name in ("peak_bytes", "flops", "ms")),
        ]


def settings(first: Results, second: Results) -> list[tuple[str, str, str]]:
    """Return (name, first value, second value) of each setting and version that differs.

    Args:
        first: from `records.read`.
        second: from `records.read`.
    """
    pairs = [
        (field.name, getattr(first.study, field.name), getattr(second.study, field.name))
        for field in fields(first.study)
        if field.name not in _UNCOMPARED
    ]
    names = [name for name in {**first.environment, **second.environment} if name != "command"]
    pairs += [(name, first.environment.get(name, DASH), second.environment.get(name, DASH)) for name in names]
    return [(name, _short(one), _short(other)) for name, one, other in pairs if one != other]


def differences(first: Results, second: Results) -> list[Difference]:
    """Return the methods of both folders, in the order of the first one.

    Args:
        first: from `records.read`.
        second: from `records.read`.
    """
    rows = [{row.method: row for row in summarise(results)} for results in (first, second)]
    scores = [
        {method: {run.seed: test_score(run) for run in final_runs(results, method)} for method in of}
        for results, of in zip((first, second), rows, strict=True)
    ]
    return [
        Difference(method, rows[0].get(method), rows[1].get(method), _paired(*(of.get(method, {}) for of in scores)))
        for method in dict.fromkeys([*rows[0], *rows[1]])
    ]


def _paired(first: dict[int, float | None], second: dict[int, float | None]) -> Interval | None:
    changes = [
        score_difference(after, before)
        for seed, before in first.items()
        if before is not None and (after := second.get(seed)) is not None
    ]
    found = interval(changes) if changes else None
    return None if found is None or isnan(found.median) else found


def _signed(change: Interval | None, metric: Metric) -> str:
    if change is None:
        return DASH
    factor, unit = (100, " points") if metric.is_accuracy else (metric.score(1), "")
    low, middle, high = (_plus(factor * x) for x in (change.low, change.median, change.high))
    ends = (low, high) if factor > 0 else (high, low)
    return f"{middle} [{ends[0]}, {ends[1]}]{unit}" if change.n > 1 else f"{middle}{unit}, one seed"


def _plus(x: float) -> str:
    """Format a change with its sign; one to or from a run that diverged is infinite."""
    if not isfinite(x):
        return "+infinite" if x > 0 else "-infinite"
    return f"{x:+.3g}" if x else "0"


def _ratio(first: MethodSummary | None, second: MethodSummary | None, name: str) -> str:
    before, after = (None if row is None else getattr(row, name) for row in (first, second))
    if not before or after is None:
        return DASH
    return "same" if after == before else f"x {number(after / before)}"


def _short(value: object) -> str:
    if isinstance(value, tuple | list):
        value = ", ".join(map(str, value))
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text if len(text) <= _MANY else text[: _MANY - 1] + "…"
