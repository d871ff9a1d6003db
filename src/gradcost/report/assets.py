"""Every figure as SVG, PNG and PDF, and every table as CSV, Markdown and LaTeX: what a paper or a talk takes.

The files are drawn on white, with a legend of their own. Needs the extra gradcost[report].
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradcost.core.errors import require
from gradcost.core.files import write_whole
from gradcost.report import cards, formats, tables
from gradcost.report.figures import figures
from gradcost.report.formats import Table
from gradcost.report.theme import Figure
from gradcost.results.records import Results, read

WIDTH = 520  # pixels of a figure; a PNG has SCALE times as many
SCALE = 2
_CONFIG: dict[str, Any] = {
    "background": "white",
    "font": "Helvetica, Arial, sans-serif",
    "padding": 8,
    "axis": {"labelColor": "#4d545b", "titleColor": "#4d545b", "gridColor": "#e6e6e0", "titleFontWeight": 400},
    "axisX": {"grid": False, "labelFlush": True},
    "axisY": {"domain": False, "ticks": False},
    "text": {"color": "#1c1f22"},
    "title": {"anchor": "start", "fontSize": 13},
}
_WRITTEN = {"csv": formats.csv, "md": formats.markdown, "tex": formats.latex}


def write(folder: str | Path, output: str | Path | None = None) -> list[Path]:
    """Write the figures and tables of a results folder into `output`, by default report-files inside it.

    Each file appears whole or not at all; captions.md tells what every figure shows. Raises ValueError when `folder`
    holds no results, and ImportError with the name of the extra when a package is missing.
    """
    results = read(folder)
    place = Path(output) if output is not None else Path(folder) / "report-files"
    drawn = figures(results)
    captions = "".join(f"**{figure.title}** ({figure.name}). {figure.caption}\n\n" for figure in drawn)
    made = [write_whole(place / name, text) for name, text in (written(results) | {"captions.md": captions}).items()]
    return [*made, *(path for figure in drawn for path in _draw(figure, place))]


def written(results: Results) -> dict[str, str]:
    """Every table of a report, in each format, by the name of its file."""
    return {"results.csv": tables.to_csv(results)} | {
        f"{name}.{kind}": made(table) for name, table in _tables(results).items() for kind, made in _WRITTEN.items()
    }


def _tables(results: Results) -> dict[str, Table]:
    return {"decision": tables.table(results), "tuning": tables.audit(results), **cards.tables(results)}


def _draw(figure: Figure, place: Path) -> Iterator[Path]:
    vl = require("vl_convert", "A report", "report")
    spec = json.dumps(standing_alone(figure))
    yield write_whole(place / f"{figure.name}.svg", vl.vegalite_to_svg(spec))
    yield write_whole(place / f"{figure.name}.png", vl.vegalite_to_png(spec, scale=SCALE))
    yield write_whole(place / f"{figure.name}.pdf", vl.vegalite_to_pdf(spec))


def standing_alone(figure: Figure) -> dict[str, Any]:
    """The specification with a width, a title and colours of its own, for the page lends it none."""
    spec = {**figure.spec, "width": WIDTH, "title": figure.title}
    return spec | {"config": _CONFIG | figure.spec.get("config", {})}
