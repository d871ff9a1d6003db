"""The figures of a report: Vega-Lite specifications made by Altair, each a pure function of the results.

The label of a method set as `focus` fades the others; the page's legend sets it in all figures at once.
A figure without data is None. Needs the extra gradcost[report].
"""

from __future__ import annotations

from typing import Any

from gradcost.report import series, wording
from gradcost.report.look import BYTES, QUIET, Figure, Look
from gradcost.report.palette import CROSS, marks
from gradcost.report.summary import summarise
from gradcost.report.ticks import powers_of_ten, powers_of_two
from gradcost.report.wording import count, number, size
from gradcost.study.records import Results


def figures(results: Results) -> list[Figure]:
    """Every figure that the results have data for, the one that answers the question first."""
    made = (frontier, validation_loss, training_loss, landscape, forwards, milliseconds)
    return [figure for make in made if (figure := make(results))]


def frontier(results: Results) -> Figure | None:
    """Test accuracy against the peak memory of a step, beyond the weights."""
    rows, seeds = series.frontier(results)
    if not rows:
        return None
    look = _look(results)
    alt = look.alt
    memory = results.study.memory
    peaks = [row["bytes"] for row in rows] + ([memory] if memory else [])
    low, high = min(peaks) / 1.2, max(peaks) * 1.2
    axis = alt.Axis(labelExpr=BYTES, values=powers_of_two(low, high))
    x = alt.X("bytes:Q", title="peak memory of a step beyond the weights", axis=axis)
    x = x.scale(type="log", base=2, nice=False, domain=[low, high])
    least, most = min(row["low"] for row in rows), max(row["high"] for row in rows)
    room = 0.08 * max(most - least, 0.02)
    scale = alt.Scale(domain=[max(least - room, 0), min(most + room, 1)], nice=False)
    y = {"title": "test accuracy", "scale": scale, "axis": alt.Axis(format=".3~p", tickCount=6)}
    tip = ["method:N", *(look.tip(name, ".2%") for name in ("mean", "low", "high"))]
    tip += [alt.Tooltip("size:N", title="beyond weights"), "seeds:Q"]
    base = look.chart([{**row, "size": size(row["bytes"])} for row in rows]).encode(x=x)
    ends = base.mark_rule(strokeWidth=1.5)
    ends = ends.encode(y=alt.Y("low:Q", **y), y2="high:Q", opacity=look.opacity(0.8))
    dots = look.chart(seeds).mark_circle(size=22).encode(x=x, y=alt.Y("accuracy:Q", **y))
    dots = dots.encode(opacity=look.opacity(0.45), tooltip=["method:N", "seed:O", look.tip("accuracy", ".2%")])
    means = base.mark_point(filled=True, size=130).encode(y=alt.Y("mean:Q", **y), shape=look.shape)
    means = means.encode(opacity=look.opacity(1), tooltip=tip)
    caption = (
        f"{_protocol(results)} Large marks are means, whiskers the 95% interval of Student's t over seeds, "
        "small dots single seeds. Memory is the measured peak of one step, on a logarithmic scale."
    )
    if memory is None:
        return look.figure("accuracy-memory", "What accuracy costs in memory", caption, [ends, dots, means])
    rule = look.plain([{"bytes": memory, "label": size(memory)}]).mark_rule(strokeDash=[4, 4], color=QUIET)
    rule = rule.encode(x=x, tooltip=alt.Tooltip("label:N", title="budget"))
    caption += f" The dashed line is the budget, {size(memory)}."
    return look.figure("accuracy-memory", "What accuracy costs in memory", caption, [rule, ends, dots, means])


def training_loss(results: Results) -> Figure | None:
    """The training loss against the step."""
    width = series.window(results, series.training)
    each = "at every recorded step" if width == 1 else f"each point the mean of {count(width, 'step')}"
    what = f"the loss of the batch that is trained on, {each}"
    return _loss(results, series.training, "Training loss", what)


