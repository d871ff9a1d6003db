"""What tuning found and what it cost: the landscape of rates, the best of so many points, the time to the target."""

from __future__ import annotations

from gradcost.report import series
from gradcost.report.captions import look_of, protocol
from gradcost.report.palette import CROSS
from gradcost.report.theme import Figure
from gradcost.report.ticks import powers_of_ten
from gradcost.results.records import Results
from gradcost.results.summary import summarise
from gradcost.results.wording import count, listed, number


def landscape(results: Results) -> Figure | None:
    """The validation accuracy of every learning rate that was tried."""
    rows = series.grid(results)
    if not rows:
        return None
    look = look_of(results)
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
    lengths = sorted({run.steps for run in results.trials if run.phase == "tune" and run.status == "finished"})
    confirmed = any(run.phase == "confirm" for run in results.trials)
    by = "the best mean of its confirming runs" if confirmed else "the best validation accuracy, then the lower loss"
    caption = (
        f"{count(results.study.points, 'learning rate')} a method at most, on a logarithmic scale, runs of "
        f"{listed([f'{n:,}' for n in lengths]) or 'no'} steps on the validation split. The ring is the rate that was "
        f"trained with: {by}. A cross below zero is a run that diverged."
    )
    edges = [row.method for row in summarise(results) if row.edge]
    if edges:
        caption += f" On an edge of what was tried, so that a better rate may lie beyond: {listed(edges)}."
    return look.figure("tuning", "Where each learning rate leads", caption, [line, tried, best, lost])


def expected(results: Results) -> Figure | None:
    """The expected best validation accuracy of so many tuning points."""
    rows = series.expected(results)
    if not rows:
        return None
    look = look_of(results)
    alt = look.alt
    most = max(row["points"] for row in rows)
    x = alt.X("points:Q", title="tuning points", axis=alt.Axis(format="d", tickMinStep=1))
    x = x.scale(domain=[1, max(most, 2)], nice=False)
    y = alt.Y("best:Q", title="expected best accuracy", axis=alt.Axis(format=".0%", tickCount=5))
    base = look.chart(rows).encode(x=x, y=y.scale(domain=[0, 1]))
    line = base.mark_line(strokeWidth=1.6).encode(opacity=look.opacity(1))
    dots = base.mark_point(filled=True, size=45).encode(shape=look.shape, opacity=look.opacity(1))
    dots = dots.encode(tooltip=["method:N", look.tip("points", "d"), look.tip("best", ".2%", "expected best")])
    caption = (
        "The expected best validation accuracy of so many of the tuning points that were run, drawn without "
        f"replacement; {count(most, 'point')} a method at most, one seed each, so no interval. A run that diverged "
        "counts as guessing. Dodge et al. 2019, in its unbiased form."
    )
    return look.figure("tuning-points", "What more tuning is worth", caption, [line, dots])


def reaching(results: Results) -> Figure | None:
    """The share of runs that have reached the target accuracy, by time."""
    rows, timed, never = series.reaching(results)
    if not rows:
        return None
    look = look_of(results)
    alt = look.alt
    what = "seconds" if timed else "steps"
    end = max(row["time"] for row in rows)
    x = alt.X("time:Q", title=what, axis=alt.Axis(format="~g", tickCount=6)).scale(domain=[0, end], nice=False)
    y = {"title": "share of runs", "scale": alt.Scale(domain=[0, 1]), "axis": alt.Axis(format=".0%", tickCount=5)}
    base = look.chart(rows).encode(x=x)
    band = base.mark_area(interpolate="step-after").encode(y=alt.Y("low:Q", **y), y2="high:Q")
    band = band.encode(opacity=look.opacity(0.12, 0.02))
    line = base.mark_line(strokeWidth=2, interpolate="step-after").encode(y=alt.Y("share:Q", **y))
    dots = look.chart([row for row in rows if row["step"]]).mark_point(filled=True, size=45)
    dots = dots.encode(x=x, y=alt.Y("share:Q", **y), shape=look.shape, opacity=look.opacity(1))
    tip = ["method:N", look.tip("time", ".3~g", what), *(look.tip(name, ".0%") for name in ("share", "low", "high"))]
    target = f"{number(100 * results.study.target)}%"
    caption = (
        f"{protocol(results)} The Kaplan-Meier estimate of the share of runs whose validation accuracy has reached "
        f"{target}; a run that ended before is censored there, one that diverged never reaches it. Bands are 95% "
        "log-log intervals."
    )
    if timed:
        caption += " Seconds are steps at the calibrated median of a step."
    if never:
        caption += f" Never reached by {listed(never)}."
    layers = [band, line.encode(opacity=look.opacity(1)), dots.encode(tooltip=tip)]
    return look.figure("time-to-target", f"Time to {target} validation accuracy", caption, layers)
