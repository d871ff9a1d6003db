"""The picture at the top of a report: the quality of each method against what it costs, one figure per axis."""

from __future__ import annotations

from typing import Any

from gradcost.report import losses, series
from gradcost.report.families import twins
from gradcost.report.theme import Figure, protocol, theme_of
from gradcost.results.records import Curve, Results


def pictures(results: Results) -> list[Figure]:
    """Return the validation metric against FLOPs, seconds and steps; each axis that was measured."""
    rows = _rows(results)
    if not rows:
        return []
    axes = [axis for axis in losses.axes(results) if axis.name != "samples"]
    same = twins(results)
    first = [row for row in rows if same.get(row["method"], row["method"]) == row["method"]]
    steps = losses.Axis("steps", "steps", dict.fromkeys({row["method"] for row in rows}, 1.0), "")
    drawn = [_against(results, rows, axis) for axis in axes]
    return [figure for figure in (*drawn, _against(results, first, steps)) if figure is not None]


def _rows(results: Results) -> list[dict[str, Any]]:
    """Return the median of the validation metric over seeds, and its lowest and highest seed, at each evaluation."""
    metric = results.study.metric
    sign = 1.0 if metric.lower_is_better else -1.0  # `series.curves` counts a divergence as the greatest value

    def points(curve: Curve) -> tuple[tuple[int, ...], tuple[float | None, ...]]:
        scores = curve.validation_accuracy if metric.is_accuracy else curve.validation_score
        values = [None if x is None else sign * metric.score(x) for x in scores]
        return curve.validation_step, tuple(values)

    rows = series.curves(results, points)
    if sign > 0:
        return rows
    return [{**row, "median": -row["median"], "low": -row["high"], "high": -row["low"]} for row in rows]


def _against(results: Results, rows: list[dict[str, Any]], axis: losses.Axis) -> Figure | None:
    rows = losses.with_costs(rows, axis)
    if not rows:
        return None
    theme, metric = theme_of(results), results.study.metric
    alt = theme.alt
    x, is_log = losses.cost_axis(theme, rows, axis)
    y: dict[str, Any] = {"title": f"validation {metric.name}", "scale": alt.Scale(zero=False)}
    if metric.is_accuracy:
        y["axis"] = alt.Axis(format=".3~p", tickCount=6)
    dots = theme.chart(rows).mark_circle(size=140, opacity=0).encode(x=x, y=alt.Y("median:Q", **y))
    tip = ["method:N", theme.tip("step", ","), theme.tip("spent", f".3{axis.form}", axis.title)]
    form = ".2%" if metric.is_accuracy else ".4~g"
    dots = dots.encode(tooltip=[*tip, *(theme.tip(name, form) for name in ("median", "low", "high"))])
    caption = (
        f"{protocol(results)} {axis.caption} Lines are medians over seeds, bands run from the lowest to the highest "
        "seed."
        f"{' The horizontal scale is logarithmic.' if is_log else ''}"
    )
    title = f"Validation {metric.name} against {axis.title}"
    drawn = [theme.budget_line(x, "spent"), *losses.layers(theme, rows, x, y), dots]
    return theme.figure(f"quality-{axis.name}", title, caption, drawn, height=300)
