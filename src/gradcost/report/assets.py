"""The figures of a report as SVG, PNG and PDF files, and its tables as CSV, Markdown and LaTeX.

Figures are drawn on white and have a legend. Needs the extra gradcost[report].
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradcost.core.errors import require
from gradcost.core.files import write_whole
from gradcost.report import budgets, tables, targets
from gradcost.report.figures import figures
from gradcost.report.summary_page import summary_page
from gradcost.report.tables import Table
from gradcost.report.theme import Figure
from gradcost.results.records import Results, read

WIDTH = 520  # of a figure, in pixels
SCALE = 2  # pixels of a PNG per pixel of the figure, in each direction
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
_FORMATS = {"csv": tables.formatted_csv, "md": tables.markdown, "tex": tables.latex}


def write(folder: str | Path, output: str | Path | None = None, *, results: Results | None = None) -> list[Path]:
    """Write the figures and tables of a results folder as files, and the captions to captions.md.

    Args:
        folder: a results folder.
        output: the folder for the files. None: report-files inside `folder`.
        results: the content of `folder`. None: it is read.
    Returns:
        The paths of the files. Each file is written atomically.
    Raises:
        BadInput: `folder` is not a results folder.
        MissingExtra: a package of gradcost[report] is not installed.
    """
    results = read(folder) if results is None else results
    target = Path(output) if output is not None else Path(folder) / "report-files"
    drawn = figures(results)
    captions = "".join(tables.inert(f"**{figure.title}** ({figure.name}). {figure.caption}\n\n") for figure in drawn)
    texts = written(results) | {"captions.md": captions}
    paths = [write_whole(target / name, text) for name, text in texts.items()]
    return [*paths, *(path for figure in drawn for path in _draw(figure, target))]


def written(results: Results) -> dict[str, str]:
    """Return {file name: text}: every table of a report in every format, and all of them on one page."""
    return {"results.csv": tables.to_csv(results), "page.md": summary_page(results)} | {
        f"{name}.{extension}": to_text(table)
        for name, table in _tables(results).items()
        for extension, to_text in _FORMATS.items()
    }


def _tables(results: Results) -> dict[str, Table]:
    found = {"decision": tables.table(results), "tuning": tables.audit(results)}
    return {**found, **targets.tables(results), **budgets.tables(results)}


def svg(spec: dict[str, Any]) -> str:
    """Return a figure as SVG, in the style of the other figures.

    Args:
        spec: its Vega-Lite specification.
    Raises:
        MissingExtra: a package of gradcost[report] is not installed.
    """
    return require("vl_convert", "A figure", "report").vegalite_to_svg(json.dumps(spec | {"config": _CONFIG}))


def _draw(figure: Figure, target: Path) -> Iterator[Path]:
    """Write a figure as SVG, PNG and PDF; yield each path after its file is written."""
    vl = require("vl_convert", "A report", "report")
    spec = json.dumps(standalone(figure))
    yield write_whole(target / f"{figure.name}.svg", vl.vegalite_to_svg(spec))
    yield write_whole(target / f"{figure.name}.png", vl.vegalite_to_png(spec, scale=SCALE))
    yield write_whole(target / f"{figure.name}.pdf", vl.vegalite_to_pdf(spec))


def standalone(figure: Figure) -> dict[str, Any]:
    """Return the Vega-Lite specification with width, title and colours. In report.html, the page sets these."""
    spec = {**figure.spec, "width": WIDTH, "title": figure.title}
    return spec | {"config": _CONFIG | figure.spec.get("config", {})}
