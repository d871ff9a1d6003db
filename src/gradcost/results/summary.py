"""A summary per method.

- Accuracies are medians over the seeds of the final runs, with distribution-free intervals.
- A diverged run counts as the worst value.
- Only final runs at one learning rate count, one per seed (`tuning.finals`). Other final runs are ignored, such as
  runs from before a grid was widened.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import inf, isfinite
from statistics import mean, median
from typing import Any

from gradcost.core.metric import Metric
from gradcost.results.records import Cost, Results, TrialRecord
from gradcost.results.statistics import Interval, interval
from gradcost.results.tuning import chosen, edge, final_runs, runs_of
from gradcost.results.wording import bare

_BACKPROP = ("Reverse(", "Accumulated(estimator=Reverse(")


@dataclass(frozen=True)
class MethodSummary:
    """One row of the decision table. Values that were not measured are None."""

    method: str
    estimator: str
    optimizer: str | None
    lr: float | None
    edge: str | None  # "smallest" or "largest" if `lr` is an edge of the grid, else None
    grid: tuple[float, ...]
    accuracies: tuple[float, ...]  # of the test split, by seed; -inf where the run diverged
    accuracy: Interval | None
    loss: Interval | None
    planned: int  # number of planned final runs, one per seed
    seeds: int  # number of final runs that finished and were tested
    diverged: int
    failed: int
    peak_bytes: int | None
    flops: int | None
    forwards: float | None
    ms: float | None
    ms_low: float | None
    ms_high: float | None
    doubt: str | None
    fits: bool | None
    steps_to_target: float | None
    reached: int  # number of seeds that reached the target
    seconds_to_target: float | None
    clip_rate: float | None
    scores: tuple[float, ...] = ()  # `Scores.score` of the test split, by seed; -inf where the run diverged
    score: Interval | None = None
    exact: bool = False  # the estimator computes the exact gradient of the batch
    tuned_away: bool = False  # every tuning run diverged, so no final run was possible

    @property
    def ended(self) -> int:
        """Number of final runs so far, one per seed, also those that diverged or failed."""
        return self.seeds + self.diverged + self.failed


def plain(row: MethodSummary) -> dict[str, Any]:
    """Return a row as JSON. Values that are not finite, such as accuracies of diverged runs, become None."""
    fields = asdict(row)
    for name in ("accuracy", "loss", "score"):
        fields[name] = fields[name] and {key: _finite(x) for key, x in fields[name].items()}
    return fields | {name: [_finite(x) for x in getattr(row, name)] for name in ("accuracies", "scores")}


def _finite(x: float) -> float | None:
    return x if isfinite(x) else None


def tuning(trials: Iterable[TrialRecord], method: str) -> list[TrialRecord]:
    """Return the tuning runs of `method`, in the order of their learning rates."""
    return sorted((t for t in trials if t.method == method and t.phase == "tune"), key=lambda t: t.lr)


def summarise(results: Results) -> list[MethodSummary]:
    """Summarise each method of a study, except refused methods.

    Args:
        results: from `read`. The summary is cached per object.
    Returns:
        One row per method, in the study's order.
    """
    return list(_rows(results))


@lru_cache(maxsize=4)
def _rows(results: Results) -> tuple[MethodSummary, ...]:
    refused = {refusal.method for refusal in results.refused} - {run.method for run in results.trials}
    methods = [*results.study.methods, *(r.method for r in (*results.costs, *results.trials))]
    return tuple(_row(results, method) for method in dict.fromkeys(methods) if method not in refused)


def _row(results: Results, method: str) -> MethodSummary:
    cost = next((c for c in results.costs if c.method == method), None)
    trials, runs = runs_of(results, method), final_runs(results, method)
    finished = [t for t in runs if t.status == "finished" and t.test]
    grid = tuple(sorted({t.lr for t in trials if t.phase == "tune"}))
    lr = runs[0].lr if runs else chosen(trials, method)
    reached = [t.reached for t in finished if t.reached is not None]
    steps = median(reached) if reached else None
    sources: list[TrialRecord | Cost] = [*runs, *trials, *([cost] if cost else [])]
    cost = cost or Cost(method, "")
    clips = [t.clip_rate for t in finished if t.clip_rate is not None]
    accuracies = tuple(_results(runs, "accuracy", -inf))
    losses = list(_results(runs, "loss", inf))
    scores = tuple(_results(runs, "score", -inf))
    return MethodSummary(
        method=method,
        estimator=sources[0].estimator if sources else "",
        optimizer=runs[0].optimizer if runs else None,
        lr=lr,
        edge=edge(grid, lr),
        grid=grid,
        accuracies=accuracies,
        accuracy=interval(accuracies) if accuracies else None,
        loss=interval(losses) if losses else None,
        planned=max(len(results.study.seeds), len(runs)),
        seeds=len(finished),
        diverged=sum(t.status == "diverged" for t in runs),
        failed=sum(t.status == "failed" for t in runs),
        peak_bytes=cost.peak_bytes,
        flops=cost.flops,
        forwards=cost.forwards,
        ms=cost.ms,
        ms_low=cost.ms_low,
        ms_high=cost.ms_high,
        doubt=cost.doubt,
        fits=cost.fits,
        steps_to_target=steps,
        reached=len(reached),
        seconds_to_target=None if steps is None or cost.ms is None else steps * cost.ms / 1000,
        clip_rate=mean(clips) if clips else None,
        scores=scores,
        score=interval(scores) if scores else None,
        exact=is_exact(sources),
        tuned_away=bool(grid) and not runs and all(t.status == "diverged" for t in trials),
    )


def is_exact(records: Iterable[TrialRecord | Cost]) -> bool:
    """Return whether a method has the exact gradient. Older records lack this field; there the repr decides.

    Args:
        records: records of the method.
    """
    records = list(records)
    known = [record.exact for record in records if record.exact is not None]
    return known[-1] if known else any(record.estimator.startswith(_BACKPROP) for record in records)


def _results(runs: Iterable[TrialRecord], name: str, worst: float) -> Iterator[float]:
    """The test score of each final run, `worst` for a diverged one; failed and untested runs are omitted."""
    for run in runs:
        score = getattr(run.test, name, None)
        if run.status == "diverged":
            yield worst
        elif run.status == "finished" and score is not None:
            yield score


def span(accuracy: Interval) -> str:
    """Format the interval of an accuracy in percent: [96.2, 98.0] or [diverged, 98.0]; empty for one seed."""
    if accuracy.n == 1:
        return ""
    return f"[{bare(accuracy.low)}, {bare(accuracy.high)}]"


def metric_text(score: Interval, metric: Metric) -> str:
    """Format the median of a metric and its interval, the smaller value first: 0.31 [0.29, 0.33]."""
    ends = [metric.text(x) for x in (score.low, score.high)]
    if metric.lower_is_better:
        ends.reverse()
    return metric.text(score.median) + ("" if score.n == 1 else f" [{', '.join(ends)}]")
