"""Build an HTML file that needs no network, from a template and figures.

- Vega is included once; every figure is a JSON specification.
- A Content-Security-Policy allows only the included scripts, which it lists by hash, and blocks all loading.
  So a label in the records cannot run as a script.

Needs the extra gradcost[report].
"""

from __future__ import annotations

import contextlib
import json
from base64 import b64encode
from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib.resources import files
from typing import Any

from gradcost.core.errors import MissingExtra, require
from gradcost.core.files import cache_folder, write_whole
from gradcost.report.theme import Figure

_EMBED = "window.vegaEmbed = vegaEmbed;"


def rendered(template: str, drawn: Sequence[Figure], answer: dict[str, Any] | None = None, **context: Any) -> str:
    """Return the HTML of a template, filled with figures and other values.

    Args:
        template: name of the template.
        drawn: the figures.
        answer: the data of the slider (`answer.answer`). None: no slider.
        context: `title`, `facts`, `sentences`, `picked` (a method or None), `marks`, `entries` (of the legend: lists
            of methods with one mark), `decision`, `notes`, `pictures` with `picture_title`, `folds` (headings by id),
            `groups` (figures by id), `lists`, and other values that the template uses.
    Returns:
        HTML.
    Raises:
        MissingExtra: a package of gradcost[report] is not installed.
    """
    scripts = [_vega(), packaged("page.js") + packaged("report.js")]
    specs: dict[str, Any] = {f.name: {k: v for k, v in f.spec.items() if k != "$schema"} for f in drawn}
    specs["entries"] = context["entries"]
    if answer is not None:
        specs["answer"] = answer
    contents = [("answer", "Answer"), *_contents(context)]
    return filled(template, scripts, specs, has_answer=answer is not None, contents=contents, **context)


def filled(
    template: str,
    programs: Sequence[str],
    data: dict[str, Any],
    styles: Sequence[str] = ("report.css",),
    **context: Any,
) -> str:
    """Return the HTML of a template with scripts and data. A Content-Security-Policy allows these scripts alone.

    Args:
        template: name of the template.
        programs: the JavaScript sources (`scripts` in the template; `allowed` has their hashes).
        data: plain JSON data for the scripts (`specs` in the template).
        styles: names of style sheets of this package (`css` in the template).
        context: other values that the template uses.
    Raises:
        MissingExtra: a package of gradcost[report] is not installed.
    """
    jinja2, safe = require("jinja2", "A report", "report"), require("markupsafe", "A report", "report").Markup
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(packaged), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(
        css=safe("".join(map(packaged, styles))),
        allowed=safe(" ".join(map(_csp_hash, programs))),
        specs=safe(_script_safe(json.dumps(data, separators=(",", ":"), allow_nan=False))),
        scripts=[safe(script) for script in programs],
        **context,
    )


def _contents(context: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the ids and headings of a page's sections below the answer."""
    picture = [("picture", "Picture")] if context["pictures"] else []
    table = [("table", "Table")] if context["decision"]["rows"] else []
    return [*picture, *table, *context["folds"].items()]


def _vega() -> str:
    """Return the JavaScript of Vega. It is kept in the cache folder, because making it takes a second and 100 MiB."""
    converter = require("vl_convert", "A report", "report")
    try:
        path = cache_folder() / f"vega-{converter.__version__}.js"
    except MissingExtra:
        return converter.javascript_bundle(_EMBED)
    with contextlib.suppress(OSError, ValueError):
        checksum, _, script = path.read_text("utf-8").partition("\n")
        if checksum == _checksum(script):
            return script
    script = converter.javascript_bundle(_EMBED)
    with contextlib.suppress(OSError):
        write_whole(path, f"{_checksum(script)}\n{script}")
    return script


def _checksum(script: str) -> str:
    return f"// {sha256(script.encode()).hexdigest()}"


def cell(label: str, text: str) -> dict[str, Any]:
    """Return a table cell. `text` is split at its first " [", " (" or ", "; the rest is in "more", in small print."""
    end = min((i for sep in (" [", " (", ", ") if (i := text.find(sep)) >= 0), default=len(text))
    return {
        "label": label,
        "text": text[:end],
        "more": text[end:].removeprefix(",").strip(),
        "value": "",
        "strip": None,
        "bar": None,
        "warn": False,
    }


def by_family(lines: Sequence[dict[str, Any]], rank: Callable[[dict[str, Any]], Any]) -> list[dict[str, Any]]:
    """Return the lines of a table by their "family": the first by rank, then the others, which the page folds in."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(line["family"], []).append(line)
    ordered = []
    for group in groups.values():
        for place, line in enumerate(sorted(group, key=rank)):
            more = f"{len(group) - 1} more like it" if place == 0 and len(group) > 1 else ""
            ordered.append(line | {"is_member": place > 0, "members": more})
    return ordered


def packaged(name: str) -> str:
    """Return the text of a file of this package."""
    return files("gradcost.report").joinpath(name).read_text("utf-8")


def _csp_hash(script: str) -> str:
    """Return the hash of a script as the Content-Security-Policy lists it."""
    return f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'"


def _script_safe(text: str) -> str:
    """Escape <, > and & in JSON, so that no string in it can end the script element around it."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
