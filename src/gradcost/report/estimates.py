"""How good the estimates are: their cosine and error against the number of probes, and slopes that spike."""

from __future__ import annotations

from typing import Any

from gradcost.report import series
from gradcost.report.captions import look_of
from gradcost.report.theme import QUIET, Figure
from gradcost.report.ticks import powers_of_ten
from gradcost.results.records import Results
from gradcost.results.summary import summarise
from gradcost.results.wording import count, listed


def cosine(results: Results) -> Figure | None:
    """The cosine of the angle between an estimate and the gradient, against the number of probes."""
    return _against_probes(
        results,
        "cosine",
        "Where an estimate points",
        "cosine with the gradient",
        "Each mark is the mean cosine with the gradient by backpropagation",
    )


def error(results: Results) -> Figure | None:
    """The relative squared error of an estimate, of an unbiased one its variance, against the number of probes."""
    return _against_probes(
        results,
        "error",
        "How far off an estimate is",
        "|g − ∇L|² / |∇L|²",
        "Each mark is the mean squared distance from the gradient by backpropagation, in units of its own square "
        "length: of an unbiased estimate the variance",
    )


def _against_probes(results: Results, what: str, title: str, axis: str, told: str) -> Figure | None:
    rows, theory = series.estimates(results, what)
    if not rows:
        return None
    look = look_of(results)
    alt = look.alt
    probes = [row["probes"] for row in (*rows, *theory)]
    values = [row["low"] for row in rows] + [row["high"] for row in rows] + [row["value"] for row in theory]
    low, high = min(probes) / 1.25, max(max(probes), 2) * 1.25
    ticks = [n for n in (4**k for k in range(20)) if low <= n <= high]
    ticks = ticks if len(ticks) > 1 else sorted({row["probes"] for row in rows})
    x = alt.X("probes:Q", title="probes", axis=alt.Axis(format="~s", values=ticks))
    x = x.scale(type="log", base=2, nice=False, domain=[low, high])
    ends = [min(values) / 1.3, max(values) * 1.3]
    y = {"title": axis, "scale": alt.Scale(type="log", nice=False, domain=ends)}
    y["axis"] = alt.Axis(format="~g" if what == "cosine" else "~s", values=powers_of_ten(*ends))
    base = look.chart(rows).encode(x=x)
    whiskers = base.mark_rule(strokeWidth=1.5).encode(y=alt.Y("low:Q", **y), y2="high:Q", opacity=look.opacity(0.8))
    tip = ["method:N", look.tip("probes", ","), *(look.tip(name, ".3~g") for name in ("value", "low", "high"))]
    tip.append(alt.Tooltip("theory:N", title="theory"))
    marks = base.mark_point(filled=True, size=80).encode(y=alt.Y("value:Q", **y), shape=look.shape)
    line = look.plain(theory).mark_line(strokeWidth=1.2, strokeDash=[5, 3], color=QUIET)
    line = line.encode(x=x, y=alt.Y("value:Q", **y), detail="curve:N", opacity=alt.value(0.8))
    draws = listed(sorted({count(row["draws"], "estimate") for row in rows}))
    sizes = listed(sorted({f"{row['dimension']:,}" for row in rows}))
    caption = f"{told}, over {draws} of one batch at the initial weights, with two standard errors to either side"
    caption += ", cut at a quarter of the mean." if any(row["cut"] for row in rows) else "."
    if theory:
        caption += f" A dashed line is what theory expects in {sizes} weights."
    caption += " Both scales are logarithmic."
    drawn = {row["method"] for row in rows}
    here = {row.method for row in summarise(results)}
    absent = [quality.method for quality in results.qualities if quality.method in here - drawn]
    if absent:
        caption += f" Not drawn, for it is no number above 0 there: {listed(absent)}."
    layers = [*([line] if theory else []), whiskers, marks.encode(opacity=look.opacity(1), tooltip=tip)]
    return look.figure(f"estimate-{what}", title, caption, layers)


def spikes(results: Results) -> Figure | None:
    """The largest slope of the steps between two points, and the slopes that stand far above those before them."""
    rows = series.curves(results, series.slopes, max)
    if not rows:
        return None
    look = look_of(results)
    alt = look.alt
    marked, counted = series.spikes(results)
    end = max(results.study.steps, *(row["step"] for row in rows))
    x = alt.X("step:Q", title="steps", axis=alt.Axis(format="~s", tickCount=6)).scale(nice=False, domain=[0, end])
    sizes = [x for row in rows for x in (row["low"], row["high"]) if x > 0] + [row["slope"] for row in marked]
    ends = [min(sizes, default=1.0) / 1.3, max(sizes, default=1.0) * 1.3]
    form = "~g" if ends[1] < 1e5 else "~e"
    y: dict[str, Any] = {"title": "largest |slope|", "axis": alt.Axis(format=form, values=powers_of_ten(*ends))}
    y["scale"] = alt.Scale(type="log", nice=False, domain=ends, clamp=True)
    base = look.chart(rows).encode(x=x)
    band = base.mark_area().encode(y=alt.Y("low:Q", **y), y2="high:Q", opacity=look.opacity(0.12, 0.03))
    tip = ["method:N", look.tip("step", ","), *(look.tip(name, ".3~g") for name in ("median", "low", "high"))]
    line = base.mark_line(strokeWidth=1.5).encode(y=alt.Y("median:Q", **y), opacity=look.opacity(1), tooltip=tip)
    tip = ["method:N", "seed:O", look.tip("step", ","), look.tip("slope", ".3~g"), look.tip("threshold", ".3~g")]
    high = look.chart(marked).mark_point(filled=True, size=60, stroke=QUIET, strokeWidth=0.5)
    high = high.encode(x=x, y=alt.Y("slope:Q", **y), shape=look.shape, opacity=look.opacity(1), tooltip=tip)
    seen = [f"{method} {n} of {count(total, 'slope')}" for method, (n, total) in counted.items() if n]
    caption = (
        "The largest |slope| that a probe measured since the point before, before any clip: lines are medians over "
        "seeds, bands run from the least to the greatest. A mark is a spike, more than 8 robust standard deviations "
        "above the median of the 200 slopes before it; of a run the first 20 are marked. The vertical scale is "
        "logarithmic, and a slope of 0 stands on its floor. "
        + (
            f"Spikes: {listed(seen)}."
            if seen
            else f"None of {count(sum(n for _, n in counted.values()), 'slope')} is one."
        )
    )
    return look.figure(
        "slope-spikes", "Slopes, and those that spike", caption, [band, line, *([high] if marked else [])]
    )
