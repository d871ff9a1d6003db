"""The rankings of a report: the best method at an equal budget, its lead, and whether that is significant."""

from __future__ import annotations

from collections.abc import Sequence
from math import isinf, log
from typing import Any

from gradcost.report.tables import Table
from gradcost.results.rankings import Ranking, Standing, rankings
from gradcost.results.records import Results
from gradcost.results.statistics import Interval
from gradcost.results.summary import span
from gradcost.results.wording import DASH, bare, count, listed, percent, points

COLUMNS = ("method", "accuracy", "steps", "P(best)", "P(worse)")


def panels(results: Results) -> list[dict[str, Any]]:
    """Return the content of one panel of the page per ranking."""
    return [_panel(ranking) for ranking in rankings(results)]


def tables(results: Results) -> dict[str, Table]:
    """Return {file name without extension: table}, one table per ranking."""
    return {f"equal-{ranking.name}": _table(ranking) for ranking in rankings(results)}


def _panel(ranking: Ranking) -> dict[str, Any]:
    winner = ranking.winner
    return {
        "name": ranking.name,
        "title": f"Equal {ranking.noun}",
        "budget": ranking.budget,
        "winner": winner.method,
        "accuracy": percent(winner.accuracy.median),
        "span": span(winner.accuracy),
        "sentences": [lead_of(ranking), *other_leaders(ranking), *_unreliable(ranking)],
        "columns": COLUMNS,
        "rows": [_row(ranking, standing) for standing in ranking.standings],
        "leaders": _leader_bar(ranking),
        "out": ranking.out,
    }


def lead_of(ranking: Ranking) -> str:
    """Describe the winner's lead over the runner-up, and the fraction of seeds on which the winner is best."""
    if len(ranking.standings) == 1:
        return "It is the only method in this ranking."
    winner, second = ranking.standings[:2]
    better, margin = ranking.worse.get(second.method), ranking.margin or 0.0
    if winner.values == second.values:
        tied = [s.method for s in ranking.standings[1:] if s.values == winner.values]
        clause = f"The same on every seed as {listed(tied)}"
    elif isinf(margin):
        clause = f"{second.method}, the runner-up, diverged"
    else:
        clause = f"{points(margin)} ahead of {second.method}"
    if better is None:
        return f"{clause}; they have no seed in common."
    fraction = ranking.best[winner.method]
    return (
        f"{clause}; P(best) {100 * fraction:.0f}% over {count(ranking.seeds, 'seed')}, "
        f"P(better than the runner-up) {100 * better:.0f}%."
    )


def other_leaders(ranking: Ranking) -> list[str]:
    """Describe the smaller budgets at which another method has the best median, with few seeds perhaps by chance."""
    # A range whose ends look the same is left out: methods with a few bytes more or less.
    *below, last = ranking.leaders
    leaders = [*(each for each in below if ranking.text(each[1]) != ranking.text(each[2])), last]
    if len(leaders) < 2:
        return [] if ranking.name == "memory" else ["It leads at every smaller budget too."]
    if len(leaders) > 4:
        _, low, _ = leaders[-1]
        return [f"Below {ranking.text(low)} the leader changes {count(len(leaders) - 1, 'time')}."]
    clauses = [f"below {ranking.text(high)} {method} leads" for method, _, high in reversed(leaders[:-1])]
    if ranking.name == "memory":
        clauses.append(f"below {ranking.text(leaders[0][1])} nothing fits")
    text = listed(clauses)
    return [f"{text[0].upper()}{text[1:]}."]


def _unreliable(ranking: Ranking) -> list[str]:
    """Name the methods with an unreliable timing; empty if there are none."""
    if not ranking.doubtful:
        return []
    return [f"The timing of {listed(list(ranking.doubtful))} is not reliable: see the notes marked ~ below."]


def _row(ranking: Ranking, standing: Standing) -> dict[str, Any]:
    return {
        "method": standing.method,
        "cells": _cells(ranking, standing),
        "strip": strip(standing.accuracy, list(standing.values.values())),
    }


def _cells(ranking: Ranking, standing: Standing) -> list[str]:
    """Return a method's cells for the columns after the first."""
    worse = ranking.worse.get(standing.method)
    best = ranking.best.get(standing.method)
    return [
        f"{bare(standing.accuracy.median)} {span(standing.accuracy)}".rstrip(),
        f"{standing.steps:,.0f}",
        DASH if best is None else f"{100 * best:.0f}%",
        DASH if worse is None else f"{100 * worse:.0f}%",
    ]


def _table(ranking: Ranking) -> Table:
    rows = [[standing.method, *_cells(ranking, standing)] for standing in ranking.standings]
    return Table(COLUMNS, [*rows, *([method, why, *[DASH] * 3] for method, why in ranking.out)])


def strip(accuracy: Interval, values: Sequence[float]) -> dict[str, Any]:
    """Return positions in percent on a strip of accuracies: interval, median and seeds. Diverged runs are at 0."""
    low, middle, high = (max(x, 0.0) for x in (accuracy.low, accuracy.median, accuracy.high))
    positions = {"low": low, "width": high - low, "median": middle}
    return {name: f"{100 * x:.2f}" for name, x in positions.items()} | {
        "dots": [f"{100 * max(x, 0):.2f}" for x in values]
    }


def _leader_bar(ranking: Ranking) -> list[dict[str, Any]]:
    """Return one segment per range of budgets with one leader; widths in percent of a logarithmic scale."""
    leaders = [(method, low, high) for method, low, high in ranking.leaders if high > low > 0]
    if not leaders:
        return []
    total = log(leaders[-1][2] / leaders[0][1])
    return [
        {
            "method": method,
            "width": f"{100 * log(high / low) / total:.2f}",
            "text": f"{method}: {ranking.text(low)} to {ranking.text(high)}",
        }
        for method, low, high in leaders
    ]
