"""Print progress and errors on standard error, and results on standard output."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from gradcost.core.metric import ACCURACY, Metric
from gradcost.core.printable import printable
from gradcost.results.records import Results, TrialRecord
from gradcost.results.status import notes_on
from gradcost.results.wording import duration


class _Out(Console):
    """The console of results: it still writes to standard output where `only_results` sends all else elsewhere."""

    def on_broken_pipe(self) -> None:
        """Exit, as rich does where `sys.stdout` is standard output; what is still buffered goes nowhere."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
        raise SystemExit(1)


# Without a terminal and without COLUMNS, rich assumes 80 columns and would wrap table lines.
_KNOWS_WIDTH = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
out = _Out(soft_wrap=True, highlight=False, emoji=False, width=None if _KNOWS_WIDTH else 240)
err = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)

ALL = "all trials"
NARROW = 80  # columns below which a wide table is printed as blocks
GAP = 3  # columns between two columns of a table


class Board:
    """Progress of the trials: one bar per method and one for all on a terminal, otherwise one line per trial."""

    def __init__(
        self, progress: Progress | None, totals: Mapping[str, int], finished: Mapping[str, int], metric: Metric
    ) -> None:
        self.progress, self.totals, self.metric = progress, totals, metric
        self.done = {method: finished.get(method, 0) for method in totals}
        self.seconds: dict[str, list[float]] = {method: [] for method in totals}  # of the trials of this run
        self.started = time.monotonic()
        self.best: dict[str, float] = {}
        width = max(map(len, [*totals, ALL]))
        self.bars: dict[str, TaskID] = {}
        if progress is not None:
            for method, total in totals.items():
                bar = progress.add_task(
                    printable(method).ljust(width), total=total, completed=self.done[method], note=""
                )
                self.bars[method] = bar
            total, done = sum(totals.values()), sum(self.done.values())
            self.all = progress.add_task(ALL.ljust(width), total=total, completed=done, note="")

    def finished(self, trial: TrialRecord) -> None:
        """Show one more finished trial."""
        method = trial.method
        self.done[method] += 1
        self.seconds[method].append(trial.seconds or 0.0)
        done, total, left = sum(self.done.values()), sum(self.totals.values()), self._left()
        score = score_of(trial)
        if score is not None:
            self.best[method] = max(self.best.get(method, score), score)
        if self.progress is None:
            line = trial_line(trial, self.metric)
            line = f"{method}  {self.done[method]}/{self.totals[method]}  {line}"
            say(f"{line}   ({ALL} {done}/{total}{f', {left}' if left else ''})")
            return
        best = f"best {self.metric.text(self.best[method])}" if method in self.best else ""
        self.progress.update(self.bars[method], completed=self.done[method], note=best)
        self.progress.update(self.all, completed=done, note=left)

    def _left(self) -> str:
        """Estimate what is left: each method's mean seconds of a trial, at this run's number of trials at once.

        Returns:
            "" until each method with trials left has finished one in this run: a trial of one method may take ten
            times as long as one of another.
        """
        spent = sum(map(sum, self.seconds.values()))
        at_once = max(1.0, spent / max(time.monotonic() - self.started, 1e-9))
        left = 0.0
        for method, seconds in self.seconds.items():
            trials = self.totals[method] - self.done[method]
            if trials:
                if not seconds:
                    return ""
                left += trials * statistics.fmean(seconds)
        return f"about {duration(left / at_once)} left"


def score_of(trial: TrialRecord) -> float | None:
    """Return the validation score of a trial (`Metric.score`); None if it did not finish or has no score."""
    return trial.validation.score if trial.status == "finished" and trial.validation is not None else None


def trial_line(trial: TrialRecord, metric: Metric = ACCURACY) -> str:
    """Describe a trial in one line: `tune lr 0.1 seed 0: 0.9075 validation accuracy`."""
    score = score_of(trial)
    result = trial.status
    if score is not None:
        result = f"{score:.4f}" if metric.is_accuracy else metric.text(score)
        result += f" validation {metric.name}"
    if trial.status == "failed":
        result += f", {(trial.reason or 'no reason was recorded').splitlines()[0]}"
    return f"{trial.phase} lr {trial.lr:.3g} seed {trial.seed}: {result}"


@contextmanager
def board(totals: Mapping[str, int], finished: Mapping[str, int], metric: Metric = ACCURACY) -> Iterator[Board]:
    """Show the progress of trials. `totals`: all trials by method. `finished`: those finished in earlier runs."""
    if not err.is_terminal:
        yield Board(None, totals, finished, metric)
        return
    name, note = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[note]}"))
    columns = (name, BarColumn(bar_width=24), TextColumn("{task.completed}/{task.total}"), note)
    with Progress(*columns, console=err) as progress:
        yield Board(progress, totals, finished, metric)


@contextmanager
def status(work: str) -> Iterator[Callable[[str], None]]:
    """Show `work` with a spinner on a terminal. Yields a function that shows the current item, such as a method."""
    if not err.is_terminal:
        yield lambda item: None
        return
    with err.status(work) as spinner:
        yield lambda item: spinner.update(Text(f"{work}: {printable(item)}"))


def say(text: str = "") -> None:
    """Print a line of progress on standard error."""
    err.print(_safe(text), markup=False)


def complain(text: str) -> None:
    """Print an error message on standard error."""
    err.print(f"gradcost: {_safe(text)}", markup=False, style="red" if err.is_terminal else None)


def complain_of(results: Results, where: str = "") -> None:
    """Print a note on damaged or missing records of a results folder on standard error, if there is one.

    Args:
        results: from `records.read`.
        where: a text before it, such as the folder and a colon.
    """
    note = notes_on(results)
    if note is not None:
        complain(where + note)


def show(text: str = "", bold: bool = False) -> None:
    """Print a line of the result on standard output. A terminal gets it wrapped between words."""
    out.print(_safe(text), markup=False, style="bold" if bold else None, soft_wrap=not out.is_terminal)


def show_table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: bool = False) -> None:
    """Print a table without ruled lines; where it does not fit a narrow screen, one block of lines for each row.

    `left` left-aligns every column, not only the first.
    """
    widest = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    if out.width < NARROW and sum(widest) + GAP * len(widest) > out.width:
        _show_blocks(headers, rows)
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    for i, header in enumerate(headers):
        table.add_column(header, justify="left" if left or i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(_safe, row))
    out.print(table, markup=False)


def _show_blocks(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    width = max(map(len, headers[1:]), default=0)
    for first, *cells in rows:
        show(first, bold=True)
        for header, cell in zip(headers[1:], cells, strict=True):
            show(f"    {header.ljust(width)}  {cell}")


def _safe(text: str) -> str:
    """Escape what could steer a terminal: names and error messages come from records and the user's files."""
    return printable(text, keep="\n\t")


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output. A number that is not finite, which JSON does not have, is null."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False, default=str), file=out.file)


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {name: _finite(item) for name, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
    return value


@contextmanager
def only_results() -> Iterator[None]:
    """Keep standard output for results: what other code prints there, such as the user's, goes to standard error."""
    out.file = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        out.file = None  # type: ignore[assignment]  # standard output of the moment


def abandon(code: int) -> NoReturn:
    """Exit at once, without waiting for worker processes to stop."""
    out.file.flush()
    sys.stderr.flush()
    os._exit(code)
