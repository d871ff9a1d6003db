"""Figures of tuning: accuracy against the learning rate, value of more tuning points, time to the target accuracy."""

from __future__ import annotations

from gradcost.report import series
from gradcost.report.theme import CROSS, Figure, powers_of_ten, protocol, theme_of
from gradcost.results.records import Results
from gradcost.results.summary import summarise
from gradcost.results.wording import count, listed, number


def landscape(results: Results) -> Figure | None:
    """Draw the validation accuracy of every learning rate that was tried."""
    rows = series.grid(results)
    if not rows:
        return None
    theme = theme_of(results)
    alt = theme.alt
    lowest = min(0.0, *(row["accuracy"] for row in rows))
    rates = [row["lr"] for row in rows]
    low, high = min(rates) / 1.3, max(rates) * 1.3
    x = alt.X("lr:Q", title="learning rate", axis=alt.Axis(format="~g", values=powers_of_ten(low, high)))
    x = x.scale(type="log", nice=False, domain=[low, high])
    axis = alt.Axis(format=".0%", values=[0, 0.2, 0.4, 0.6, 0.8, 1])
    y = alt.Y("accuracy:Q", title="validation accuracy", axis=axis).scale(domain=[lowest * 1.4, 1])
    tip = ["method:N", theme.tip("lr", "~g"), "status:N"]
    base = theme.chart(rows).encode(x=x, y=y)
    finished = base.transform_filter("datum.status == 'finished'")
    line = finished.mark_line(strokeWidth=1.2).encode(opacity=theme.opacity(0.55))
    tried = finished.mark_point(filled=True, size=40).encode(shape=theme.shape, opacity=theme.opacity(1))
    tried = tried.encode(tooltip=[*tip, theme.tip("accuracy", ".2%")])
    best = base.transform_filter("datum.chosen").mark_point(size=230, strokeWidth=2, shape="circle")
    best = best.encode(opacity=theme.opacity(1), tooltip=[*tip, theme.tip("accuracy", ".2%")])
    diverged = base.transform_filter("datum.status == 'diverged'")
    diverged = diverged.mark_point(size=34, strokeWidth=1.6, shape=CROSS)
    diverged = diverged.encode(opacity=theme.opacity(1), tooltip=tip)
    lengths = sorted({run.steps for run in results.trials if run.phase == "tune" and run.status == "finished"})
    confirmed = any(run.phase == "confirm" for run in results.trials)
    rule = (
        "the best mean over its tuning and confirming runs"
        if confirmed
        else "the best validation accuracy, then the lowest loss"
    )
    caption = (
        f"At most {count(results.study.points, 'learning rate')} per method, on a logarithmic scale, in runs of "
        f"{listed([f'{n:,}' for n in lengths]) or 'no'} steps, scored on the validation split. A ring marks the "
        f"rate of the final runs, which has {rule}. A cross below zero is a diverged run."
    )
    edges = [row.method for row in summarise(results) if row.edge]
    if edges:
        caption += f" At an edge of the grid, so that a better rate may lie beyond, are {listed(edges)}."
    return theme.figure("tuning", "Accuracy against the learning rate", caption, [line, tried, best, diverged])


def expected(results: Results) -> Figure | None:
    """Draw the expected best validation accuracy against the number of tuning points."""
    rows = series.expected(results)
    if not rows:
        return None
    theme = theme_of(results)
    alt = theme.alt
    most = max(row["points"] for row in rows)
    x = alt.X("points:Q", title="tuning points", axis=alt.Axis(format="d", tickMinStep=1))
    x = x.scale(domain=[1, max(most, 2)], nice=False)
    y = alt.Y("best:Q", title="expected best accuracy", axis=alt.Axis(format=".0%", tickCount=5))
    base = theme.chart(rows).encode(x=x, y=y.scale(domain=[0, 1]))
    line = base.mark_line(strokeWidth=1.6).encode(opacity=theme.opacity(1))
    dots = base.mark_point(filled=True, size=45).encode(shape=theme.shape, opacity=theme.opacity(1))
    dots = dots.encode(tooltip=["method:N", theme.tip("points", "d"), theme.tip("best", ".2%", "expected best")])
    caption = (
        "The expected best validation accuracy of n tuning points, drawn without replacement from the points of a "
        f"method: at most {count(most, 'point')}. Each point ran with one seed, so there is no interval. A diverged "
        "run counts as guessing. Source: Dodge et al. 2019, in the unbiased form."
    )
    return theme.figure("tuning-points", "Value of more tuning points", caption, [line, dots])


def reaching(results: Results) -> Figure | None:
    """Draw the fraction of runs that have reached the target accuracy, against time."""
    rows, timed, never = series.reaching(results)
    if not rows:
        return None
    theme = theme_of(results)
    alt = theme.alt
    what = "seconds" if timed else "steps"
    end = max(row["time"] for row in rows)
    x = alt.X("time:Q", title=what, axis=alt.Axis(format="~g", tickCount=6)).scale(domain=[0, end], nice=False)
    y = {"title": "share of runs", "scale": alt.Scale(domain=[0, 1]), "axis": alt.Axis(format=".0%", tickCount=5)}
    base = theme.chart(rows).encode(x=x)
    band = base.mark_area(interpolate="step-after").encode(y=alt.Y("low:Q", **y), y2="high:Q")
    band = band.encode(opacity=theme.opacity(0.12, 0.02))
    line = base.mark_line(strokeWidth=2, interpolate="step-after").encode(y=alt.Y("share:Q", **y))
    dots = theme.chart([row for row in rows if row["step"]]).mark_point(filled=True, size=45)
    dots = dots.encode(x=x, y=alt.Y("share:Q", **y), shape=theme.shape, opacity=theme.opacity(1))
    tip = [
        "method:N",
        theme.tip("time", ".3~g", what),
        *(theme.tip(name, ".0%") for name in ("share", "low", "high")),
    ]
    metric = results.study.metric
    target = metric.text(metric.score(results.study.target)) if results.study.target is not None else "the target"
    if metric.is_accuracy and results.study.target is not None:
        target = f"{number(100 * results.study.target)}%"
    caption = (
        f"{protocol(results)} The Kaplan-Meier estimate of the share of runs whose validation {metric.name} has "
        f"reached {target}. A run that ended without reaching it is censored at its end; a diverged run never "
        "reaches it. Bands are 95% log-log intervals."
    )
    if timed:
        caption += " Seconds are steps times the calibrated median of a step."
    if never:
        caption += f" Never reached by {listed(never)}."
    layers = [band, line.encode(opacity=theme.opacity(1)), dots.encode(tooltip=tip)]
    return theme.figure("time-to-target", f"Time to {target} validation {metric.name}", caption, layers)
