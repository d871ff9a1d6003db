"""Figures of the quality of estimates: cosine and error against the number of probes, and spikes of the slopes."""

from __future__ import annotations

from typing import Any

from gradcost.report import series
from gradcost.report.theme import NEUTRAL, Figure, powers_of_ten, theme_of
from gradcost.results.records import Results
from gradcost.results.summary import summarise
from gradcost.results.wording import count, listed


def cosine(results: Results) -> Figure | None:
    """Draw the cosine of the estimate and the exact gradient against the number of probes."""
    return _against_probes(
        results,
        "cosine",
        "Cosine of estimate and gradient",
        "cosine with the gradient",
        "Each mark is the mean cosine with the gradient of backpropagation",
    )


def error(results: Results) -> Figure | None:
    """Draw the relative squared error of an estimate against the number of probes."""
    return _against_probes(
        results,
        "error",
        "Error of an estimate",
        "|g − ∇L|² / |∇L|²",
        "Each mark is the mean squared distance from the gradient of backpropagation, divided by the squared norm of "
        "that gradient: the relative variance of an unbiased estimate",
    )


def _against_probes(results: Results, what: str, title: str, axis: str, definition: str) -> Figure | None:
    """Draw `what` ("cosine" or "error") against the number of probes, with the values that theory predicts."""
    rows, theory = series.estimates(results, what)
    if not rows:
        return None
    theme = theme_of(results)
    alt = theme.alt
    probes = [row["probes"] for row in (*rows, *theory)]
    values = [row["low"] for row in rows] + [row["high"] for row in rows] + [row["value"] for row in theory]
    low, high = min(probes) / 1.25, max(max(probes), 2) * 1.25
    ticks = [n for n in (4**k for k in range(20)) if low <= n <= high]
    ticks = ticks if len(ticks) > 1 else sorted({row["probes"] for row in rows})
    x = alt.X("probes:Q", title="probes", axis=alt.Axis(format="~s", values=ticks))
    x = x.scale(type="log", base=2, nice=False, domain=[low, high])
    limits = [min(values) / 1.3, max(values) * 1.3]
    y = {"title": axis, "scale": alt.Scale(type="log", nice=False, domain=limits)}
    y["axis"] = alt.Axis(format="~g" if what == "cosine" else "~s", values=powers_of_ten(*limits))
    base = theme.chart(rows).encode(x=x)
    whiskers = base.mark_rule(strokeWidth=1.5).encode(y=alt.Y("low:Q", **y), y2="high:Q", opacity=theme.opacity(0.8))
    tip = ["method:N", theme.tip("probes", ","), *(theme.tip(name, ".3~g") for name in ("value", "low", "high"))]
    tip.append(alt.Tooltip("theory:N", title="theory"))
    marks = base.mark_point(filled=True, size=80).encode(y=alt.Y("value:Q", **y), shape=theme.shape)
    line = theme.plain(theory).mark_line(strokeWidth=1.2, strokeDash=[5, 3], color=NEUTRAL)
    line = line.encode(x=x, y=alt.Y("value:Q", **y), detail="curve:N", opacity=alt.value(0.8))
    draws = listed(sorted({count(row["draws"], "estimate") for row in rows}))
    sizes = listed(sorted({f"{row['dimension']:,}" for row in rows}))
    caption = f"{definition}, over {draws} on one batch at the initial weights. Whiskers extend two standard errors"
    caption += ", downwards at most to a quarter of the mean." if any(row["cut"] for row in rows) else "."
    if theory:
        caption += f" A dashed line is the value that theory predicts for {sizes} weights."
    caption += " Both scales are logarithmic."
    drawn = {row["method"] for row in rows}
    methods = {row.method for row in summarise(results)}
    absent = [quality.method for quality in results.qualities if quality.method in methods - drawn]
    if absent:
        caption += f" These methods are not drawn, because their mean is not above 0: {listed(absent)}."
    layers = [*([line] if theory else []), whiskers, marks.encode(opacity=theme.opacity(1), tooltip=tip)]
    return theme.figure(f"estimate-{what}", title, caption, layers)


def spikes(results: Results) -> Figure | None:
    """Draw the largest |slope| since the previous recorded step, and mark spikes."""
    rows = series.curves(results, series.slopes, max)
    if not rows:
        return None
    theme = theme_of(results)
    alt = theme.alt
    marked, counted = series.spikes(results)
    end = max(results.study.steps, *(row["step"] for row in rows))
    x = alt.X("step:Q", title="steps", axis=alt.Axis(format="~s", tickCount=6)).scale(nice=False, domain=[0, end])
    sizes = [x for row in rows for x in (row["low"], row["high"]) if x > 0] + [row["slope"] for row in marked]
    limits = [min(sizes, default=1.0) / 1.3, max(sizes, default=1.0) * 1.3]
    number_format = "~g" if limits[1] < 1e5 else "~e"
    y: dict[str, Any] = {
        "title": "largest |slope|",
        "axis": alt.Axis(format=number_format, values=powers_of_ten(*limits)),
    }
    y["scale"] = alt.Scale(type="log", nice=False, domain=limits, clamp=True)
    base = theme.chart(rows).encode(x=x)
    band = base.mark_area().encode(y=alt.Y("low:Q", **y), y2="high:Q", opacity=theme.opacity(0.12, 0.03))
    tip = ["method:N", theme.tip("step", ","), *(theme.tip(name, ".3~g") for name in ("median", "low", "high"))]
    line = base.mark_line(strokeWidth=1.5).encode(y=alt.Y("median:Q", **y), opacity=theme.opacity(1), tooltip=tip)
    tip = ["method:N", "seed:O", theme.tip("step", ","), theme.tip("slope", ".3~g"), theme.tip("threshold", ".3~g")]
    high = theme.chart(marked).mark_point(filled=True, size=60, stroke=NEUTRAL, strokeWidth=0.5)
    high = high.encode(x=x, y=alt.Y("slope:Q", **y), shape=theme.shape, opacity=theme.opacity(1), tooltip=tip)
    spiking = [f"{method} {n} of {count(total, 'slope')}" for method, (n, total) in counted.items() if n]
    caption = (
        "Each point is the largest |slope| of any probe since the previous point, before clipping. Lines are medians "
        "over seeds, bands run from the lowest to the highest seed. A mark is a spike: more than 8 robust standard "
        "deviations above the median of the 200 slopes before it. The first 20 spikes of a run are marked. The "
        "vertical scale is logarithmic; a slope of 0 is drawn at the lower end of the scale. "
    )
    if spiking:
        caption += f"Spikes: {listed(spiking)}."
    else:
        caption += f"There are no spikes among {count(sum(n for _, n in counted.values()), 'slope')}."
    return theme.figure(
        "slope-spikes", "Largest slopes and spikes", caption, [band, line, *([high] if marked else [])]
    )
