"""The tables of a report about common targets: what each method needs to reach them, as ratios to a reference."""

from __future__ import annotations

from math import isfinite
from typing import Any

from gradcost.report.tables import Table
from gradcost.results.records import Results
from gradcost.results.targets import RESOURCES, Reach, Target, reaches, reference
from gradcost.results.wording import DASH, percent, times


def tables(results: Results) -> dict[str, Table]:
    """Return {file name without extension: table}, one table per resource that was measured."""
    rows = reaches(results)
    named = {f"to-target-{resource.name}": _table(rows, resource.name) for resource in RESOURCES}
    return {
        name: table for name, table in named.items() if any(cell != DASH for row in table.rows for cell in row[1:])
    }


def sections(results: Results) -> list[dict[str, Any]]:
    """Return the content of one table of the page per resource."""
    titles = {f"to-target-{resource.name}": resource.noun for resource in RESOURCES}
    return [
        {"title": titles[name], "columns": table.columns, "rows": table.rows}
        for name, table in tables(results).items()
    ]


def note(results: Results) -> str:
    """Explain the tables."""
    return (
        f"Ratios to {reference(results)}, paired by seed: the median over seeds and its interval. A run reaches a "
        "target at its first evaluation that meets it. A run that does not reach the target needs more than it had: "
        "its ratio is above every other one, and an interval then may have no end. Unlike an accuracy, a ratio to a "
        "common target does not depend on where the runs were stopped."
    )


def _table(rows: list[Reach], resource: str) -> Table:
    targets = list(dict.fromkeys(row.target for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    cells = {(row.method, row.target): _cell(row, resource) for row in rows}
    columns = ["method", *(target_name(target) for target in targets)]
    return Table(columns, [[method, *(cells[method, target] for target in targets)] for method in methods])


def target_name(target: Target) -> str:
    """Write a target: 90% accuracy, loss 0.5."""
    return f"{percent(target.value)} accuracy" if target.quantity == "accuracy" else f"loss {target.value:g}"


def _cell(row: Reach, resource: str) -> str:
    ratio = row.ratio.get(resource)
    if ratio is None:
        return DASH
    if not isfinite(ratio.median):
        return f"not reached ({row.reached} of {row.runs})"
    return f"{times(ratio.median)} [{times(ratio.low)}, {times(ratio.high)}]"
