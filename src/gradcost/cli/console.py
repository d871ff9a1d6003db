"""What the terminal shows: progress while work is long, then the answer, then the table."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

# A pipe has no width: what goes into one is never folded.
out = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 240)
err = Console(stderr=True, soft_wrap=True, highlight=False)


class Board:
    """One bar a method on a terminal; one line a finished run elsewhere. Goes to standard error."""

    def __init__(self, progress: Progress | None, totals: dict[str, int]) -> None:
        self.progress, self.totals = progress, totals
        self.done = dict.fromkeys(totals, 0)
        self.best: dict[str, float] = {}
        width = max(map(len, totals))
        self.bars: dict[str, TaskID] = {}
        if progress is not None:
            self.bars = {m: progress.add_task(m.ljust(width), total=n, note="") for m, n in totals.items()}

    def start_with(self, method: str, done: int) -> None:
        """Runs that an earlier call finished."""
        self.done[method] = done
        if self.progress is not None:
            self.progress.update(self.bars[method], completed=done)

    def finished(self, record: dict[str, Any]) -> None:
        method = record["method"]
        self.done[method] += 1
        accuracy = accuracy_of(record)
        if accuracy is not None:
            self.best[method] = max(self.best.get(method, 0.0), accuracy)
        best = f"best {100 * self.best[method]:.1f}%" if method in self.best else ""
        if self.progress is not None:
            self.progress.update(self.bars[method], completed=self.done[method], note=best)
            return
        err.print(f"{method}  {self.done[method]}/{self.totals[method]}  {run_line(record)}", markup=False)


def accuracy_of(record: dict[str, Any]) -> float | None:
    """The validation accuracy of a run that finished; one that diverged had one on its way at best."""
    return (record.get("validation") or {}).get("accuracy") if record["status"] == "finished" else None


def run_line(record: dict[str, Any]) -> str:
    """`tune lr 0.1 seed 0: 0.9075 validation accuracy`."""
    accuracy = accuracy_of(record)
    what = record["status"] if accuracy is None else f"{accuracy:.4f} validation accuracy"
    return f"{record['phase']} lr {record['lr']:.3g} seed {record['seed']}: {what}"


@contextmanager
def board(totals: dict[str, int]) -> Iterator[Board]:
    if not err.is_terminal:
        yield Board(None, totals)
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TextColumn("{task.fields[note]}"), TimeRemainingColumn(), console=err) as progress:
        yield Board(progress, totals)


def say(text: str = "") -> None:
    """A line on standard error: for the person, not for a pipe."""
    err.print(text, markup=False)


def complain(text: str) -> None:
    err.print(f"gradcost: {text}", markup=False, style="red" if err.is_terminal else None)


def show(text: str = "", bold: bool = False) -> None:
    out.print(text, markup=False, style="bold" if bold else None)


def show_table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: bool = False) -> None:
    """A table without lines, the first column left, the others right unless `left`."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for i, header in enumerate(headers):
        table.add_column(header, justify="left" if left or i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    out.print(table, markup=False)


def abandon(code: int) -> NoReturn:
    """Leave at once: workers that are being stopped must not hold the terminal."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
