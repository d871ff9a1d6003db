"""What all figures have in common: colour and shape of each method, axis ticks, size, and phrases for captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, floor, log
from typing import Any

from gradcost.core.errors import require
from gradcost.report.families import families, twins
from gradcost.results.records import Results
from gradcost.results.summary import summarise
from gradcost.results.tuning import final_steps
from gradcost.results.wording import count, listed

HEIGHT = 250  # of a figure, in pixels
NEUTRAL = "#888888"  # lines and numbers that belong to no method; visible on light and dark backgrounds
FADED = 0.1  # opacity of the other methods while one is in focus
# Vega expression for the labels of an axis of bytes: 1.5 KiB, 2 MiB.
BYTES = " : ".join(
    [
        *(
            f"datum.value >= {1024**i} ? format(datum.value / {1024**i}, '.3~r') + ' {unit}'"
            for i, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB"))
        ),
        "format(datum.value, '.3~r') + ' B'",
    ]
)

# The palette of Okabe and Ito (2008), distinct for any colour vision. Black is replaced by grey for the dark theme.
# Yellow is weak on white, so it is darkened and comes last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#C9B400")
SHAPES = (
    "M.95,0A.95,.95,0,1,1,-.95,0A.95,.95,0,1,1,.95,0Z",  # circle
    "M-.85,-.85H.85V.85H-.85Z",  # square
    "M0,-1L1,.8H-1Z",  # triangle
    "M0,-1.15L1.15,0L0,1.15L-1.15,0Z",  # diamond
    "M0,1L1,-.8H-1Z",  # triangle on its tip
    "M-.36,-1H.36V-.36H1V.36H.36V1H-.36V.36H-1V-.36H-.36Z",  # plus
    "M-.55,-.95H.55L1.1,0L.55,.95H-.55L-1.1,0Z",  # hexagon
    "M-.95,-.9H.95L-.95,.9H.95Z",  # hourglass
)
CROSS = "M-.8,-.8L.8,.8M-.8,.8L.8,-.8"  # marks a diverged run

# Levels of ticks, coarse to fine. (s, factors): every s-th power of the base, times each factor.
_TICKS_OF_TWO = ((4, (1,)), (2, (1,)), (1, (1,)), (1, (1, 1.5)), (1, (1, 1.25, 1.5, 1.75)))
_TICKS_OF_TEN = ((4, (1,)), (2, (1,)), (1, (1,)), (1, (1, 3)), (1, (1, 2, 5)), (1, (1, 1.5, 2, 3, 4, 5, 6, 7, 8)))


@dataclass(frozen=True)
class Mark:
    """The colour of a method, and its shape as an SVG path in the square from -1 to 1."""

    colour: str
    shape: str


def marks(
    methods: Sequence[str], families: Mapping[str, str] | None = None, twins: Mapping[str, str] | None = None
) -> dict[str, Mark]:
    """Return a mark for each method: the colour of its family, and a shape. Twins share one mark.

    From the ninth family on, colours repeat. Two methods have the same colour and shape only if all pairs are used.

    Args:
        methods: labels of the methods.
        families: the first method of each method's family. None: each method is a family of its own.
        twins: the first method with the same runs. None: no two methods have the same runs.
    """
    n, m = len(COLOURS), len(SHAPES)
    found: dict[str, Mark] = {}
    places: dict[str, int] = {}
    for name in methods:
        twin = (twins or {}).get(name, name)
        if twin in found:
            found[name] = found[twin]
            continue
        place = places.setdefault((families or {}).get(name, name), len(places))
        pairs = (Mark(COLOURS[(place + shift) % n], SHAPES[(place + i) % m]) for shift in range(n) for i in range(m))
        used = set(found.values())
        found[name] = next((mark for mark in pairs if mark not in used), Mark(COLOURS[place % n], SHAPES[place % m]))
    return found


def study_marks(results: Results) -> dict[str, Mark]:
    """Return the marks of a study's methods, refused ones included."""
    labels = [
        *results.study.methods,
        *(row.method for row in summarise(results)),
        *(r.method for r in results.refused),
    ]
    return marks(list(dict.fromkeys(labels)), families(results), twins(results))


@dataclass(frozen=True)
class Figure:
    """A figure of a report: a Vega-Lite specification with its title and caption.

    Args:
        name: name of the image files and of the HTML element.
        title: the title.
        caption: what is drawn, the number of seeds, the kind of interval and the protocol.
        spec: the Vega-Lite specification.
    """

    name: str
    title: str
    caption: str
    spec: dict[str, Any] = field(repr=False)


