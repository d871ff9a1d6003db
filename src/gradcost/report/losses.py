"""The loss against what was spent for it: steps, samples, FLOPs and seconds.

The lines are medians over seeds. A run that diverged counts as the greatest loss from there on, so a line ends
where most of its runs have diverged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from gradcost.report import series
from gradcost.report.captions import look_of, protocol
from gradcost.report.theme import QUIET, Figure, Look
from gradcost.report.ticks import powers_of_ten
from gradcost.results.rankings import FLOPS, SECONDS
from gradcost.results.records import Results
from gradcost.results.summary import summarise
from gradcost.results.wording import count, number


class Axis(NamedTuple):
    """What a loss is drawn against: `prices` are those of a step by method."""

    name: str
    title: str
    prices: Mapping[str, float]
    told: str
    form: str = "~s"  # of the numbers along it, for d3


def axes(results: Results) -> list[Axis]:
    """Samples, FLOPs and seconds, as far as they are known."""
    methods, batch = [row.method for row in summarise(results)], results.study.batch
    samples = dict.fromkeys(methods, float(batch)) if batch else {}
    counted = {c.method: float(price) for c in results.costs if (price := FLOPS.price(c)) is not None}
    timed = {c.method: float(price) for c in results.costs if (price := SECONDS.price(c)) is not None}
    made = [
        Axis("samples", "samples", samples, "Every step sees one batch."),
        Axis("flops", "FLOPs", counted, "A step costs the FLOPs that were counted for it."),
        Axis(
            "seconds",
            "seconds",
            timed,
            "A step takes its calibrated median, whatever else the machine did meanwhile.",
            "~g",
        ),
    ]
    return [axis for axis in made if axis.prices]


def training(results: Results) -> Figure | None:
    """The training loss against the step."""
    width = series.window(results, series.training)
    each = "at every recorded step" if width == 1 else f"each point the mean of {count(width, 'step')}"
    what = f"the loss of the batch that is trained on, {each}"
    rows = series.curves(results, series.training)
    return _against_steps(results, rows, "Training loss", what) if rows else None


def validation(results: Results) -> list[Figure]:
    """The validation loss against steps, and against each other axis."""
    rows = series.curves(results, series.validation)
    if not rows:
        return []
    first = _against_steps(results, rows, "Validation loss", "the loss of the validation set")
    return [first, *(figure for axis in axes(results) if (figure := _against(results, rows, axis)))]


def _against_steps(results: Results, rows: list[dict[str, Any]], title: str, what: str) -> Figure:
    look = look_of(results)
    alt = look.alt
    end = max(results.study.steps, *(row["step"] for row in rows))
    axis = alt.Axis(format="~s", tickCount=6)
    x = alt.X("step:Q", title="steps", axis=axis, scale=alt.Scale(nice=False, domain=[0, end]))
    y = _height(look, rows, title.lower())
    caption = (
        f"{protocol(results)} Shown is {what}{_logarithmic(y)}; lines are medians over seeds, bands run from the "
        f"least to the greatest seed.{_lost(results)}"
    )
    layers = [*_layers(look, rows, x, y), _ruler(look, rows, x)]
    return look.figure(title.lower().replace(" ", "-"), f"{title} against steps", caption, layers)


def _against(results: Results, rows: list[dict[str, Any]], axis: Axis) -> Figure | None:
    rows = [
        {**row, "spent": float(f"{row['step'] * axis.prices[row['method']]:.5g}")}
        for row in rows
        if row["method"] in axis.prices and row["step"] > 0
    ]
    if not rows:
        return None
    look = look_of(results)
    x, wide = _spending(look, rows, axis)
    y = _height(look, rows, "validation loss")
    dots = look.chart(rows).mark_circle(size=140, opacity=0).encode(x=x, y=look.alt.Y("median:Q", **y))
    tip = ["method:N", look.tip("step", ","), look.tip("spent", f".3{axis.form}", axis.title)]
    dots = dots.encode(tooltip=[*tip, *(look.tip(name, ".4~g") for name in ("median", "low", "high"))])
    caption = (
        f"{protocol(results)} {axis.told} Lines are medians over seeds, bands run from the least to the greatest "
        f"seed{_logarithmic(y)}{', and the horizontal scale is logarithmic' if wide else ''}.{_lost(results)}"
    )
    title = f"Validation loss against {axis.title}"
    return look.figure(f"validation-loss-{axis.name}", title, caption, [*_layers(look, rows, x, y), dots])


def _spending(look: Look, rows: list[dict[str, Any]], axis: Axis) -> tuple[Any, bool]:
    """The horizontal axis, and whether it is logarithmic: where one method spends over four times another's."""
    alt = look.alt
    ends: dict[str, float] = {}
    for row in rows:
        ends[row["method"]] = max(row["spent"], ends.get(row["method"], 0.0))
    x, high = alt.X("spent:Q", title=axis.title), max(ends.values())
    if high <= 4 * min(ends.values()):
        return x.scale(nice=False, domain=[0, high]).axis(format=axis.form, tickCount=5), False
    low = min(row["spent"] for row in rows)
    return x.scale(type="log", nice=False, domain=[low, high]).axis(
        format=axis.form, values=powers_of_ten(low, high)
    ), True


