"""The tables of a report as strings, and their formats: Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from gradcost.core.metric import Metric
from gradcost.results.records import Results, StudyRecord, TrialRecord
from gradcost.results.summary import MethodSummary, metric_text, span, summarise, tuning
from gradcost.results.tuning import chosen, final_runs, runs_of
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
    timing_mark,
)

_NUMBERS = re.compile(r"[-+0-9.,eE%×\[\] ]+")
# Characters that LaTeX reads as commands or prints as other characters.
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}
_LATEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"} | {"×": r"$\times$", "<": r"\textless{}", ">": r"\textgreater{}"}


class Table(NamedTuple):
    """Column heads, and rows with one string per column."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def markdown(table: Table) -> str:
    """Write a table in Markdown, with escaped cells and padded columns."""
    cells = [[inert(cell).replace("|", "\\|") for cell in line] for line in (table.columns, *table.rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(table.columns))]

    def format_line(line: list[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|".join([f":{'-' * (widths[0] + 1)}", *(f"{'-' * (w + 1)}:" for w in widths[1:])])
    return "\n".join([format_line(cells[0]), f"|{rule}|", *map(format_line, cells[1:])]) + "\n"


def inert(text: str) -> str:
    """Escape a text for Markdown: it opens no HTML element and no link. Applied twice, it is the same as once."""
    return text.replace("<", "&lt;").replace("](", "]\\(")


def _cell(item: Any) -> Any:
    """Return a cell for CSV. A quote precedes a text that a spreadsheet would read as a formula."""
    is_formula = isinstance(item, str) and item[:1] in ("=", "+", "-", "@") and not _NUMBERS.fullmatch(item)
    return f"'{item}" if is_formula else item


def formatted_csv(table: Table) -> str:
    """Write a table in CSV with the displayed text, such as units and brackets. `to_csv` has unrounded numbers."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([*map(_cell, line)] for line in (table.columns, *table.rows))
    return out.getvalue()


def latex(table: Table) -> str:
    """Write a table as a LaTeX tabular with booktabs rules; the first column is left-aligned."""
    lines = [" & ".join(map(_escaped, line)) + r" \\" for line in (table.columns, *table.rows)]
    layout = "l" + "r" * (len(table.columns) - 1)
    body = [rf"\begin{{tabular}}{{{layout}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([*body, r"\end{tabular}"]) + "\n"


def _escaped(text: str) -> str:
    """Escape a text for LaTeX."""
    return "".join(_LATEX.get(sign, sign) for sign in text)


def table(results: Results) -> Table:
    """Return the decision table: one row per method, in the study's order."""
    metric = results.study.metric
    columns = [
        "method",
        f"test {'acc' if metric.is_accuracy else metric.name}",
        "test loss",
        "beyond weights",
        "a step (forwards)",
        "ms",
        target(results.study),
        "diverged",
        "lr",
    ]
    lines = [_line(row, metric, results.study.target is not None) for row in summarise(results)]
    if metric.name == "loss":  # the second column is the test loss already
        columns, *lines = ([*line[:2], *line[3:]] for line in (columns, *lines))
    return Table(columns, lines)


def target(study: StudyRecord) -> str:
    """Return the heading of the time to the target: "to 90%", "to loss 0.1", or "to target" if there is none."""
    if study.target is None:
        return "to target"
    value = study.metric.text(study.metric.score(study.target))
    return f"to {number(100 * study.target)}%" if study.metric.is_accuracy else f"to {study.metric.name} {value}"


def _line(row: MethodSummary, metric: Metric, has_target: bool) -> list[str]:
    return [
        row.method,
        _score(row, metric),
        loss(row),
        size(row.peak_bytes) + (", too much" if row.fits is False else ""),
        forwards(row.forwards),
        timing_mark(row.doubt) + number(row.ms),
        to_target(row, has_target),
        f"{row.diverged} of {row.ended}" if row.ended else DASH,
        rate(row.lr) + (" (edge)" if row.edge else ""),
    ]


def _score(row: MethodSummary, metric: Metric) -> str:
    if metric.is_accuracy:
        return accuracy(row)
    return DASH if row.score is None else metric_text(row.score, metric)


def accuracy(row: MethodSummary) -> str:
    """Write the test accuracy in percent: 98.1 [97.9, 98.2]."""
    if row.accuracy is None:
        return DASH
    return f"{bare(row.accuracy.median)} {span(row.accuracy)}".rstrip()


def loss(row: MethodSummary) -> str:
    """Write the test loss: 0.0682 [0.0611, 0.0753]."""
    if row.loss is None:
        return DASH
    middle, low, high = alike(row.loss.median, row.loss.low, row.loss.high)
    return middle if row.loss.n == 1 else f"{middle} [{low}, {high}]"


def to_target(row: MethodSummary, has_target: bool = True) -> str:
    """Write the steps and seconds to the target, medians over the seeds that reach it: 120 steps, 0.38 s (2 of 3).

    A ~ before the seconds marks an unreliable timing.
    """
    if not row.seeds or not has_target:
        return DASH
    if row.steps_to_target is None:
        return "not reached"
    text = f"{row.steps_to_target:,.0f} steps"
    if row.seconds_to_target is not None:
        text += f", {timing_mark(row.doubt)}{duration(row.seconds_to_target)}"
    return text if row.reached == row.ended else f"{text} ({row.reached} of {row.ended})"


def audit(results: Results) -> Table:
    """Return the tuning table: one row per method, with notes on edges, replaced rates, extra points and more."""
    columns = [
        "method",
        "grid",
        "finished",
        "chosen lr",
        f"validation {'acc' if results.study.metric.is_accuracy else results.study.metric.name}",
        "tuned for",
        "trained for",
        "note",
    ]
    return Table(columns, [_tuning(results, row) for row in summarise(results)])


def _tuning(results: Results, row: MethodSummary) -> list[str]:
    """Return the cells of one method in the tuning table."""
    tried = tuning(runs_of(results, row.method), row.method)
    best = chosen((t for t in runs_of(results, row.method) if t.phase != "final"), row.method)
    winner = [t for t in tried if t.lr == best and t.status == "finished" and t.validation]
    scores = [t.validation.score for t in winner if t.validation and t.validation.score is not None]
    trained = final_runs(results, row.method)
    done = len({t.lr for t in tried if t.status == "finished"})
    return [
        row.method,
        f"{rate(row.grid[0])} to {rate(row.grid[-1])}" if row.grid else DASH,
        f"{done} of {results.study.points}",
        rate(best),
        results.study.metric.text(max(scores)) if scores else DASH,
        _steps([t for t in tried if t.status == "finished"] or tried),
        f"{_steps(trained)} × {count(len(trained), 'seed')}" if trained else DASH,
        "; ".join(_tuning_notes(results, row, tried, best)) or DASH,
    ]


def _tuning_notes(results: Results, row: MethodSummary, tried: list[TrialRecord], best: float | None) -> list[str]:
    """Return the notes of one method in the tuning table."""
    common = _common_grid(results)
    added = [lr for lr in row.grid if lr not in common]
    confirmed = [t for t in runs_of(results, row.method) if t.phase == "confirm"]
    notes = []
    if added and len(added) < len(row.grid) / 2:  # else the methods have grids of their own
        notes.append(f"{count(len(added), 'extra point')}: {listed([rate(lr) for lr in added])}")
    if confirmed:
        rates = len({t.lr for t in confirmed})
        notes.append(f"{count(rates, 'rate')} confirmed on {count(len({t.seed for t in confirmed}), 'fresh seed')}")
    if row.edge:
        notes.append(f"edge: {rate(row.lr)} is the {row.edge} of {len(row.grid)}")
    if best is not None and row.lr is not None and row.lr != best:
        notes.append(f"trained at {rate(row.lr)}, not at the rate that tuning chose")
    for status in ("diverged", "failed"):
        n = sum(t.status == status for t in tried)
        if n:
            notes.append(f"{n} {status}")
    if row.clip_rate:
        notes.append(f"slope clipped in {percent(row.clip_rate)} of final steps")
    return notes


def _common_grid(results: Results) -> set[float]:
    """Return the learning rates that every method tried: the grid without extra points."""
    grids = [set(row.grid) for row in summarise(results) if row.grid]
    return set.intersection(*grids) if grids else set()


def _steps(trials: list[TrialRecord]) -> str:
    """Return the lengths of runs, such as "400 steps" or "200 and 400 steps"."""
    lengths = sorted({t.steps for t in trials})
    return listed([f"{n:,}" for n in lengths]) + " steps" if lengths else DASH


# The columns of results.csv.
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
    """Write the summary in CSV with unrounded numbers, one row per method; unmeasured values are empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_RAW)
    writer.writerows([_cell(get(row)) for get in _RAW.values()] for row in summarise(results))
    return out.getvalue()