class Theme:
    """Makes figures that draw each method in its colour and shape.

    Every figure has a Vega parameter `focus`: the labels of the methods to highlight; an empty list for none.

    Args:
        methods: labels of the methods in the figure.
        drawn: the mark of each method (`marks`).
    """

    def __init__(self, methods: Sequence[str], drawn: Mapping[str, Mark]) -> None:
        self.alt = require("altair", "A report", "report")
        self.methods = list(methods)
        self.data: list[Sequence[dict[str, Any]]] = []  # rows of the charts
        used = [drawn[method] for method in self.methods]
        colours = self.alt.Scale(domain=self.methods, range=[mark.colour for mark in used])
        shapes = self.alt.Scale(domain=self.methods, range=[mark.shape for mark in used])
        self.color = self.alt.Color("method:N", title=None, scale=colours)
        self.shape = self.alt.Shape("method:N", title=None, scale=shapes)

    def plain(self, rows: Sequence[dict[str, Any]]) -> Any:
        """Return a chart of `rows` without colours.

        The chart has the name of the rows only, and `figure` adds them: Altair copies a chart at every call.
        """
        place = next((i for i, known in enumerate(self.data) if known is rows), len(self.data))
        if place == len(self.data):
            self.data.append(rows)
        return self.alt.Chart(self.alt.NamedData(name=f"rows-{place}"))

    def chart(self, rows: Sequence[dict[str, Any]]) -> Any:
        """Return a chart of `rows` in the colours of the methods."""
        return self.plain(rows).encode(color=self.color)

    def opacity(self, full: float, faded: float = FADED) -> Any:
        """Return an opacity of `full`, or of `faded` while another method is in focus."""
        condition = {"test": "!focus.length || indexof(focus, datum.method) >= 0", "value": full}
        return self.alt.OpacityValue(min(faded, full), condition=condition)

    def tip(self, name: str, form: str, title: str | None = None) -> Any:
        """Return one line of a tooltip: the field `name` as a number in d3's format `form`."""
        return self.alt.Tooltip(f"{name}:Q", title=title or name, format=form)

    def budget_line(self, x: Any, field: str) -> Any:
        """Return a vertical line at the Vega parameter `budget`, which the page sets. There is none at first."""
        line = self.plain([{}]).transform_calculate(**{field: "budget"}).transform_filter(f"datum.{field} > 0")
        return line.mark_rule(strokeDash=[4, 4], color=NEUTRAL, strokeWidth=1.5, clip=True).encode(x=x)

    def figure(self, name: str, title: str, caption: str, layers: list[Any], height: int = HEIGHT) -> Figure:
        """Return a figure that overlays `layers`. It is as wide as its HTML container and `height` pixels high."""
        # Altair copies all layers at every call, so the rest is added to the specification.
        spec = self.alt.layer(*layers).to_dict(validate=False)  # the tests validate every figure
        spec |= {"width": "container", "height": height}
        spec["params"] = [*spec.get("params", ()), {"name": "focus", "value": []}, {"name": "budget", "value": 0}]
        legend = {"orient": "bottom", "columns": 2, "labelLimit": 0, "symbolOpacity": 1}
        spec["config"] |= {"view": {**spec["config"]["view"], "stroke": None}, "legend": legend}
        spec["datasets"] = {f"rows-{place}": list(rows) for place, rows in enumerate(self.data)}
        return Figure(name, title, caption, spec)


def theme_of(results: Results) -> Theme:
    """Return the theme for the methods of a study."""
    return Theme([row.method for row in summarise(results)], study_marks(results))


def powers_of_two(low: float, high: float) -> list[float]:
    """Return ticks for a logarithmic axis of bytes, such as 8, 16 and 32 KiB."""
    return _ticks(low, high, 2, _TICKS_OF_TWO)


def powers_of_ten(low: float, high: float) -> list[float]:
    """Return ticks for a logarithmic axis of losses or learning rates, such as 0.001, 0.01 and 0.1."""
    return _ticks(low, high, 10, _TICKS_OF_TEN)


def _ticks(low: float, high: float, base: int, levels: Sequence[tuple[int, Sequence[float]]]) -> list[float]:
    """Return the ticks in [low, high] of the coarsest level with three or more of them, else of the finest level."""
    ticks: list[float] = []
    for stride, factors in levels:
        first = floor(floor(log(low, base)) / stride) * stride
        powers = range(first, ceil(log(high, base)) + 1, stride)
        ticks = [x for k in powers for f in factors if low <= (x := float(f"{f * float(base) ** k:.12g}")) <= high]
        if len(ticks) >= 3:
            break
    return ticks


def protocol(results: Results) -> str:
    """Return a sentence such as: 5 seeds, 200 steps of batch 64, SGD at each method's tuned learning rate."""
    study = results.study
    used = {run.optimizer.partition("(")[0] for run in results.trials if run.phase == "final"}
    tuned = any(run.phase == "tune" for run in results.trials)
    rate = "each method's tuned learning rate" if tuned else "the learning rates that the study gives"
    batch = "" if study.batch is None else f" of batch {study.batch}"
    runs = f"{count(len(study.seeds), 'seed')}, {final_steps(results)}{batch}"
    return f"{runs}, {listed(sorted(used)) or study.optimizer} at {rate}."


def intervals(results: Results) -> str:
    """Describe the intervals of the study and their confidence, for a caption."""
    kinds = sorted({(row.accuracy.n, row.accuracy.confidence) for row in summarise(results) if row.accuracy})
    levels = listed([f"{100 * confidence:.4g}% over {count(n, 'seed')}" for n, confidence in kinds if n > 1])
    return "the distribution-free interval of the median" + (f" (confidence {levels})" if levels else "")