def validation_loss(results: Results) -> Figure | None:
    """The validation loss against the step."""
    return _loss(results, series.validation, "Validation loss", "the loss of the validation set")


def _loss(results: Results, points: series.Points, title: str, what: str) -> Figure | None:
    rows = series.curves(results, points)
    if not rows:
        return None
    look = _look(results)
    alt = look.alt
    least, most = min(row["low"] for row in rows), max(row["high"] for row in rows)
    log = least > 0 and most > 20 * least
    end = max(results.study.steps, *(row["step"] for row in rows))
    axis = alt.Axis(format="~s", tickCount=6)
    x = alt.X("step:Q", title="step", axis=axis, scale=alt.Scale(nice=False, domain=[0, end]))
    y: dict[str, Any] = {"title": title.lower(), "scale": alt.Scale(zero=False)}
    if log:
        y["scale"] = alt.Scale(type="log", nice=False)
        y["axis"] = alt.Axis(values=powers_of_ten(least, most), format="~g")
    base = look.chart(rows).encode(x=x)
    band = base.mark_area().encode(y=alt.Y("low:Q", **y), y2="high:Q", opacity=look.opacity(0.16, 0.03))
    line = base.mark_line(strokeWidth=2).encode(y=alt.Y("mean:Q", **y), opacity=look.opacity(1))
    every = max(1, len({row["step"] for row in rows}) // 8)
    some = [row for row in rows if row["place"] % every == every // 2]
    shapes = look.chart(some).mark_point(filled=True, size=50)
    shapes = shapes.encode(x=x, y=alt.Y("mean:Q", **y), shape=look.shape, opacity=look.opacity(1))
    lost = sum(row.diverged for row in summarise(results))
    caption = (
        f"{_protocol(results)} Shown is {what}{', on a logarithmic scale' if log else ''}; lines are means "
        "over seeds, bands run from the least to the greatest seed."
    )
    if lost:
        caption += f" {count(lost, 'run')} that diverged {'is' if lost == 1 else 'are'} left out."
    layers = [band, line, shapes, _ruler(look, rows, x)]
    return look.figure(title.lower().replace(" ", "-"), title, caption, layers)


def _ruler(look: Look, rows: list[dict[str, Any]], x: Any) -> Any:
    """A rule under the pointer that tells every method's value at that step."""
    alt = look.alt
    drawn = {row["method"] for row in rows}
    keys = {method: f"m{i}" for i, method in enumerate(look.methods) if method in drawn}
    steps: dict[int, dict[str, Any]] = {}
    for row in rows:
        steps.setdefault(row["step"], {"step": row["step"]})[keys[row["method"]]] = number(row["mean"])
    tip = [look.tip("step", ","), *(alt.Tooltip(f"{key}:N", title=method) for method, key in keys.items())]
    hover = alt.selection_point(
        name="ruler", fields=["step"], nearest=True, on="pointerover", clear="pointerout", empty=False
    )
    rule = look.plain([steps[step] for step in sorted(steps)]).mark_rule(color=QUIET, strokeWidth=1)
    seen = alt.condition(hover, alt.value(0.7), alt.value(0))
    return rule.encode(x=x, opacity=seen, tooltip=tip).add_params(hover)


def landscape(results: Results) -> Figure | None:
    """The validation accuracy of every learning rate that was tried."""
    rows = series.grid(results)
    if not rows:
        return None
    look = _look(results)
    alt = look.alt
    floor = min(0.0, *(row["accuracy"] for row in rows))
    rates = [row["lr"] for row in rows]
    low, high = min(rates) / 1.3, max(rates) * 1.3
    x = alt.X("lr:Q", title="learning rate", axis=alt.Axis(format="~g", values=powers_of_ten(low, high)))
    x = x.scale(type="log", nice=False, domain=[low, high])
    axis = alt.Axis(format=".0%", values=[0, 0.2, 0.4, 0.6, 0.8, 1])
    y = alt.Y("accuracy:Q", title="validation accuracy", axis=axis).scale(domain=[floor * 1.4, 1])
    tip = ["method:N", look.tip("lr", "~g"), "status:N"]
    base = look.chart(rows).encode(x=x, y=y)
    done = base.transform_filter("datum.status == 'finished'")
    line = done.mark_line(strokeWidth=1.2).encode(opacity=look.opacity(0.55))
    tried = done.mark_point(filled=True, size=40).encode(shape=look.shape, opacity=look.opacity(1))
    tried = tried.encode(tooltip=[*tip, look.tip("accuracy", ".2%")])
    best = base.transform_filter("datum.chosen").mark_point(size=230, strokeWidth=2, shape="circle")
    best = best.encode(opacity=look.opacity(1), tooltip=[*tip, look.tip("accuracy", ".2%")])
    lost = base.transform_filter("datum.status == 'diverged'")
    lost = lost.mark_point(size=34, strokeWidth=1.6, shape=CROSS)
    lost = lost.encode(opacity=look.opacity(1), tooltip=tip)
    caption = (
        f"{count(results.study.points, 'learning rate')} a method, on a logarithmic scale, one run each. The "
        "ring is the rate that was trained with: the best validation accuracy, then the lower loss. A cross "
        "below zero is a run that diverged."
    )
    return look.figure("tuning", "Where each learning rate leads", caption, [line, tried, best, lost])


def forwards(results: Results) -> Figure | None:
    """The FLOPs of one step, in bare forwards."""
    rows = series.bars(results, lambda row: {"value": row.forwards, "text": wording.forwards(row.forwards)})
    caption = (
        "The FLOPs of one step, counted while it ran and divided by those of one bare forward pass: the same "
        "on every machine."
    )
    return _bars(results, rows, "forwards", caption)


def milliseconds(results: Results) -> Figure | None:
    """The wall-clock time of one step, with its quartiles."""
    rows = series.bars(
        results,
        lambda row: {"value": row.ms, "low": row.ms_low, "high": row.ms_high, "text": number(row.ms)},
    )
    caption = "The median of repeated steps; whiskers run from the lower to the upper quartile."
    cpu, threads = (results.environment.get(name) for name in ("cpu", "threads"))
    if cpu:
        caption += f" Measured on {cpu}" + (f", threads: {threads}." if threads else ".")
    return _bars(results, rows, "milliseconds", caption)


def _bars(results: Results, rows: list[dict[str, Any]], what: str, caption: str) -> Figure | None:
    """One bar a method with its label above it, so that the bars have the whole width of a phone."""
    if not rows:
        return None
    look = _look(results)
    alt = look.alt
    rows = [{"high": row["value"], **row} for row in rows]
    y = alt.Y("method:N", sort=[row["method"] for row in rows], axis=None)
    y = y.scale(paddingInner=0, paddingOuter=0)
    scale = alt.Scale(domain=[0, 1.15 * max(row["high"] for row in rows)], nice=False)
    axis = alt.Axis(tickCount=5)
    base = look.chart(rows).encode(y=y)
    tip = ["method:N", look.tip("value", ".4~g", what)]
    bar = base.mark_bar(height=9, yOffset=8, cornerRadiusEnd=2)
    bar = bar.encode(x=alt.X("value:Q", title=what, scale=scale, axis=axis), opacity=look.opacity(0.9))
    bar = bar.encode(tooltip=[*tip, *(look.tip(end, ".4~g") for end in ("low", "high") if end in rows[0])])
    label = look.plain(rows).mark_text(align="left", baseline="middle", dy=-7, dx=1)
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


def _look(results: Results) -> Look:
    methods = [row.method for row in summarise(results)]
    return Look(methods, marks(list(dict.fromkeys([*results.study.methods, *methods]))))


def _protocol(results: Results) -> str:
    study = results.study
    runs = f"{count(len(study.seeds), 'seed')}, {count(study.steps, 'step')} of batch {study.batch}"
    return f"{runs}, {study.optimizer} at each method's tuned learning rate."
