"""One HTML file that needs no network, from templates and figures.

Vega is inlined once and every figure is a JSON specification. The page forbids itself to load anything or
to run a script other than its own two (a Content-Security-Policy with their hashes), so a label from the
records is never more than text. Needs the extra gradcost[report].
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from importlib.resources import files
from typing import Any

from gradcost.core.errors import require
from gradcost.report.theme import Figure

_PACKAGES = ("jinja2", "markupsafe", "vl_convert")


def rendered(template: str, drawn: Sequence[Figure], **context: Any) -> str:
    """The page that the template makes of the context, with the figures drawn in it.

    The context holds `title`, `facts`, `sentences`, `picked` (a method or None), `marks`, `methods`, `decision`,
    `notes`, `lists`, and what the template asks for itself.
    """
    jinja2, safe = require("jinja2", "A report", "report"), require("markupsafe", "A report", "report").Markup
    scripts = [
        require("vl_convert", "A report", "report").javascript_bundle("window.vegaEmbed = vegaEmbed;"),
        _packaged("report.js"),
    ]
    specs = {figure.name: {k: v for k, v in figure.spec.items() if k != "$schema"} for figure in drawn}
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_packaged), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(
        css=safe(_packaged("report.css")),
        allowed=safe(" ".join(map(_fingerprint, scripts))),
        figures=drawn,
        specs=safe(_harmless(json.dumps(specs, separators=(",", ":"), allow_nan=False))),
        scripts=[safe(script) for script in scripts],
        **context,
    )


def cell(label: str, text: str) -> dict[str, Any]:
    """A cell in two parts: the number, and in small what follows it after " [", " (" or a comma."""
    first = min((i for sep in (" [", " (", ", ") if (i := text.find(sep)) >= 0), default=len(text))
    first, more = text[:first], text[first:].removeprefix(",").strip()
    return {"label": label, "text": first, "more": more, "strip": None, "bar": None, "warn": False}


def _packaged(name: str) -> str:
    return files("gradcost.report").joinpath(name).read_text("utf-8")


def _fingerprint(script: str) -> str:
    return f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'"


def _harmless(text: str) -> str:
    """JSON that cannot end the script element it stands in."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
