"""A table of strings as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv as csv_writer
import io
from collections.abc import Sequence
from typing import NamedTuple

# What LaTeX would read as a command, or set as another sign.
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}
_LATEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"} | {"×": r"$\times$", "<": r"\textless{}", ">": r"\textgreater{}"}


class Table(NamedTuple):
    """The heads of the columns, and rows of as many strings."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def markdown(table: Table) -> str:
    """A bar inside a cell is escaped, and the columns are as wide as their widest cell."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (table.columns, *table.rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(table.columns))]

    def written(line: list[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|".join([f":{'-' * (widths[0] + 1)}", *(f"{'-' * (w + 1)}:" for w in widths[1:])])
    return "\n".join([written(cells[0]), f"|{rule}|", *map(written, cells[1:])]) + "\n"


def csv(table: Table) -> str:
    """As it is read by a person, with units and brackets; `tables.to_csv` holds the unrounded numbers."""
    out = io.StringIO()
    csv_writer.writer(out, lineterminator="\n").writerows([table.columns, *table.rows])
    return out.getvalue()


def latex(table: Table) -> str:
    """A tabular for the package booktabs: the first column to the left, the others to the right."""
    lines = [" & ".join(map(_escaped, line)) + r" \\" for line in (table.columns, *table.rows)]
    layout = "l" + "r" * (len(table.columns) - 1)
    body = [rf"\begin{{tabular}}{{{layout}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([*body, r"\end{tabular}"]) + "\n"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)
