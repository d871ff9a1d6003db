"""A summary per method, and which method to use.

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

from gradcost.results.records import Cost, Results, StudyRecord, TrialRecord
from gradcost.results.statistics import Interval, guessing_limit, interval
from gradcost.results.tuning import chosen, edge, finals
from gradcost.results.wording import bare, count, listed, number, percent, points, size

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
    exact: bool = False  # the estimator computes the exact gradient of the batch
    tuned_away: bool = False  # every tuning run diverged, so no final run was possible


def plain(row: MethodSummary) -> dict[str, Any]:
    """Return a row as JSON. Values that are not finite, such as accuracies of diverged runs, become None."""
    fields = asdict(row)
    for name in ("accuracy", "loss"):
        fields[name] = fields[name] and {key: _finite(x) for key, x in fields[name].items()}
    return fields | {"accuracies": [_finite(x) for x in row.accuracies]}


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
    trials = [t for t in results.trials if t.method == method]
    runs = finals(trials, method)
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
        exact=_exact(sources),
        tuned_away=bool(grid) and not runs and all(t.status == "diverged" for t in trials),
    )


def _exact(records: Iterable[TrialRecord | Cost]) -> bool:
    """Whether the method is exact. Older records lack this field; there the estimator's repr decides."""
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


@dataclass(frozen=True)
class Recommendation:
    """The method to use, and the other methods whose accuracy is within the interval of the best method."""

    row: MethodSummary
    alike: tuple[MethodSummary, ...]


def candidates(rows: Iterable[MethodSummary]) -> list[MethodSummary]:
    """Return the methods that may be recommended: the median is finite, and `fits` is True or unknown."""
    return [row for row in rows if row.accuracy and isfinite(row.accuracy.median) and row.fits is not False]


def _finished(row: MethodSummary) -> list[float]:
    return [x for x in row.accuracies if isfinite(x)]


def penalized_accuracy(row: MethodSummary, study: StudyRecord) -> float:
    """Return the accuracy by which methods are compared.

    Formula: (finished * median accuracy of finished runs + diverged * accuracy of guessing) / runs, with the numbers
    of finished runs, diverged runs and all runs. So a method that sometimes
    diverges is not recommended for its good runs alone.
    """
    finished = _finished(row)
    typical = median(finished) if finished else 0.0
    diverged = len(row.accuracies) - len(finished)
    return (len(finished) * typical + diverged * (study.chance or 0.0)) / max(len(row.accuracies), 1)


def choose(rows: Iterable[MethodSummary], study: StudyRecord) -> Recommendation | None:
    """Return the method with the least memory, then the shortest step, among those as accurate as the best.

    Rule: let b be the best penalized accuracy, and [low, high] the interval of the median of that method's finished
    runs. A method is as accurate as the best if its penalized accuracy is at least b - (median - low).
    """
    pool = candidates(rows)
    if not pool:
        return None
    best = max(pool, key=lambda row: penalized_accuracy(row, study))
    best_interval = interval(_finished(best))
    limit = penalized_accuracy(best, study) - (best_interval.median - best_interval.low)
    near = [row for row in pool if penalized_accuracy(row, study) >= limit]
    pick = min(near, key=lambda row: (*_cost(row), -penalized_accuracy(row, study)))
    return Recommendation(pick, tuple(row for row in near if row is not pick))


def _cost(row: MethodSummary) -> tuple[float, float]:
    """Peak bytes and milliseconds of a step; inf if not measured."""
    return _if_none(row.peak_bytes, inf), _if_none(row.ms, inf)


def verdict(results: Results) -> str:
    """Recommend a method, and compare it with the best method of the other kind.

    The two kinds are methods with the exact gradient of a batch, and methods with an estimated gradient.

    Args:
        results: from `read`.
    Returns:
        One or two sentences; if no method can be recommended, the reason.
    """
    return " ".join(sentences(results))


def sentences(results: Results) -> list[str]:
    """Return the sentences of the verdict."""
    rows, study = summarise(results), results.study
    choice = choose(rows, study)
    if choice is None:
        return [_no_choice(rows, results)]
    best = max(candidates(rows), key=lambda row: penalized_accuracy(row, study))
    chance = study.chance
    if chance is not None and penalized_accuracy(best, study) <= guessing_limit(chance):
        return [
            f"Nothing learned: the best method, {best.method}, has {_result(best)}; guessing gives {percent(chance)}."
        ]
    second = _other_kind(choice, rows, study)
    return [_use(choice), *([second] if second else [])]


