"""The figures of a report: Vega-Lite specifications made by Altair, each a pure function of the results.

The label of a method set as `focus` fades the others; the page's legend sets it in all figures at once.
A figure without data is None. Needs the extra gradcost[report].
"""

from __future__ import annotations

from typing import Any

from gradcost.report import breakdown, estimates, losses, series, tunings
from gradcost.report.captions import intervals, look_of, protocol
from gradcost.report.palette import CROSS
from gradcost.report.theme import BYTES, QUIET, Figure, Look
from gradcost.report.ticks import powers_of_two
from gradcost.results import wording
from gradcost.results.records import Results
from gradcost.results.summary import Row, summarise
from gradcost.results.wording import number, size


def figures(results: Results) -> list[Figure]:
    """Every figure that the results have data for, the one that answers the question first."""
    made = [frontier(results), *losses.validation(results), losses.training(results), memory(results)]
    made += [forwards(results), milliseconds(results)]
    made += [
        estimates.cosine(results),
        estimates.error(results),
        estimates.spikes(results),
        tunings.landscape(results),
        tunings.expected(results),
    ]
    return [figure for figure in (*made, tunings.reaching(results)) if figure is not None]


def frontier(results: Results) -> Figure | None:
    """Test accuracy against the peak memory of a step, beyond the weights."""
    rows, seeds, fallen = series.frontier(results)
    if not seeds:
        return None
    look = look_of(results)
    alt = look.alt
    memory = results.study.memory
    peaks = [row["bytes"] for row in rows] + ([memory] if memory else [])
    low, high = min(peaks) / 1.2, max(peaks) * 1.2
    axis = alt.Axis(labelExpr=BYTES, values=powers_of_two(low, high))
    x = alt.X("bytes:Q", title="peak memory of a step beyond the weights", axis=axis)
    x = x.scale(type="log", base=2, nice=False, domain=[low, high])
    least, most = min(s["accuracy"] for s in seeds), max(s["accuracy"] for s in seeds)
    room = 0.08 * max(most - least, 0.02)
    floor = max(least - room, 0)
    scale = alt.Scale(domain=[floor, min(most + room, 1)], nice=False)
    lost = [{**seed, "accuracy": floor} for seed in fallen]
    rows = [{**row, **{end: max(row[end], floor) for end in ("low", "median", "high")}} for row in rows]
    y = {
        "title": "test accuracy",
        "scale": scale,
        "axis": alt.Axis(format=".3~p" if most - least > 0.005 else ".5~p", tickCount=6),
    }
    tip = ["method:N", alt.Tooltip("middle:N", title="median"), alt.Tooltip("reach:N", title="interval")]
    tip += [alt.Tooltip("size:N", title="beyond weights"), "seeds:Q"]
    base = look.chart([{**row, "size": size(row["bytes"])} for row in rows]).encode(x=x)
    ends = base.mark_rule(strokeWidth=1.5)
    ends = ends.encode(y=alt.Y("low:Q", **y), y2="high:Q", opacity=look.opacity(0.8))
    dots = look.chart(seeds).mark_circle(size=22).encode(x=x, y=alt.Y("accuracy:Q", **y))
    dots = dots.encode(opacity=look.opacity(0.45), tooltip=["method:N", "seed:O", look.tip("accuracy", ".2%")])
    medians = (
        base.transform_filter("!datum.lost")
        .mark_point(filled=True, size=130)
        .encode(y=alt.Y("median:Q", **y), shape=look.shape)
    )
    medians = medians.encode(opacity=look.opacity(1), tooltip=tip)
    layers = [_families(look, rows, x, y), ends, dots, medians]
    caption = (
        f"{protocol(results)} Large marks are medians, whiskers {intervals(results)}, small dots single seeds. "
        "Memory is the peak of one step, on a logarithmic scale; a line joins one method's settings."
    )
    if lost:
        crosses = look.chart(lost).mark_point(size=40, strokeWidth=1.6, shape=CROSS, yOffset=-4)
        crosses = crosses.encode(x=x, y=alt.Y("accuracy:Q", **y), opacity=look.opacity(1))
        layers.append(crosses.encode(tooltip=["method:N", "seed:O", alt.Tooltip("status:N")]))
        caption += (
            " A cross at the bottom is a run that diverged; where most of a method's did, it has no large mark."
        )
    if memory is None:
        return look.figure("accuracy-memory", "What accuracy costs in memory", caption, layers)
    rule = look.plain([{"bytes": memory, "label": size(memory)}]).mark_rule(strokeDash=[4, 4], color=QUIET)
    rule = rule.encode(x=x, tooltip=alt.Tooltip("label:N", title="budget"))
    caption += f" The dashed line is the budget, {size(memory)}."
    return look.figure("accuracy-memory", "What accuracy costs in memory", caption, [rule, *layers])


