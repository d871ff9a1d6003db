"""The rankings of a report: the best method at an equal budget, its lead, and whether that is significant."""

from __future__ import annotations

from collections.abc import Sequence
from math import isinf, log
from typing import Any

from gradcost.report.tables import Table
from gradcost.results.rankings import Lead, Ranking, Standing, rankings
from gradcost.results.records import Results
from gradcost.results.statistics import Interval
from gradcost.results.summary import span
from gradcost.results.wording import DASH, bare, chance, count, listed, percent, points

ALPHA = 0.05
COLUMNS = ("method", "accuracy", "steps", "P(best)", "P(worse)", "p (Holm)")


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
        "sentences": [lead_of(ranking), *significance(ranking), *other_leaders(ranking), *_unreliable(ranking)],
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
    lead, margin = ranking.leads.get(second.method), ranking.margin or 0.0
    if winner.values == second.values:
        tied = [s.method for s in ranking.standings[1:] if s.values == winner.values]
        clause = f"The same on every seed as {listed(tied)}"
    elif isinf(margin):
        clause = f"{second.method}, the runner-up, diverged"
    else:
        clause = f"{points(margin)} ahead of {second.method}"
    if lead is None:
        return f"{clause}; they have no seed in common."
    fraction = ranking.best[winner.method]
    return (
        f"{clause}; P(best) {100 * fraction:.0f}% over {count(lead.test.n, 'seed')}, "
        f"P(better than the runner-up) {100 * lead.better:.0f}%."
    )


def significance(ranking: Ranking) -> list[str]:
    """Describe which differences are significant, and how many seeds that takes; empty for a single method."""
    if not ranking.leads:
        return []
    (seeds,) = {lead.test.n for lead in ranking.leads.values()}
    different = [method for method, lead in ranking.leads.items() if lead.p < ALPHA]
    if different:
        verdict = f"Significantly different (p < {ALPHA}) from {listed(different)}."
    else:
        verdict = "Not significantly different from any other method."
    second = ranking.standings[1].method
    lead, rivals = ranking.leads[second], len(ranking.leads)
    test = f"sign-flip, Holm over {rivals}" if rivals > 1 else "sign-flip"
    return [f"p {chance(lead.p)} against {second} ({test}). {verdict}{_seeds_needed(lead, seeds, rivals)}"]


def _seeds_needed(lead: Lead, seeds: int, rivals: int) -> str:
    """Describe how many seeds significance takes; "" if `seeds` suffice. Holm multiplies the least p by `rivals`."""
    with_holm = lead.test.enough(ALPHA / rivals)
    if with_holm <= seeds:
        return ""
    limit = f" {count(seeds, 'seed')} cannot give p below {lead.test.least:.4g}"
    single_test = lead.test.enough(ALPHA)
    if single_test <= seeds:
        return f"{limit}; with {count(rivals, 'comparison')} {with_holm} would do."
    if rivals == 1:
        return f"{limit}; {single_test} would do."
    return f"{limit}; {single_test} would do, and {with_holm} with {count(rivals, 'comparison')}."


def other_leaders(ranking: Ranking) -> list[str]:
    """Describe the smaller budgets at which another method has the best median, with few seeds perhaps by chance."""
    leaders = ranking.leaders
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
    lead = ranking.leads.get(standing.method)
    best = ranking.best.get(standing.method)
    return [
        f"{bare(standing.accuracy.median)} {span(standing.accuracy)}".rstrip(),
        f"{standing.steps:,.0f}",
        DASH if best is None else f"{100 * best:.0f}%",
        DASH if lead is None else f"{100 * lead.better:.0f}%",
        DASH if lead is None else chance(lead.p),
    ]


def _table(ranking: Ranking) -> Table:
    rows = [[standing.method, *_cells(ranking, standing)] for standing in ranking.standings]
    return Table(COLUMNS, [*rows, *([method, why, *[DASH] * 4] for method, why in ranking.out)])


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
