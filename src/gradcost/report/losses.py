"""Figures of the loss against steps, samples, FLOPs and seconds.

Lines are medians over seeds. From its divergence on, the loss of a run counts as infinite. So the line of a method
ends where most of its runs have diverged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from gradcost.report import series
from gradcost.report.theme import NEUTRAL, Figure, Theme, powers_of_ten, protocol, theme_of
from gradcost.results.rankings import FLOPS, SECONDS
from gradcost.results.records import Results
from gradcost.results.summary import summarise
from gradcost.results.wording import count, number


class Axis(NamedTuple):
    """A horizontal axis.

    Args:
        name: part of the figure's name.
        title: title of the axis; its unit.
        per_step: amount of the unit that one step takes, by method.
        caption: a sentence on how the amount was measured.
        form: d3 format of the tick labels.
    """

    name: str
    title: str
    per_step: Mapping[str, float]
    caption: str
    form: str = "~s"


def axes(results: Results) -> list[Axis]:
    """Return the axes samples, FLOPs and seconds; an axis without measurements is omitted."""
    methods, batch = [row.method for row in summarise(results)], results.study.batch
    samples = dict.fromkeys(methods, float(batch)) if batch else {}
    counted = {c.method: float(cost) for c in results.costs if (cost := FLOPS.per_step(c)) is not None}
    timed = {c.method: float(cost) for c in results.costs if (cost := SECONDS.per_step(c)) is not None}
    candidates = [
        Axis("samples", "samples", samples, "Every step uses one batch."),
        Axis("flops", "FLOPs", counted, "FLOPs are the counted FLOPs of a step, times the number of steps."),
        Axis(
            "seconds",
            "seconds",
            timed,
            "Seconds are the calibrated median of a step, times the number of steps.",
            "~g",
        ),
    ]
    return [axis for axis in candidates if axis.per_step]


def training(results: Results) -> Figure | None:
    """Draw the training loss against steps."""
    width = series.window(results, series.training)
    points = "at every recorded step" if width == 1 else f"each point the mean of {count(width, 'step')}"
    what = f"the loss of the training batch, {points}"
    rows = series.curves(results, series.training)
    return _against_steps(results, rows, "Training loss", what) if rows else None


def validation(results: Results) -> list[Figure]:
    """Draw the validation loss against steps, and once against each axis of `axes`."""
    rows = series.curves(results, series.validation)
    if not rows:
        return []
    first = _against_steps(results, rows, "Validation loss", "the loss of the validation split")
    return [first, *(figure for axis in axes(results) if (figure := _against(results, rows, axis)))]


def _against_steps(results: Results, rows: list[dict[str, Any]], title: str, what: str) -> Figure:
    theme = theme_of(results)
    alt = theme.alt
    end = max(results.study.steps, *(row["step"] for row in rows))
    axis = alt.Axis(format="~s", tickCount=6)
    x = alt.X("step:Q", title="steps", axis=axis, scale=alt.Scale(nice=False, domain=[0, end]))
    y = _loss_axis(theme, rows, title.lower())
    caption = (
        f"{protocol(results)} Shown is {what}{_logarithmic(y)}. Lines are medians over seeds, bands run from the "
        f"lowest to the highest seed.{_diverged(results)}"
    )
    drawn = [*layers(theme, rows, x, y), _ruler(theme, rows, x)]
    return theme.figure(title.lower().replace(" ", "-"), f"{title} against steps", caption, drawn)


def with_costs(rows: list[dict[str, Any]], axis: Axis) -> list[dict[str, Any]]:
    """Return the rows after step 0 of methods with a known cost, each with what it has "spent" by its step.

    Args:
        rows: points of curves, with "method" and "step".
        axis: the cost per step.
    """
    return [
        {**row, "spent": float(f"{row['step'] * axis.per_step[row['method']]:.5g}")}
        for row in rows
        if row["method"] in axis.per_step and row["step"] > 0
    ]


def _against(results: Results, rows: list[dict[str, Any]], axis: Axis) -> Figure | None:
    rows = with_costs(rows, axis)
    if not rows:
        return None
    theme = theme_of(results)
    x, is_log = cost_axis(theme, rows, axis)
    y = _loss_axis(theme, rows, "validation loss")
    dots = theme.chart(rows).mark_circle(size=140, opacity=0).encode(x=x, y=theme.alt.Y("median:Q", **y))
    tip = ["method:N", theme.tip("step", ","), theme.tip("spent", f".3{axis.form}", axis.title)]
    dots = dots.encode(tooltip=[*tip, *(theme.tip(name, ".4~g") for name in ("median", "low", "high"))])
    caption = (
        f"{protocol(results)} {axis.caption} Lines are medians over seeds, bands run from the lowest to the highest "
        f"seed{_logarithmic(y)}{', and the horizontal scale is logarithmic' if is_log else ''}.{_diverged(results)}"
    )
    title = f"Validation loss against {axis.title}"
    return theme.figure(f"validation-loss-{axis.name}", title, caption, [*layers(theme, rows, x, y), dots])


def cost_axis(theme: Theme, rows: list[dict[str, Any]], axis: Axis) -> tuple[Any, bool]:
    """Return the horizontal axis, and whether it is logarithmic: the costs of two methods differ over fourfold."""
    alt = theme.alt
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


def _loss_axis(theme: Theme, rows: list[dict[str, Any]], title: str) -> dict[str, Any]:
    """Return the vertical axis, logarithmic if the losses differ by a factor of more than 20."""
    alt = theme.alt
    least, most = min(row["low"] for row in rows), max(row["high"] for row in rows)
    if not (least > 0 and most > 20 * least):
        return {"title": title, "scale": alt.Scale(zero=False)}
    axis = alt.Axis(values=powers_of_ten(least, most), format="~g")
    return {"title": title, "scale": alt.Scale(type="log", nice=False), "axis": axis}


def _logarithmic(y: dict[str, Any]) -> str:
    """Return the words of a caption for a logarithmic vertical axis; only such an axis has the key "axis"."""
    return ", on a logarithmic scale" if "axis" in y else ""


def _diverged(results: Results) -> str:
    """Return the sentence of a caption on diverged runs; "" if there are none."""
    diverged = sum(row.diverged for row in summarise(results))
    if not diverged:
        return ""
    verb = "counts" if diverged == 1 else "count"
    return f" {count(diverged, 'diverged run')} {verb} as an infinite loss from the divergence on."


def layers(theme: Theme, rows: list[dict[str, Any]], x: Any, y: dict[str, Any]) -> list[Any]:
    """Return three layers: bands, lines, and about eight marks on each line."""
    alt = theme.alt
    base = theme.chart(rows).encode(x=x)
    band = base.mark_area().encode(y=alt.Y("low:Q", **y), y2="high:Q", opacity=theme.opacity(0.16, 0.03))
    line = base.mark_line(strokeWidth=2).encode(y=alt.Y("median:Q", **y), opacity=theme.opacity(1))
    every = max(1, len({row["step"] for row in rows}) // 8)
    marked = [row for row in rows if row["place"] % every == every // 2]
    shapes = theme.chart(marked).mark_point(filled=True, size=50)
    shapes = shapes.encode(x=x, y=alt.Y("median:Q", **y), shape=theme.shape, opacity=theme.opacity(1))
    return [band, line, shapes]


def _ruler(theme: Theme, rows: list[dict[str, Any]], x: Any) -> Any:
    """Return a vertical line at the pointer, whose tooltip has the median of every method at that step."""
    alt = theme.alt
    drawn = {row["method"] for row in rows}
    keys = {method: f"m{i}" for i, method in enumerate(theme.methods) if method in drawn}
    steps: dict[int, dict[str, Any]] = {}
    for row in rows:
        steps.setdefault(row["step"], {"step": row["step"]})[keys[row["method"]]] = number(row["median"])
    tip = [theme.tip("step", ","), *(alt.Tooltip(f"{key}:N", title=method) for method, key in keys.items())]
    hover = alt.selection_point(
        name="ruler", fields=["step"], nearest=True, on="pointerover", clear="pointerout", empty=False
    )
    rule = theme.plain([steps[step] for step in sorted(steps)]).mark_rule(color=NEUTRAL, strokeWidth=1)
    visible = alt.condition(hover, alt.value(0.7), alt.value(0))
    return rule.encode(x=x, opacity=visible, tooltip=tip).add_params(hover)