def _height(look: Look, rows: list[dict[str, Any]], title: str) -> dict[str, Any]:
    """The vertical axis, logarithmic where the losses differ by a factor of 20."""
    alt = look.alt
    least, most = min(row["low"] for row in rows), max(row["high"] for row in rows)
    if not (least > 0 and most > 20 * least):
        return {"title": title, "scale": alt.Scale(zero=False)}
    axis = alt.Axis(values=powers_of_ten(least, most), format="~g")
    return {"title": title, "scale": alt.Scale(type="log", nice=False), "axis": axis}


def _logarithmic(y: dict[str, Any]) -> str:
    return ", on a logarithmic scale" if "axis" in y else ""


def _lost(results: Results) -> str:
    lost = sum(row.diverged for row in summarise(results))
    counts = "counts as the greatest loss" if lost == 1 else "count as the greatest losses"
    return f" {count(lost, 'run')} that diverged {counts} from there on." if lost else ""


def _layers(look: Look, rows: list[dict[str, Any]], x: Any, y: dict[str, Any]) -> list[Any]:
    """Bands, lines, and the methods' shapes here and there on them."""
    alt = look.alt
    base = look.chart(rows).encode(x=x)
    band = base.mark_area().encode(y=alt.Y("low:Q", **y), y2="high:Q", opacity=look.opacity(0.16, 0.03))
    line = base.mark_line(strokeWidth=2).encode(y=alt.Y("median:Q", **y), opacity=look.opacity(1))
    every = max(1, len({row["step"] for row in rows}) // 8)
    some = [row for row in rows if row["place"] % every == every // 2]
    shapes = look.chart(some).mark_point(filled=True, size=50)
    shapes = shapes.encode(x=x, y=alt.Y("median:Q", **y), shape=look.shape, opacity=look.opacity(1))
    return [band, line, shapes]


def _ruler(look: Look, rows: list[dict[str, Any]], x: Any) -> Any:
    """A rule under the pointer that tells every method's value at that step."""
    alt = look.alt
    drawn = {row["method"] for row in rows}
    keys = {method: f"m{i}" for i, method in enumerate(look.methods) if method in drawn}
    steps: dict[int, dict[str, Any]] = {}
    for row in rows:
        steps.setdefault(row["step"], {"step": row["step"]})[keys[row["method"]]] = number(row["median"])
    tip = [look.tip("step", ","), *(alt.Tooltip(f"{key}:N", title=method) for method, key in keys.items())]
    hover = alt.selection_point(
        name="ruler", fields=["step"], nearest=True, on="pointerover", clear="pointerout", empty=False
    )
    rule = look.plain([steps[step] for step in sorted(steps)]).mark_rule(color=QUIET, strokeWidth=1)
    seen = alt.condition(hover, alt.value(0.7), alt.value(0))
    return rule.encode(x=x, opacity=seen, tooltip=tip).add_params(hover)
