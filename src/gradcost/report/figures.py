"""The figures of a report: Vega-Lite specifications by Altair, each a pure function of the results.

The Vega parameter `focus` is a list of methods; figures fade the others. The page's legend sets it in all
figures. A function returns None if the records lack the data of its figure. Needs the extra gradcost[report].
"""

from __future__ import annotations

from typing import Any

from gradcost.core.errors import require
from gradcost.report import breakdown, estimates, losses, series, tunings
from gradcost.report.theme import (
    BYTES,
    CROSS,
    NEUTRAL,
    Figure,
    Theme,
    intervals,
    powers_of_two,
    protocol,
    theme_of,
)
from gradcost.results import wording
from gradcost.results.records import Results
from gradcost.results.summary import MethodSummary, summarise
from gradcost.results.wording import number, size


def figures(results: Results) -> list[Figure]:
    """Return every figure that the results have data for, accuracy against memory first."""
    with require("altair.utils.schemapi", "A report", "report").debug_mode(False):  # the tests validate every figure
        return _drawn(results)


def _drawn(results: Results) -> list[Figure]:
    drawn = [frontier(results), *losses.validation(results), losses.training(results), memory(results)]
    drawn += [forwards(results), milliseconds(results)]
    drawn += [
        estimates.cosine(results),
        estimates.error(results),
        estimates.spikes(results),
        tunings.landscape(results),
        tunings.expected(results),
    ]
    return [figure for figure in (*drawn, tunings.reaching(results)) if figure is not None]


def frontier(results: Results) -> Figure | None:
    """Draw the test accuracy against the peak memory of a step beyond the weights."""
    rows, seeds, diverged = series.frontier(results)
    if not seeds:
        return None
    theme = theme_of(results)
    alt = theme.alt
    memory = results.study.memory
    peaks = [row["bytes"] for row in rows] + ([memory] if memory else [])
    low, high = min(peaks) / 1.2, max(peaks) * 1.2
    axis = alt.Axis(labelExpr=BYTES, values=powers_of_two(low, high))
    x = alt.X("bytes:Q", title="peak memory of a step beyond the weights", axis=axis)
    x = x.scale(type="log", base=2, nice=False, domain=[low, high])
    least, most = min(s["accuracy"] for s in seeds), max(s["accuracy"] for s in seeds)
    margin = 0.08 * max(most - least, 0.02)
    bottom = max(least - margin, 0)
    scale = alt.Scale(domain=[bottom, min(most + margin, 1)], nice=False)
    at_bottom = [{**seed, "accuracy": bottom} for seed in diverged]
    rows = [{**row, **{end: max(row[end], bottom) for end in ("low", "median", "high")}} for row in rows]
    y = {
        "title": "test accuracy",
        "scale": scale,
        "axis": alt.Axis(format=".3~p" if most - least > 0.005 else ".5~p", tickCount=6),
    }
    tip = ["method:N", alt.Tooltip("middle:N", title="median"), alt.Tooltip("reach:N", title="interval")]
    tip += [alt.Tooltip("size:N", title="beyond weights"), "seeds:Q"]
    base = theme.chart([{**row, "size": size(row["bytes"])} for row in rows]).encode(x=x)
    whiskers = base.mark_rule(strokeWidth=1.5)
    whiskers = whiskers.encode(y=alt.Y("low:Q", **y), y2="high:Q", opacity=theme.opacity(0.8))
    dots = theme.chart(seeds).mark_circle(size=22).encode(x=x, y=alt.Y("accuracy:Q", **y))
    dots = dots.encode(opacity=theme.opacity(0.45), tooltip=["method:N", "seed:O", theme.tip("accuracy", ".2%")])
    medians = (
        base.transform_filter("!datum.lost")
        .mark_point(filled=True, size=130)
        .encode(y=alt.Y("median:Q", **y), shape=theme.shape)
    )
    medians = medians.encode(opacity=theme.opacity(1), tooltip=tip)
    layers = [theme.budget_line(x, "bytes"), _families(theme, rows, x, y), whiskers, dots, medians]
    caption = (
        f"{protocol(results)} Large marks are medians, whiskers {intervals(results)}, small dots single seeds. "
        "Memory is the peak of one step, on a logarithmic scale. A line joins methods that differ "
        "only in a number, such as the number of probes."
    )
    if at_bottom:
        crosses = theme.chart(at_bottom).mark_point(size=40, strokeWidth=1.6, shape=CROSS, yOffset=-4)
        crosses = crosses.encode(x=x, y=alt.Y("accuracy:Q", **y), opacity=theme.opacity(1))
        layers.append(crosses.encode(tooltip=["method:N", "seed:O", alt.Tooltip("status:N")]))
        caption += (
            " A cross at the bottom is a diverged run. A method has no large mark if most of its runs diverged."
        )
    if memory is None:
        return theme.figure("accuracy-memory", "Accuracy against memory", caption, layers)
    rule = theme.plain([{"bytes": memory, "label": size(memory)}]).mark_rule(strokeDash=[4, 4], color=NEUTRAL)
    rule = rule.encode(x=x, tooltip=alt.Tooltip("label:N", title="budget"))
    caption += f" The dashed line is the budget, {size(memory)}."
    return theme.figure("accuracy-memory", "Accuracy against memory", caption, [rule, *layers])