def _families(look: Look, rows: list[dict[str, Any]], x: Any, y: dict[str, Any]) -> Any:
    """A thin line through the settings of one method, which differ in numbers alone."""
    line = look.plain(rows).mark_line(strokeWidth=1.2, color=QUIET).encode(x=x, y=look.alt.Y("median:Q", **y))
    return line.encode(detail="family:N", order=look.alt.Order("bytes:Q"), opacity=look.alt.value(0.6))


def memory(results: Results) -> Figure | None:
    """What the bytes at the peak of a step are for."""
    rows = series.breakdowns(results)
    if not rows:
        return None
    study, caption = results.study, "What is alive at the peak of one step, weights and batch included, by purpose."
    batch = "" if study.batch is None else f" of batch {study.batch}"
    caption += f" One step{batch} with {study.optimizer}: counted bytes, so there is no interval."
    return breakdown.bars(look_of(results), rows, None, caption)


def forwards(results: Results) -> Figure | None:
    """The FLOPs of one step, in bare forwards."""
    rows = series.bars(results, lambda row: {"value": row.forwards, "text": _work(row)})
    caption = (
        "The FLOPs of one step, counted while it ran and divided by those of one bare forward pass: the same "
        "on every machine."
    )
    return _bars(results, rows, "forwards", caption)


def _work(row: Row) -> str:
    """3.0 (1.8 MFLOP)."""
    text = wording.forwards(row.forwards)
    return text if row.flops is None else f"{text}  ({wording.flops(row.flops)})"


def milliseconds(results: Results) -> Figure | None:
    """The wall-clock time of one step, with its quartiles."""
    rows = series.bars(
        results,
        lambda row: (
            {"value": row.ms, "low": row.ms_low, "high": row.ms_high}
            | {"text": ("~" if row.doubt else "") + number(row.ms)}
        ),
    )
    caption = "The median of repeated steps; whiskers run from the lower to the upper quartile of those."
    if any(row.doubt for row in summarise(results)):
        caption += " A ~ marks a clock in doubt."
    cpu, threads = (results.environment.get(name) for name in ("cpu", "threads"))
    if cpu:
        caption += f" Measured on {cpu}" + (f", threads: {threads}." if threads else ".")
    return _bars(results, rows, "milliseconds", caption)


def _bars(results: Results, rows: list[dict[str, Any]], what: str, caption: str) -> Figure | None:
    """One bar a method with its label above it, so that the bars have the whole width of a phone."""
    if not rows:
        return None
    look = look_of(results)
    alt = look.alt
    rows = [{"high": row["value"], **row} for row in rows]
    y = alt.Y("method:N", sort=[row["method"] for row in rows], axis=None)
    y = y.scale(paddingInner=0, paddingOuter=0)
    scale = alt.Scale(domain=[0, 1.4 * max(row["high"] for row in rows)], nice=False)
    axis = alt.Axis(tickCount=5)
    base = look.chart(rows).encode(y=y)
    tip = ["method:N", look.tip("value", ".4~g", what)]
    bar = base.mark_bar(height=9, yOffset=8, cornerRadiusEnd=2)
    bar = bar.encode(x=alt.X("value:Q", title=what, scale=scale, axis=axis), opacity=look.opacity(0.9))
    bar = bar.encode(tooltip=[*tip, *(look.tip(end, ".4~g") for end in ("low", "high") if end in rows[0])])
    label = look.plain(rows).mark_text(align="left", baseline="middle", dy=-7, dx=1, limit=300)
    label = label.encode(y=y, x=alt.value(0), text="method:N", opacity=look.opacity(1, 0.35))
    value = base.mark_text(align="left", baseline="middle", dx=6, dy=8, fontWeight=600)
    value = value.encode(x=alt.X("high:Q", scale=scale), text="text:N", color=alt.ColorValue(QUIET))
    value = value.encode(opacity=look.opacity(1, 0.35))
    layers = [bar, label, value]
    if "low" in rows[0]:
        spread = base.mark_rule(strokeWidth=1.5, yOffset=8)
        spread = spread.encode(x=alt.X("low:Q", scale=scale), x2="high:Q", color=alt.ColorValue(QUIET))
        layers.append(spread.encode(opacity=look.opacity(1)))
    return look.figure(what, f"A step, in {what}", caption, layers, height=38 * len(rows))
