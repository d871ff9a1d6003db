"""What the records say: a row a method, and which method to use.

The interval is that of the median over the seeds of the final runs, free of any distribution; a run that diverged
is its worst value. Only final runs at one learning rate are gathered, one a seed: a study whose grid was widened
keeps its older runs in the ledger.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from math import inf, isfinite
from statistics import mean, median
from typing import Any

from gradcost.results.records import Cost, Results, StudyRecord, TrialRecord
from gradcost.results.statistics import Interval, interval
from gradcost.results.tuning import chosen, finals
from gradcost.results.wording import bare, count, listed, number, percent, points, size


@dataclass(frozen=True)
class Row:
    """One method in the decision table. What was not measured is None."""

    method: str
    estimator: str
    optimizer: str | None
    lr: float | None
    edge: str | None  # "smallest" or "largest" of the grid, or None
    grid: tuple[float, ...]
    accuracies: tuple[float, ...]  # of the test split, by seed; -inf where the run diverged
    accuracy: Interval | None
    loss: Interval | None
    planned: int
    seeds: int
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
    reached: int
    seconds_to_target: float | None
    clip_rate: float | None
    tuned_away: bool = False  # every tuning run diverged, so that there was no rate to train with

    @property
    def backprop(self) -> bool:
        """Whether the estimator is, or wraps, backprop."""
        return uses_backprop(self.estimator)


def uses_backprop(estimator: str) -> bool:
    """Whether the estimator's text is `Reverse(...)` or wraps one, as in `Clipped(Reverse(...))`."""
    return re.search(r"\bReverse\(", estimator) is not None


def plain(row: Row) -> dict[str, Any]:
    """A row as JSON can say it: what is not finite, as of runs that diverged, is None."""
    made = asdict(row)
    for name in ("accuracy", "loss"):
        made[name] = made[name] and {key: _said(x) for key, x in made[name].items()}
    return made | {"accuracies": [_said(x) for x in row.accuracies]}


def _said(x: float) -> float | None:
    return x if isfinite(x) else None


def tuning(trials: Iterable[TrialRecord], method: str) -> list[TrialRecord]:
    """The tuning runs of `method`, by learning rate."""
    return sorted((t for t in trials if t.method == method and t.phase == "tune"), key=lambda t: t.lr)


def edge(grid: tuple[float, ...], lr: float | None) -> str | None:
    """Which end of the grid `lr` is, "smallest" or "largest", if any: a better one may lie beyond it."""
    if lr is None or len(grid) < 2 or grid[0] < lr < grid[-1]:
        return None
    return "smallest" if lr <= grid[0] else "largest"


def summarise(results: Results) -> list[Row]:
    """A row for each method of the study that was not refused, in the study's order."""
    refused = {refusal.method for refusal in results.refused} - {run.method for run in results.trials}
    seen = [*results.study.methods, *(r.method for r in (*results.costs, *results.trials))]
    return [_row(results, method) for method in dict.fromkeys(seen) if method not in refused]


def _row(results: Results, method: str) -> Row:
    cost = next((c for c in results.costs if c.method == method), None)
    mine = [t for t in results.trials if t.method == method]
    runs = finals(mine, method)
    finished = [t for t in runs if t.status == "finished" and t.test]
    grid = tuple(sorted({t.lr for t in mine if t.phase == "tune"}))
    lr = runs[0].lr if runs else chosen(mine, method)
    reached = [t.reached for t in finished if t.reached is not None]
    steps = median(reached) if reached else None
    named: list[TrialRecord | Cost] = [*runs, *mine, *([cost] if cost else [])]
    cost = cost or Cost(method, "")
    clips = [t.clip_rate for t in finished if t.clip_rate is not None]
    accuracies = tuple(_results(runs, "accuracy", -inf))
    losses = list(_results(runs, "loss", inf))
    return Row(
        method=method,
        estimator=named[0].estimator if named else "",
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
        tuned_away=bool(grid) and not runs and all(t.status == "diverged" for t in mine),
    )


def _results(runs: Iterable[TrialRecord], name: str, worst: float) -> Iterator[float]:
    """What each final run came to, `worst` where it diverged; a run that failed, or was not tested, is missing."""
    for run in runs:
        found = getattr(run.test, name, None)
        if run.status == "diverged":
            yield worst
        elif run.status == "finished" and found is not None:
            yield found


@dataclass(frozen=True)
class Choice:
    """The method to use, and the others whose accuracy is not told apart from the best one's."""

    row: Row
    alike: tuple[Row, ...]


def candidates(rows: Iterable[Row]) -> list[Row]:
    """The methods that may be recommended: their median run did not diverge, and they are not known to not fit."""
    return [row for row in rows if row.accuracy and isfinite(row.accuracy.median) and row.fits is not False]


def _finished(row: Row) -> list[float]:
    return [x for x in row.accuracies if isfinite(x)]


def standing(row: Row, study: StudyRecord) -> float:
    """The accuracy that a method is ranked by: the median of the seeds that finished, weighed against guessing by
    the share of those that diverged. So a method that now and then diverges is not recommended for its good days."""
    alive = _finished(row)
    reached = median(alive) if alive else 0.0
    lost = len(row.accuracies) - len(alive)
    return (len(alive) * reached + lost * (study.chance or 0.0)) / max(len(row.accuracies), 1)


def choose(rows: list[Row], study: StudyRecord) -> Choice | None:
    """The least memory, then the fewest milliseconds, among those that are not below the best one's interval."""
    pool = candidates(rows)
    if not pool:
        return None
    best = max(pool, key=lambda row: standing(row, study))
    about = interval(_finished(best))
    reach = about.median - about.low
    near = [row for row in pool if standing(row, study) >= standing(best, study) - reach]
    pick = min(near, key=lambda row: (*_price(row), -standing(row, study)))
    return Choice(pick, tuple(row for row in near if row is not pick))