def _families(theme: Theme, rows: list[dict[str, Any]], x: Any, y: dict[str, Any]) -> Any:
    """Return a thin line through methods that differ only in a number, such as the number of probes."""
    line = theme.plain(rows).mark_line(strokeWidth=1.2, color=NEUTRAL).encode(x=x, y=theme.alt.Y("median:Q", **y))
    return line.encode(detail="family:N", order=theme.alt.Order("bytes:Q"), opacity=theme.alt.value(0.6))


def memory(results: Results) -> Figure | None:
    """Draw the bytes at the peak of a step by purpose."""
    rows = series.breakdowns(results)
    if not rows:
        return None
    study = results.study
    batch = "" if study.batch is None else f" of batch {study.batch}"
    caption = (
        "The bytes allocated at the peak of one step by purpose. The number “beyond weights” of the table leaves out "
        "parameters, buffers and inputs. "
        f"Measured on one step{batch} with {study.optimizer}. Bytes are exact counts, so there is no interval."
    )
    return breakdown.bars(theme_of(results), rows, None, caption)


def forwards(results: Results) -> Figure | None:
    """Draw the FLOPs of one step, divided by those of a forward pass."""
    rows = series.bars(results, lambda row: {"value": row.forwards, "text": _work(row)})
    caption = (
        "The FLOPs of one step, counted during the step and divided by those of one forward pass without gradient. "
        "They are the same on every machine."
    )
    return _bars(results, rows, "forwards", caption)


def _work(row: MethodSummary) -> str:
    """Describe the work of a step in forwards and FLOPs, such as: 3.0  (1.8 MFLOP)."""
    text = wording.forwards(row.forwards)
    return text if row.flops is None else f"{text}  ({wording.flops(row.flops)})"


def milliseconds(results: Results) -> Figure | None:
    """Draw the wall-clock time of one step, with quartiles."""
    rows = series.bars(
        results,
        lambda row: (
            {"value": row.ms, "low": row.ms_low, "high": row.ms_high}
            | {"text": wording.timing_mark(row.doubt) + number(row.ms)}
        ),
    )
    caption = "The median time of repeated steps. Whiskers run from the lower to the upper quartile."
    if any(row.doubt for row in summarise(results)):
        caption += " A ~ marks a timing that is not reliable."
    cpu, threads = (results.environment.get(name) for name in ("cpu", "threads"))
    if cpu:
        caption += f" Measured on {cpu}" + (f", threads: {threads}." if threads else ".")
    return _bars(results, rows, "milliseconds", caption)


def _bars(results: Results, rows: list[dict[str, Any]], what: str, caption: str) -> Figure | None:
    """Draw one bar per method. Labels are above the bars, so that bars have the full width of a phone screen."""
    if not rows:
        return None
    theme = theme_of(results)
    alt = theme.alt
    rows = [{"high": row["value"], **row} for row in rows]
    y = alt.Y("method:N", sort=[row["method"] for row in rows], axis=None)
    y = y.scale(paddingInner=0, paddingOuter=0)
    scale = alt.Scale(domain=[0, 1.4 * max(row["high"] for row in rows)], nice=False)
    axis = alt.Axis(tickCount=5)
    base = theme.chart(rows).encode(y=y)
    tip = ["method:N", theme.tip("value", ".4~g", what)]
    bar = base.mark_bar(height=9, yOffset=8, cornerRadiusEnd=2)
    bar = bar.encode(x=alt.X("value:Q", title=what, scale=scale, axis=axis), opacity=theme.opacity(0.9))
    bar = bar.encode(tooltip=[*tip, *(theme.tip(end, ".4~g") for end in ("low", "high") if end in rows[0])])
    label = theme.plain(rows).mark_text(align="left", baseline="middle", dy=-7, dx=1, limit=300)
    label = label.encode(y=y, x=alt.value(0), text="method:N", opacity=theme.opacity(1, 0.35))
    value = base.mark_text(align="left", baseline="middle", dx=6, dy=8, fontWeight=600)
    value = value.encode(x=alt.X("high:Q", scale=scale), text="text:N", color=alt.ColorValue(NEUTRAL))
    value = value.encode(opacity=theme.opacity(1, 0.35))
    layers = [bar, label, value]
    if "low" in rows[0]:
        spread = base.mark_rule(strokeWidth=1.5, yOffset=8)
        spread = spread.encode(x=alt.X("low:Q", scale=scale), x2="high:Q", color=alt.ColorValue(NEUTRAL))
        layers.append(spread.encode(opacity=theme.opacity(1)))
    return theme.figure(what, f"Cost of a step in {what}", caption, layers, height=38 * len(rows))
