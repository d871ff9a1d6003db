"""The calculator: a plan for many settings as one HTML file, whose controls choose among figures computed before."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradcost.core.errors import BadInput, require
from gradcost.core.files import write_chosen
from gradcost.report.breakdown import COLOURS, PURPOSES
from gradcost.report.pages import filled, packaged
from gradcost.report.theme import Mark, marks

_TITLE = "plan calculator"
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}  # of --memory
_AXES = {"length": "tokens", "lora": "LoRA rank", "bits": "bits of frozen weights", "chunks": "chunks of the loss"}
_NESTED = "nested checkpointing"


def check_output(output: str | Path) -> None:
    """Check, before the figures are computed, that the page can be made and would replace nothing of something else.

    Raises:
        BadInput: `output` is a folder, or a file that is no calculator.
        MissingExtra: a package of gradcost[report] is not installed.
    """
    for module in ("jinja2", "markupsafe"):
        require(module, "A report", "report")
    path = Path(output)
    if path.is_dir():
        raise BadInput(f"{path} is a folder: give the name of a file (-o {path / 'calculator.html'}).")
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(4096).decode("utf-8", "replace")
        if start.strip() and not re.search(rf"<title>{_TITLE}[^<]* – gradcost</title>", start):
            raise BadInput(f"{path} belongs to something else, and no calculator: choose another file (-o FILE).")


def write(record: dict[str, Any], output: str | Path) -> Path:
    """Write the page of a sweep.

    Args:
        record: the settings and the figures, as `gradcost plan --sweep --json` prints them.
        output: the file.
    Returns:
        The path of the file, which is written atomically.
    Raises:
        BadInput, MissingExtra: as `check_output`.
        OSError: the file cannot be written.
    """
    check_output(output)
    return write_chosen(Path(output), page(record))


def page(record: dict[str, Any]) -> str:
    """Return the HTML of the calculator, which depends on `record` alone."""
    first = next(each for each in record["objectives"] if "methods" in each)
    name = f"{_TITLE} for {first['model']}"
    data = _Data().of(record)
    return filled(
        "calculator.html.j2",
        [packaged("page.js") + packaged("calculator.js")],
        data | {"facts": [first["device"]], "start": _start(record["sizes"])},
        styles=("report.css", "calculator.css"),
        title=name,
        made_by=record["made by"],
        sizes=_ranges(record["sizes"]),
        simulated=sum(each.get("simulated", 0) for each in record["objectives"]),
    )


def _start(sizes: Sequence[int]) -> int:
    """Return the batch at first: the largest up to 8."""
    return max((size for size in sizes if size <= 8), default=sizes[0])


def _ranges(sizes: Sequence[int]) -> str:
    """Return sizes as text: "1 to 64", or "1, 8, 64"."""
    if len(sizes) > 2 and sizes[-1] - sizes[0] == len(sizes) - 1:
        return f"{sizes[0]:,} to {sizes[-1]:,}"
    return ", ".join(f"{size:,}" for size in sizes)


class _Data:
    """The data of the page: equal lines, words and expressions are stored once, and pieces have their places."""

    def __init__(self) -> None:
        self.lines: dict[tuple[int, ...], int] = {}
        self.words: dict[tuple[str, ...], int] = {}
        self.writes: dict[str, int] = {}
        self.methods: dict[str, dict[str, Any]] = {}

    def of(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return the data of a record."""
        looks = _marks(record["objectives"])
        objectives = [self._objective(each, looks) for each in record["objectives"]]
        figures = next(each["figures"] for each in record["objectives"] if "figures" in each)
        return {
            "memory": record["memory"],
            "units": _UNITS,
            "command": record["command"],
            "sizes": record["sizes"],
            "axes": [_axis(axis) for axis in record["axes"]],
            "figures": figures,
            "colours": [COLOURS[PURPOSES.index(name)] for name in figures if name in PURPOSES],
            "nested": _look(looks[_NESTED]),
            "objectives": objectives,
            "methods": list(self.methods.values()),
            "lines": [list(line) for line in self.lines],
            "words": [list(words) for words in self.words],
            "writes": list(self.writes),
        }

    def _objective(self, each: dict[str, Any], looks: dict[str, Mark]) -> dict[str, Any]:
        if "refusal" in each:
            return {"choice": each["choice"], "refusal": each["refusal"]}
        return {
            **{name: each[name] for name in ("choice", "weights", "dtype", "optimizer")},
            "methods": [self._method(method, looks) for method in each["methods"]],
            "schedules": [self._schedules(found) for found in each["schedules"]],
            "least": [self._least(piece) for piece in each["least"]],
        }

    def _method(self, method: dict[str, Any], looks: dict[str, Mark]) -> list[Any]:
        key = method["estimator"]
        if key not in self.methods:
            shown = {name: method[name] for name in ("method", "write", "family", "exact", "offloads", "parts")}
            self.methods[key] = shown | {"length": len(method["write"]), "mark": _look(looks[method["method"]])}
        computed = sorted({method["parts"] * size for piece in method["pieces"] for size in piece["computed"]})
        pieces = [self._piece(piece) for piece in method["pieces"]]
        return [list(self.methods).index(key), method["steps"], method["steps cell"], pieces, computed]

    def _schedules(self, found: dict[str, Any]) -> dict[str, Any]:
        return found | {
            "schedules": [self._schedule(each) for each in found["schedules"]],
            "least": None if found["least"] is None else self._schedule(found["least"]),
        }

    def _schedule(self, each: dict[str, Any]) -> dict[str, Any]:
        return {
            "write": _place(self.writes, each["write"]),
            "pieces": [self._piece(piece) for piece in each["pieces"]],
        }

    def _least(self, piece: dict[str, Any]) -> list[Any]:
        """Return a piece whose last word is the place of its expression."""
        if len(piece["words"]) == 1:
            return self._piece(piece)
        *words, write = piece["words"]
        return self._piece(piece | {"words": [*words, _place(self.writes, write)]})

    def _piece(self, piece: dict[str, Any]) -> list[Any]:
        """Return first, last, the place of the words, the line of seconds, and the places of the other lines."""
        seconds = piece["seconds"] or [None, None]
        lines = [_place(self.lines, tuple(line)) for line in piece["lines"]]
        return [piece["first"], piece["last"], _place(self.words, tuple(piece["words"])), *seconds, *lines]


def _place(known: dict[Any, int], item: Any) -> int:
    return known.setdefault(item, len(known))


def _marks(objectives: Sequence[dict[str, Any]]) -> dict[str, Mark]:
    """Return the mark of each method, and of the schedules of `Within`: a colour for each family."""
    found = {method["method"]: method["family"] for each in objectives for method in each.get("methods", ())}
    names = [_NESTED, *found]
    heads = {family: name for name, family in reversed(found.items())}
    return marks(names, {name: heads[family] for name, family in found.items()})


def _look(mark: Mark) -> dict[str, str]:
    return {"colour": mark.colour, "shape": mark.shape}


def _axis(axis: dict[str, Any]) -> dict[str, Any]:
    values = [value | {"shown": "none" if value["words"] == "" else value["label"]} for value in axis["values"]]
    return {"name": axis["name"], "title": _AXES.get(axis["name"], axis["name"]), "values": values}
