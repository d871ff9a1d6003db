"""What all figures share: the mark of each method, the focus, and the frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradcost.core.errors import require
from gradcost.report.palette import Mark

HEIGHT = 250
QUIET = "#888888"  # rules and numbers that belong to no method, on paper and on the dark side alike
FADED = 0.1
BYTES = " : ".join(
    [
        *(
            f"datum.value >= {1024**i} ? format(datum.value / {1024**i}, '.3~r') + ' {unit}'"
            for i, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB"))
        ),
        "format(datum.value, '.3~r') + ' B'",
    ]
)


@dataclass(frozen=True)
class Figure:
    """A drawing with its words: `spec` is Vega-Lite, `caption` says n, the interval and the protocol."""

    name: str
    title: str
    caption: str
    spec: dict[str, Any] = field(repr=False)


class Look:
    """How methods are drawn, each by its mark. Every figure has a parameter `focus`: a method, or nothing."""

    def __init__(self, methods: Sequence[str], drawn: Mapping[str, Mark]) -> None:
        self.alt = require("altair", "A report", "report")
        self.methods = list(methods)
        used = [drawn[method] for method in self.methods]
        colours = self.alt.Scale(domain=self.methods, range=[mark.colour for mark in used])
        shapes = self.alt.Scale(domain=self.methods, range=[mark.shape for mark in used])
        self.color = self.alt.Color("method:N", title=None, scale=colours)
        self.shape = self.alt.Shape("method:N", title=None, scale=shapes)

    def plain(self, rows: Sequence[dict[str, Any]]) -> Any:
        """A chart of `rows` without a colour."""
        return self.alt.Chart(self.alt.InlineData(values=list(rows)))

    def chart(self, rows: Sequence[dict[str, Any]]) -> Any:
        """A chart of `rows`, coloured by method."""
        return self.plain(rows).encode(color=self.color)

    def opacity(self, full: float, faded: float = FADED) -> Any:
        """`full`, unless another method is in focus."""
        value = self.alt.value
        return self.alt.condition("focus == '' || datum.method == focus", value(full), value(min(faded, full)))

    def tip(self, name: str, form: str, title: str | None = None) -> Any:
        """A line of a tooltip: the number `name`, in d3's format `form`."""
        return self.alt.Tooltip(f"{name}:Q", title=title or name, format=form)

    def figure(self, name: str, title: str, caption: str, layers: list[Any], height: int = HEIGHT) -> Figure:
        """The finished figure: `layers` in a frame as wide as its container."""
        framed = self.alt.layer(*layers).properties(width="container", height=height)
        framed = framed.add_params(self.alt.param(name="focus", value=""))
        framed = framed.configure_view(stroke=None)
        framed = framed.configure_legend(orient="bottom", columns=2, labelLimit=0, symbolOpacity=1)
        return Figure(name, title, caption, framed.to_dict())
