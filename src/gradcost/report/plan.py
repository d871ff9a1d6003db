"""A plan as one HTML file: each method's memory by purpose, and the cost of a step against its peak."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradcost.core.files import write_chosen
from gradcost.report.breakdown import bars
from gradcost.report.families import family
from gradcost.report.pages import by_family, cell, rendered
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
    rows = [row for row in record["rows"] if row["refusal"] is None]
    heads: dict[str, str] = {}
    same = _same(rows)
    kinds = {
        row["method"]: heads.setdefault(family(row.get("estimator", row["method"]), None), row["method"])
        for row in record["rows"]
    }
    kinds |= {method: kinds[first] for method, first in same.items()}
    method_marks = marks(list(dict.fromkeys(methods)), kinds, same)
    theme = Theme([row["method"] for row in rows], method_marks)
    picture = trade(theme, rows, record.get("curve") or [], record["budget"])
    bars = memory(theme, rows, record["budget"])
    refused = [(r["method"], r["refusal"]) for r in record["rows"] if r["refusal"]]
    folds = {"cost": "What is the memory for?"} if bars else {}
    return rendered(
        "plan.html.j2",
        [figure for figure in (picture, bars) if figure is not None],
        _answer(record, rows),
        pictures=[] if picture is None else [picture],
        picture_title="Cost against memory",
        entries=[
            [other for other in theme.methods if same[other] == first] for first in dict.fromkeys(same.values())
        ],
        folds=folds | ({"unfair": "Which methods cannot be used?"} if refused else {}),
        groups={"cost": [] if bars is None else [bars]},
        title=f"plan for {record['model']}",
        facts=_facts(record),
        sentences=[record["sentence"]],
        picked=record["choice"],
        marks=method_marks,
        decision=_decision(rows, kinds, record["choice"]),
        notes=record["lines"],
        lists=[("Refused methods", ("method", "reason"), refused)],
    )


def _same(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return {method: the first method with the same forecast}."""
    seen: dict[tuple[Any, ...], str] = {}
    keys = ("peak", "flops", "seconds", "exact", "steps", "forwards")
    return {row["method"]: seen.setdefault(tuple(row.get(key) for key in keys), row["method"]) for row in rows}


def _answer(record: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the data of the slider: what each method needs and costs. `report.js` applies the rule of `plan`."""
    known = [row for row in rows if "exact" in row and "flops" in row]
    if len(known) < 2:
        return None
    peaks = [*(row["peak"] for row in known), record["budget"]]
    names = ("method", "peak", "exact", "steps", "seconds", "flops", "forwards")
    return {
        "kind": "plan",
        "axes": [
            {"name": "memory", "title": "memory", "figure": "memory-cost", "low": min(peaks), "high": max(peaks)}
        ],
        "start": record["budget"],
        "methods": [{n: row[n] for n in names} | {"offloads": "Offloaded" in row["estimator"]} for row in known],
        "note": "Among the methods of the table. Weights, batch, gradients and the optimizer's state are included.",
    }


def _facts(record: dict[str, Any]) -> list[str]:
    facts = [f"{record['weights']:,} trained weights", record["device"]]
    if "dtype" in record:
        facts.append(record["dtype"])
    if record["batch"] is not None:
        facts.append(f"batch {record['batch']:,}")
    facts.append(record["optimizer"] or "no optimizer")
    facts.append(f"budget {record['budget']:,} bytes = {size(record['budget'])}, weights included")
    return facts


def _decision(rows: Sequence[dict[str, Any]], kinds: dict[str, str], choice: str | None) -> dict[str, Any]:
    """Return the table of forecasts, without columns that have only dashes; one row of each family, others folded."""
    most = max((row["peak"] for row in rows), default=0)
    texts = [_cells(row) for row in rows]
    columns = [name for name in (texts[0] if texts else ()) if any(text[name] != DASH for text in texts)]
    lines = []
    for row, text in zip(rows, texts, strict=True):
        cells = {name: cell(name, text[name]) for name in columns}
        cells["peak"]["bar"] = f"{100 * row['peak'] / most:.1f}"
        cells["fits"]["warn"] = not row["fits"]
        for name, value in {"peak": row["peak"], "forwards": row["forwards"], **_values(row)}.items():
            if name in cells:
                cells[name]["value"] = "" if value is None else f"{value:.8g}"
        lines.append({"method": row["method"], "cells": list(cells.values()), "family": kinds[row["method"]]})
    ordered = by_family(lines, lambda line: line["method"] != choice)
    return {"title": "Forecast of a step of each method", "columns": ["method", *columns], "rows": ordered}


def _values(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "est. s/step": row.get("seconds"),
        "steps × (theory)": row.get("steps"),
        "largest batch": row.get("largest"),
    }


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
    layers = [theme.budget_line(x, "peak"), rule.encode(x=x, tooltip=alt.Tooltip("label:N", title="budget"))]
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