def _use(choice: Recommendation) -> str:
    """The sentence that recommends a method and names those within its interval."""
    row, alike = choice.row, choice.alike
    first = f"Use {row.method}: {_result(row)}{_within(row)}"
    if row.peak_bytes is not None:
        first += " beyond the weights"
    if not alike:
        return first + "."
    needs_least_memory = all(_cost(row)[0] < _cost(r)[0] for r in alike)
    if len(alike) == 1:
        (other,) = alike
        memory_note = " and needs more memory" if needs_least_memory else ""
        return f"{first}; {other.method} is within its interval ({_brief(other)}){memory_note}."
    names = [f"{r.method} ({_brief(r)})" for r in alike[:3]]
    if len(alike) > 3:
        names.append(count(len(alike) - 3, "other"))
    memory_note = " and need more memory" if needs_least_memory else ""
    return f"{first}; {listed(names)} are within its interval{memory_note}."


def _other_kind(choice: Recommendation, rows: list[MethodSummary], study: StudyRecord) -> str | None:
    """A sentence on the best method of the other kind (exact or estimated); None if the study has no such method."""
    row = choice.row
    others = [r for r in rows if r.estimator and r.exact is not row.exact]
    kind = "with an estimated gradient" if row.exact else "with the exact gradient"
    if not others:
        return None
    pool = candidates(others)
    if not pool:
        return f"No method {kind} {_absence(others, study)}."
    other = max(pool, key=lambda r: penalized_accuracy(r, study))
    result = f"{_result(other)}{_within(other)}"
    if row.ms is not None and other.ms is not None and not (row.doubt or other.doubt):
        result += f", {number(other.ms)} ms per step instead of {number(row.ms)}"
    if other in choice.alike:
        return f"The best method {kind} is {other.method}: {result}."
    ahead = row.accuracy.median - other.accuracy.median if row.accuracy and other.accuracy else 0.0
    gap = f"{points(abs(ahead))} {'behind' if ahead >= 0 else 'ahead'}"
    return f"The best method {kind}, {other.method}, is {gap}: {result}."


def _within(row: MethodSummary) -> str:
    return "" if row.peak_bytes is None else f" in {size(row.peak_bytes)}"


def _brief(row: MethodSummary) -> str:
    """Accuracy and peak, such as: 97.1%, 64.5 KiB."""
    accuracy = percent(row.accuracy and row.accuracy.median)
    return accuracy if row.peak_bytes is None else f"{accuracy}, {size(row.peak_bytes)}"


def _no_choice(rows: list[MethodSummary], results: Results) -> str:
    """Why no method can be recommended."""
    if results.refused and not rows:
        return "No method can be used here; the list of refused methods gives the reasons."
    return f"No method can be recommended: none {_absence(rows, results.study)}."


def _absence(rows: list[MethodSummary], study: StudyRecord) -> str:
    """Why none of `rows` can be recommended; continues "none ..." or "no method ..."."""
    over = [row for row in rows if row.fits is False]
    if rows and len(over) == len(rows):
        least = min(over, key=lambda row: _cost(row)[0])
        return f"fits {size(study.memory)}; the smallest, {least.method}, needs {size(least.peak_bytes)}"
    diverged, failed = sum(r.diverged for r in rows), sum(r.failed for r in rows)
    that_fits = "that fits " if over else ""
    if any(row.seeds and row.accuracy is None for row in rows):
        return f"{that_fits}has an accuracy, because the finished runs are scored by their loss alone"
    if rows and all(row.tuned_away for row in rows):
        return f"{that_fits}can be trained, because every learning rate that was tried diverged"
    if diverged + failed == 0:
        return f"{that_fits}has finished yet; run the same command again to resume"
    failures = [f"{count(n, 'run')} {fate}" for n, fate in ((diverged, "diverged"), (failed, "failed")) if n]
    most = " on most of its seeds" if any(row.seeds for row in rows) else ""
    return f"{that_fits}finished{most} ({listed(failures)})"


def _result(row: MethodSummary) -> str:
    """Accuracy, interval and notes on missing seeds, such as: 97.1% test accuracy [96.2, 98.0]."""
    accuracy = row.accuracy
    if accuracy is None:
        return "no test accuracy"
    text = f"{percent(accuracy.median)} test accuracy"
    text += " (one seed, no interval)" if accuracy.n == 1 else f" {span(accuracy)}"
    missing = row.planned - row.seeds - row.diverged
    seeds = count(row.planned, "seed")
    notes = [f"{n} of {seeds} {fate}" for n, fate in ((row.diverged, "diverged"), (missing, "missing")) if n > 0]
    return f"{text} ({listed(notes)})" if notes else text


def span(accuracy: Interval) -> str:
    """Format the interval of an accuracy in percent: [96.2, 98.0] or [diverged, 98.0]; empty for one seed."""
    if accuracy.n == 1:
        return ""
    return f"[{bare(accuracy.low)}, {bare(accuracy.high)}]"


def _if_none(x: float | None, otherwise: float) -> float:
    return otherwise if x is None else x
