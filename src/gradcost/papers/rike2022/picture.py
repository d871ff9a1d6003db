"""The training loss of each row against the steps, as in the figures of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradcost.papers.rike2022.table import TableRow
from gradcost.report import series
from gradcost.report.theme import COLOURS
from gradcost.results.records import Results

_PANEL = 190  # pixels of a panel, in each direction
_COLOURS = {"forward": COLOURS[1], "backprop": COLOURS[0]}


def loss_curves(results: Results, table: Sequence[TableRow]) -> dict[str, Any] | None:
    """Return a Vega-Lite specification with one panel per optimizer; None if no row has a curve.

    The lines are medians over the seeds. Each point is a mean over the steps since the previous one.

    Args:
        results: the records of a results folder.
        table: the rows of Table 1 to draw, with their published settings.
    """
    rows = {row.name: row for row in table}
    panels = {row.name: row.name.split(" ", 1)[1] for row in table}
    points = [
        {
            "step": point["step"],
            "loss": point["median"],
            "gradient": rows[point["method"]].gradient,
            "panel": panels[point["method"]],
        }
        for point in series.curves(results, series.training)
        if point["method"] in rows
    ]
    if not points:
        return None
    colour = {"domain": list(_COLOURS), "range": list(_COLOURS.values())}
    axis, limits = {"format": "~s", "tickCount": 4}, {"domain": [0, 2.5]}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "data": {"values": points},
        "facet": {"field": "panel", "type": "nominal", "title": None, "sort": list(dict.fromkeys(panels.values()))},
        "columns": 3,
        "spec": {
            "width": _PANEL,
            "height": _PANEL,
            "mark": {"type": "line", "strokeWidth": 1.5, "clip": True},
            "encoding": {
                "x": {"field": "step", "type": "quantitative", "title": "steps", "axis": axis},
                "y": {"field": "loss", "type": "quantitative", "title": "training loss", "scale": limits},
                "color": {"field": "gradient", "type": "nominal", "title": None, "scale": colour},
            },
        },
    }
