"""A plan as one HTML file: what each method's memory is for, and what memory costs in forwards. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradcost.core.files import write_whole
from gradcost.report.breakdown import bars
from gradcost.report.pages import cell, rendered
from gradcost.report.palette import marks
from gradcost.report.theme import BYTES, QUIET, Figure, Look
from gradcost.report.ticks import powers_of_ten, powers_of_two
from gradcost.results.wording import DASH, number, size

_COLUMNS = ("method", "peak", "fits", "forwards", "est. s a step", "steps × (theory)", "largest batch")
_ANY = 1 << 24  # a batch beyond which none was looked at


def write(record: dict[str, Any], output: str | Path) -> Path:
    """Write the page of a plan's record (`Plan.record()`, with "curve" of `cost.curve.curve` if there is one).

    The file appears whole or not at all. Raises: OSError when it cannot be written, ImportError with the name of
    the extra when a package is missing.
    """
    return write_whole(Path(output), page(record))


def page(record: dict[str, Any]) -> str:
    """The whole page, a pure function of the record."""
    methods = [row["method"] for row in record["rows"]]
    drawn = marks(list(dict.fromkeys(methods)))
    told = [row for row in record["rows"] if row["refusal"] is None]
    look = Look([row["method"] for row in told], drawn)
    figures = [memory(look, told, record["budget"]), trade(look, told, record.get("curve") or [], record["budget"])]
    return rendered(
        "plan.html.j2",
        [figure for figure in figures if figure is not None],
        title=f"plan for {record['model']}",
        facts=_facts(record),
        sentences=[record["sentence"]],
        picked=record["choice"],
        marks=drawn,
        methods=look.methods,
        decision=_decision(told),
        notes=record["lines"],
        lists=[("Refused", ("method", "why"), [(r["method"], r["refusal"]) for r in record["rows"] if r["refusal"]])],
    )


def _facts(record: dict[str, Any]) -> list[str]:
    facts = [f"{record['weights']:,} trained weights", record["device"]]
    facts += [record["dtype"]] * ("dtype" in record)
    facts += [f"batch {record['batch']:,}"] * (record["batch"] is not None)
    facts.append(record["optimizer"] or "no optimizer")
    facts.append(f"budget {record['budget']:,} bytes = {size(record['budget'])}, weights included")
    return facts


def _decision(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The table, without the columns in which nothing is said."""
    most = max((row["peak"] for row in rows), default=0)
    made = []
    for row in rows:
        largest = row["largest"]
        texts = [
            size(row["peak"]),
            "yes" if row["fits"] else f"no, {size(row['over'])} over",
            f"{row['forwards']:.2f}",
            number(row["seconds"], 2),
            DASH if row["steps"] is None else number(row["steps"]),
            DASH if largest is None else "any" if largest >= _ANY else f"{largest:,}",
        ]
        cells = [cell(label, text) for label, text in zip(_COLUMNS[1:], texts, strict=True)]
        cells[0]["bar"] = f"{100 * row['peak'] / most:.1f}"
        cells[1]["warn"] = not row["fits"]
        made.append({"method": row["method"], "cells": cells})
    told = [i for i in range(len(_COLUMNS) - 1) if any(line["cells"][i]["text"] != DASH for line in made)]
    for line in made:
        line["cells"] = [line["cells"][i] for i in told]
    columns = [_COLUMNS[0], *(_COLUMNS[i + 1] for i in told)]
    return {"title": "What a step by each method takes", "columns": columns, "rows": made}


def memory(look: Look, rows: Sequence[dict[str, Any]], budget: int) -> Figure | None:
    """What the bytes at each method's peak are for, in bars, against the budget."""
    caption = (
        "What is alive at each method's peak, weights included, by purpose; all of one moment, so a bar sums to its "
        f"peak. The dashed line is the budget, {size(budget)}. Forecasts: nothing was run."
    )
    return bars(look, rows, budget, caption) if rows else None


def trade(look: Look, rows: Sequence[dict[str, Any]], curve: Sequence[dict[str, Any]], budget: int) -> Figure | None:
    """The cost of a step against its peak: checkpointing as curves, the methods as points."""
    if not rows:
        return None
    alt = look.alt
    timed = all(row["seconds"] is not None for row in rows) and not curve
    what, title = ("seconds", "estimated seconds a step") if timed else ("forwards", "forwards a step")
    points = [{**_only(row, what), "size": size(row["peak"])} for row in rows]
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
    rule = look.plain([{"peak": budget, "label": size(budget)}]).mark_rule(strokeDash=[4, 4], color=QUIET)
    layers = [rule.encode(x=x, tooltip=alt.Tooltip("label:N", title="budget"))]
    tip = [alt.Tooltip("size:N", title="peak"), look.tip(what, ".3~g", title)]
    for name, dash in (("Segments(k)", [2, 3]), ("best schedules", [1, 0])):
        some = [point for point in lines if point["curve"] == name]
        if some:
            line = look.plain(some).mark_line(strokeWidth=1.6, color=QUIET, strokeDash=dash)
            layers.append(line.encode(x=x, y=y, order=alt.Order("place:Q")))
            dots = look.plain(some).mark_circle(size=26, color=QUIET).encode(x=x, y=y)
            layers.append(dots.encode(tooltip=[alt.Tooltip("method:N", title=name), *tip]))
    shown = look.chart(points).mark_point(filled=True, size=110)
    layers.append(shown.encode(x=x, y=y, shape=look.shape, opacity=look.opacity(0.95), tooltip=["method:N", *tip]))
    caption = (
        f"Each mark is a method; left and low is good, both axes are logarithmic, and left of the dashed line "
        f"({size(budget)}) it fits. A step of an estimate is not worth a step of the gradient: see steps × above."
    )
    if lines:
        caption += " The solid line are the best schedules of recomputation, the dotted one Segments(1), (2), ..."
    return look.figure("memory-cost", "What saving memory costs", caption, layers, height=340)


def _only(row: dict[str, Any], what: str) -> dict[str, Any]:
    return {"method": row["method"], "peak": row["peak"], what: row[what]}