def _price(row: Row) -> tuple[float, float]:
    return _or(row.peak_bytes, inf), _or(row.ms, inf)


def verdict(results: Results) -> str:
    """Which method to use, and how far behind the best is that avoids backprop."""
    return " ".join(sentences(results))


def sentences(results: Results) -> list[str]:
    """The verdict's one or two sentences."""
    rows, study = summarise(results), results.study
    choice = choose(rows, study)
    if choice is None:
        return [_nothing(rows, results)]
    best = max(candidates(rows), key=lambda row: standing(row, study))
    chance = study.chance
    # A twentieth of the way from guessing to perfect is less than any method worth naming reaches.
    if chance is not None and standing(best, study) <= chance + 0.05 * (1 - chance):
        return [f"Nothing learned: the best, {best.method}, is at {_result(best)}; chance is {percent(chance)}."]
    second = _other_way(choice, rows, study)
    return [_use(choice), *([second] if second else [])]


def _use(choice: Choice) -> str:
    row, alike = choice.row, choice.alike
    first = f"Use {row.method}: {_result(row)}{_within(row)}" + " beyond the weights" * (row.peak_bytes is not None)
    if not alike:
        return first + "."
    names = [f"{r.method} ({percent(r.accuracy and r.accuracy.median)}{_needing(r)})" for r in alike[:3]]
    if len(alike) > 3:
        names.append(count(len(alike) - 3, "other"))
    verb, needs = ("is", "needs") if len(alike) == 1 else ("are", "need")
    more = f" and {needs} more memory" if all(_price(row)[0] < _price(r)[0] for r in alike) else ""
    return f"{first}; {listed(names)} {verb} not told apart from it in accuracy{more}."


def _other_way(choice: Choice, rows: list[Row], study: StudyRecord) -> str | None:
    """The best method of the other kind: without backprop when the choice uses it, with it when not."""
    row = choice.row
    others = [r for r in rows if r.estimator and r.backprop is not row.backprop]
    kind = "avoids backprop" if row.backprop else "uses backprop"
    if not others:
        return None
    pool = candidates(others)
    if not pool:
        return f"Nothing that {kind} {_absence(others, study)}."
    other = max(pool, key=lambda r: standing(r, study))
    price = f"{_result(other)}{_within(other)}"
    if row.ms is not None and other.ms is not None and not (row.doubt or other.doubt):
        price += f" and {number(other.ms)} ms a step against {number(row.ms)}"
    if other in choice.alike:
        return f"The best that {kind} is {other.method}: {price}."
    ahead = row.accuracy.median - other.accuracy.median if row.accuracy and other.accuracy else 0.0
    apart = f"{points(abs(ahead))} {'behind' if ahead >= 0 else 'ahead'}"
    return f"The best that {kind}, {other.method}, is {apart}: {price}."


def _within(row: Row) -> str:
    return "" if row.peak_bytes is None else f" in {size(row.peak_bytes)}"


def _needing(row: Row) -> str:
    return "" if row.peak_bytes is None else f", {size(row.peak_bytes)}"


def _nothing(rows: list[Row], results: Results) -> str:
    """Why there is no method to name."""
    if results.refused and not rows:
        return "No method can serve here: every one was refused, each for the reason that stands beside it."
    return f"There is no method to name: nothing {_absence(rows, results.study)}."


def _absence(rows: list[Row], study: StudyRecord) -> str:
    """What became of `rows`, none of which can be recommended; it goes on from "nothing that ..."."""
    over = [row for row in rows if row.fits is False]
    if rows and len(over) == len(rows):
        least = min(over, key=lambda row: _price(row)[0])
        return f"fits {size(study.memory)}: the least, {least.method}, needs {size(least.peak_bytes)}"
    diverged, failed = sum(r.diverged for r in rows), sum(r.failed for r in rows)
    within = "that fits " if over else ""
    if any(row.seeds and row.accuracy is None for row in rows):
        return f"{within}has an accuracy: what finished was scored by its loss alone"
    if rows and all(row.tuned_away for row in rows):
        return f"{within}can be trained: every learning rate that was tried diverged"
    if diverged + failed == 0:
        return f"{within}has finished yet; the same command again goes on where it stopped"
    fate = [f"{count(diverged, 'run')} diverged"] * (diverged > 0) + [f"{count(failed, 'run')} failed"] * (failed > 0)
    most = " on most of its seeds" if any(row.seeds for row in rows) else ""
    return f"{within}finished{most}: {listed(fate)}"


def _result(row: Row) -> str:
    """97.1% test accuracy [96.2, 98.0], and what to hold against it."""
    found = row.accuracy
    if found is None:
        return "no test accuracy"
    text = f"{percent(found.median)} test accuracy"
    text += " (one seed, no interval)" if found.n == 1 else f" {span(found)}"
    missing = row.planned - row.seeds - row.diverged
    notes = [f"{row.diverged} of {count(row.planned, 'seed')} diverged"] * (row.diverged > 0)
    notes += [f"{missing} of {count(row.planned, 'seed')} missing"] * (missing > 0)
    return f"{text} ({listed(notes)})" if notes else text


def span(accuracy: Interval) -> str:
    """The interval of an accuracy, in percent: [96.2, 98.0] or [diverged, 98.0]; empty for one seed."""
    if accuracy.n == 1:
        return ""
    return f"[{bare(accuracy.low)}, {bare(accuracy.high)}]"


def _or(x: float | None, otherwise: float) -> float:
    return otherwise if x is None else x
