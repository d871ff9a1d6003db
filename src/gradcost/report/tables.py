"""The tables of a report as plain strings, for the terminal, Markdown, CSV and HTML alike."""

from __future__ import annotations

import csv
import io

from gradcost.report import formats
from gradcost.report.formats import Table
from gradcost.results.records import Results, TrialRecord
from gradcost.results.summary import Row, span, summarise, tuning
from gradcost.results.tuning import chosen, finals
from gradcost.results.wording import (
    DASH,
    alike,
    bare,
    count,
    duration,
    forwards,
    listed,
    number,
    percent,
    rate,
    size,
)


def table(results: Results) -> Table:
    """The decision table: a row a method, in the study's order."""
    columns = [
        "method",
        "test acc",
        "test loss",
        "beyond weights",
        "a step (forwards)",
        "ms",
        f"to {number(100 * results.study.target)}%",
        "diverged",
        "lr",
    ]
    return Table(columns, [_line(row) for row in summarise(results)])


def _line(row: Row) -> list[str]:
    return [
        row.method,
        accuracy(row),
        loss(row),
        size(row.peak_bytes) + (", too much" if row.fits is False else ""),
        forwards(row.forwards),
        ("~" if row.doubt else "") + number(row.ms),
        to_target(row),
        f"{row.diverged} of {row.planned}" if row.seeds + row.diverged + row.failed else DASH,
        rate(row.lr) + (" (edge)" if row.edge else ""),
    ]


def accuracy(row: Row) -> str:
    """98.1 [97.9, 98.2], in percent."""
    if row.accuracy is None:
        return DASH
    return f"{bare(row.accuracy.median)} {span(row.accuracy)}".rstrip()


def loss(row: Row) -> str:
    """0.0682 [0.0611, 0.0753]."""
    found = row.loss
    if found is None:
        return DASH
    middle, low, high = alike(found.median, found.low, found.high)
    return middle if found.n == 1 else f"{middle} [{low}, {high}]"


def to_target(row: Row) -> str:
    """120 steps, 0.38 s (2 of 3 seeds); the median over the seeds that reached the target."""
    if not row.seeds:
        return DASH
    if row.steps_to_target is None:
        return "not reached"
    text = f"{row.steps_to_target:,.0f} steps"
    if row.seconds_to_target is not None:
        text += f", {duration(row.seconds_to_target)}"
    return text if row.reached == row.planned else f"{text} ({row.reached} of {row.planned})"


def audit(results: Results) -> Table:
    """How each method was tuned, with what to hold against it: an edge, another rate, fewer points."""
    columns = [
        "method",
        "grid",
        "finished",
        "chosen lr",
        "validation acc",
        "tuned for",
        "trained for",
        "note",
    ]
    return Table(columns, [_audited(results, row) for row in summarise(results)])


def _audited(results: Results, row: Row) -> list[str]:
    tried = tuning(results.trials, row.method)
    best = chosen((t for t in results.trials if t.phase != "final"), row.method)
    winner = [t for t in tried if t.lr == best and t.status == "finished" and t.validation]
    accuracies = [t.validation.accuracy for t in winner if t.validation and t.validation.accuracy is not None]
    trained = finals(results.trials, row.method)
    done = len({t.lr for t in tried if t.status == "finished"})
    return [
        row.method,
        f"{rate(row.grid[0])} to {rate(row.grid[-1])}" if row.grid else DASH,
        f"{done} of {results.study.points}",
        rate(best),
        percent(max(accuracies, default=None)),
        _steps([t for t in tried if t.status == "finished"] or tried),
        f"{_steps(trained)} × {count(len(trained), 'seed')}" if trained else DASH,
        "; ".join(_remarks(results, row, tried, best)) or DASH,
    ]


def _remarks(results: Results, row: Row, tried: list[TrialRecord], best: float | None) -> list[str]:
    """What a reader should know before trusting the tuning of one method."""
    added = [lr for lr in row.grid if lr not in _shared(results)]
    confirmed = [t for t in results.trials if t.method == row.method and t.phase == "confirm"]
    remarks = []
    if added:
        remarks.append(f"{count(len(added), 'point')} of its own: {listed([rate(lr) for lr in added])}")
    if confirmed:
        rates = len({t.lr for t in confirmed})
        remarks.append(f"{count(rates, 'rate')} confirmed on {count(len({t.seed for t in confirmed}), 'fresh seed')}")
    if row.edge:
        remarks.append(f"edge: {rate(row.lr)} is the {row.edge} of {len(row.grid)}")
    if best is not None and row.lr is not None and row.lr != best:
        remarks.append(f"trained at {rate(row.lr)}, not at the rate that tuning chose")
    for fate in ("diverged", "failed"):
        n = sum(t.status == fate for t in tried)
        if n:
            remarks.append(f"{n} {fate}")
    if row.clip_rate:
        remarks.append(f"slope clipped in {percent(row.clip_rate)} of final steps")
    return remarks


def _shared(results: Results) -> set[float]:
    """The rates that every tuned method was tried at: the grid before it was extended."""
    grids = [set(row.grid) for row in summarise(results) if row.grid]
    return set.intersection(*grids) if grids else set()


def _steps(trials: list[TrialRecord]) -> str:
    lengths = sorted({t.steps for t in trials})
    return listed([f"{n:,}" for n in lengths]) + " steps" if lengths else DASH


def to_markdown(results: Results) -> str:
    """The decision table in Markdown; a bar inside a label is escaped."""
    return formats.markdown(table(results))


_RAW = {
    "method": lambda row: row.method,
    "estimator": lambda row: row.estimator,
    "lr": lambda row: row.lr,
    "seeds": lambda row: row.seeds,
    "diverged": lambda row: row.diverged,
    "test_accuracy": lambda row: row.accuracy and row.accuracy.median,
    "test_accuracy_low": lambda row: row.accuracy and row.accuracy.low,
    "test_accuracy_high": lambda row: row.accuracy and row.accuracy.high,
    "test_loss": lambda row: row.loss and row.loss.median,
    "test_loss_low": lambda row: row.loss and row.loss.low,
    "test_loss_high": lambda row: row.loss and row.loss.high,
    "confidence": lambda row: row.accuracy and row.accuracy.confidence,
    "peak_bytes": lambda row: row.peak_bytes,
    "flops": lambda row: row.flops,
    "forwards": lambda row: row.forwards,
    "ms": lambda row: row.ms,
    "ms_low": lambda row: row.ms_low,
    "ms_high": lambda row: row.ms_high,
    "steps_to_target": lambda row: row.steps_to_target,
    "reached": lambda row: row.reached,
    "seconds_to_target": lambda row: row.seconds_to_target,
    "clip_rate": lambda row: row.clip_rate,
    "fits": lambda row: row.fits,
}


def to_csv(results: Results) -> str:
    """The summary as unrounded numbers, a row a method; what was not measured is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_RAW)
    writer.writerows([get(row) for get in _RAW.values()] for row in summarise(results))
    return out.getvalue()
