"""A plan as one HTML file: each method's memory by purpose, and the cost of a step against its peak."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradcost.core.files import write_chosen
from gradcost.report.breakdown import bars
from gradcost.report.pages import cell, rendered
from gradcost.report.theme import BYTES, NEUTRAL, Figure, Theme, marks, powers_of_ten, powers_of_two
from gradcost.results.wording import DASH, size


def write(record: dict[str, Any], output: str | Path) -> Path:
    """Write the page of a plan.

    Args:
        record: `Plan.record()`, optionally with the key "curve", from `gradcost.planning.curve`.
        output: the file.
    Returns:
        The path of the file, which is written atomically.
    Raises:
        OSError: the file cannot be written.
        MissingExtra: a package of gradcost[report] is not installed.
    """
    return write_chosen(Path(output), page(record))


def page(record: dict[str, Any]) -> str:
    """Return the HTML of the plan, which depends on `record` alone."""
    methods = [row["method"] for row in record["rows"]]
    method_marks = marks(list(dict.fromkeys(methods)))
    rows = [row for row in record["rows"] if row["refusal"] is None]
    theme = Theme([row["method"] for row in rows], method_marks)
    figures = [memory(theme, rows, record["budget"]), trade(theme, rows, record.get("curve") or [], record["budget"])]
    return rendered(
        "plan.html.j2",
        [figure for figure in figures if figure is not None],
        title=f"plan for {record['model']}",
        facts=_facts(record),
        sentences=[record["sentence"]],
        picked=record["choice"],
        marks=method_marks,
        methods=theme.methods,
        decision=_decision(rows),
        notes=record["lines"],
        lists=[
            (
                "Refused methods",
                ("method", "reason"),
                [(r["method"], r["refusal"]) for r in record["rows"] if r["refusal"]],
            )
        ],
    )


def _facts(record: dict[str, Any]) -> list[str]:
    facts = [f"{record['weights']:,} trained weights", record["device"]]
    if "dtype" in record:
        facts.append(record["dtype"])
    if record["batch"] is not None:
        facts.append(f"batch {record['batch']:,}")
    facts.append(record["optimizer"] or "no optimizer")
    facts.append(f"budget {record['budget']:,} bytes = {size(record['budget'])}, weights included")
    return facts


def _decision(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the table of forecasts, without columns that have only dashes."""
    most = max((row["peak"] for row in rows), default=0)
    texts = [_cells(row) for row in rows]
    columns = [name for name in (texts[0] if texts else ()) if any(text[name] != DASH for text in texts)]
    lines = []
    for row, text in zip(rows, texts, strict=True):
        cells = {name: cell(name, text[name]) for name in columns}
        cells["peak"]["bar"] = f"{100 * row['peak'] / most:.1f}"
        cells["fits"]["warn"] = not row["fits"]
        lines.append({"method": row["method"], "cells": list(cells.values())})
    return {"title": "Forecast of a step of each method", "columns": ["method", *columns], "rows": lines}


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """Return the formatted cells by column. For a record of an older version, which has none, format three values."""
    if cells := row.get("cells"):
        return cells
    fits = "yes" if row["fits"] else f"no, {size(row['over'])} over"
    return {"peak": size(row["peak"]), "fits": fits, "forwards": f"{row['forwards']:.2f}"}


def memory(theme: Theme, rows: Sequence[dict[str, Any]], budget: int) -> Figure | None:
    """Draw the bytes at each method's peak by purpose, and the budget."""
    caption = (
        "The bytes allocated at each method's peak by purpose, weights included. The parts of a bar sum to the "
        f"peak. The dashed line is the budget, {size(budget)}. These are forecasts; nothing was run."
    )
    return bars(theme, rows, budget, caption) if rows else None


def trade(
    theme: Theme, rows: Sequence[dict[str, Any]], curve: Sequence[dict[str, Any]], budget: int
) -> Figure | None:
    """Draw the cost of a step against its peak memory: checkpointing schedules as curves, methods as points."""
    if not rows:
        return None
    alt = theme.alt
    timed = all(row["seconds"] is not None for row in rows) and not curve
    what, title = ("seconds", "estimated seconds per step") if timed else ("forwards", "forwards per step")
    points = [{**_point(row, what), "size": size(row["peak"])} for row in rows]
    lines = [{**point, "size": size(point["peak"]), "place": i} for i, point in enumerate(curve)]
    peaks = [point["peak"] for point in (*points, *lines)] + [budget]
    costs = [point[what] for point in (*points, *lines)]
    low, high = min(peaks) / 1.15, max(peaks) * 1.15
    x = alt.X(
        "peak:Q", title="peak memory of a step", axis=alt.Axis(labelExpr=BYTES, values=powers_of_two(low, high))
    )
    x = x.scale(type="log", base=2, nice=False, domain=[low, high])
    bottom, top = min(costs) / 1.2, max(costs) * 1.2
    y = alt.Y(f"{what}:Q", title=title, axis=alt.Axis(values=powers_of_ten(bottom, top), format="~g"))
    y = y.scale(type="log", nice=False, domain=[bottom, top])
    rule = theme.plain([{"peak": budget, "label": size(budget)}]).mark_rule(strokeDash=[4, 4], color=NEUTRAL)
    layers = [rule.encode(x=x, tooltip=alt.Tooltip("label:N", title="budget"))]
    tip = [alt.Tooltip("size:N", title="peak"), theme.tip(what, ".3~g", title)]
    for name, dash in (("Segments(k)", [2, 3]), ("best schedules", [1, 0])):
        curve_points = [point for point in lines if point["curve"] == name]
        if curve_points:
            line = theme.plain(curve_points).mark_line(strokeWidth=1.6, color=NEUTRAL, strokeDash=dash)
            layers.append(line.encode(x=x, y=y, order=alt.Order("place:Q")))
            dots = theme.plain(curve_points).mark_circle(size=26, color=NEUTRAL).encode(x=x, y=y)
            layers.append(dots.encode(tooltip=[alt.Tooltip("method:N", title=name), *tip]))
    shown = theme.chart(points).mark_point(filled=True, size=110)
    layers.append(shown.encode(x=x, y=y, shape=theme.shape, opacity=theme.opacity(0.95), tooltip=["method:N", *tip]))
    caption = (
        "Each mark is a method; further left and lower is better. Methods left of the dashed line, the budget of "
        f"{size(budget)}, fit. Both axes are logarithmic. An estimated gradient makes less progress per step than "
        "the exact one: see the column “steps × (theory)”."
    )
    if lines:
        caption += (
            " The solid line is the optimal recomputation schedule, the dotted line is Segments(1), Segments(2), ..."
        )
    return theme.figure("memory-cost", "Cost of a step against its memory", caption, layers, height=340)


def _point(row: dict[str, Any], what: str) -> dict[str, Any]:
    return {"method": row["method"], "peak": row["peak"], what: row[what]}
