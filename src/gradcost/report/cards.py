"""The verdict at each budget, in words: who wins, by how much, how sure that is, and where the answer flips."""

from __future__ import annotations

from collections.abc import Sequence
from math import isinf, log
from typing import Any

from gradcost.report.formats import Table
from gradcost.results.rankings import Lead, Ranking, Standing, rankings
from gradcost.results.records import Results
from gradcost.results.statistics import Interval
from gradcost.results.summary import span
from gradcost.results.wording import DASH, bare, chance, count, listed, percent, points

ALPHA = 0.05
COLUMNS = ("method", "accuracy", "steps", "P(best)", "P(worse)", "p (Holm)")


def cards(results: Results) -> list[dict[str, Any]]:
    """What the page shows of each ranking; every word a person reads is made here."""
    return [_card(ranking) for ranking in rankings(results)]


def tables(results: Results) -> dict[str, Table]:
    """Each ranking as a table, by its name."""
    return {f"equal-{ranking.name}": _table(ranking) for ranking in rankings(results)}


def _card(ranking: Ranking) -> dict[str, Any]:
    winner = ranking.winner
    return {
        "name": ranking.name,
        "title": f"Equal {ranking.noun}",
        "budget": ranking.budget,
        "winner": winner.method,
        "accuracy": percent(winner.accuracy.median),
        "span": span(winner.accuracy),
        "sentences": [lead_of(ranking), *doubts(ranking), *flips(ranking), *_unsure(ranking)],
        "columns": COLUMNS,
        "rows": [_row(ranking, standing) for standing in ranking.standings],
        "reigns": _strip(ranking),
        "out": ranking.out,
    }


def lead_of(ranking: Ranking) -> str:
    """By how much the winner is ahead, and how often it is the best."""
    if len(ranking.standings) == 1:
        return "It is the only method that is ranked here."
    winner, second = ranking.standings[:2]
    lead, margin = ranking.leads.get(second.method), ranking.margin or 0.0
    if winner.values == second.values:
        tied = [s.method for s in ranking.standings[1:] if s.values == winner.values]
        first = f"The same on every seed as {listed(tied)}"
    elif isinf(margin):
        first = f"{second.method}, the runner-up, diverged"
    else:
        first = f"{points(margin)} ahead of {second.method}"
    if lead is None:
        return f"{first}; they have no seed in common."
    share = ranking.best[winner.method]
    return (
        f"{first}; P(best) {100 * share:.0f}% over {count(lead.test.n, 'seed')}, "
        f"P(better than the runner-up) {100 * lead.better:.0f}%."
    )


def doubts(ranking: Ranking) -> list[str]:
    """What the tests say, and what so few seeds cannot."""
    if not ranking.leads:
        return []
    (n,) = {lead.test.n for lead in ranking.leads.values()}
    apart = [method for method, lead in ranking.leads.items() if lead.p < ALPHA]
    said = f"Told apart (p < {ALPHA}) from {listed(apart)}." if apart else "Told apart from no other method."
    second = ranking.standings[1].method
    lead, rivals = ranking.leads[second], len(ranking.leads)
    corrected = f" (sign-flip, Holm over {rivals})" if rivals > 1 else " (sign-flip)"
    return [f"p {chance(lead.p)} against {second}{corrected}. {said}{_too_few(lead, n, rivals)}"]


def _too_few(lead: Lead, n: int, rivals: int) -> str:
    """5 seeds cannot give p under 0.0625; 6 would do. By Holm the first of `rivals` must be that much smaller."""
    needed = lead.test.enough(ALPHA / rivals)
    if needed <= n:
        return ""
    text = f" {count(n, 'seed')} cannot give p under {lead.test.least:.4g}"
    if (alone := lead.test.enough(ALPHA)) > n:
        return f"{text}; {alone} would do" + (
            f", and {needed} with {count(rivals, 'comparison')}." * (rivals > 1) or "."
        )
    return f"{text}; with {count(rivals, 'comparison')} {needed} would do."


def flips(ranking: Ranking) -> list[str]:
    """Where another method leads; nothing but an order of medians, which a few seeds may turn."""
    leaders = ranking.leaders
    if len(leaders) < 2:
        return ["At every smaller budget the answer is the same."] if ranking.name != "memory" else []
    if len(leaders) > 4:
        _, low, _ = leaders[-1]
        return [f"From {ranking.text(low)} down the lead changes {count(len(leaders) - 1, 'time')}."]
    said = [f"below {ranking.text(high)} {method} leads" for method, _, high in reversed(leaders[:-1])]
    floor = [f"below {ranking.text(leaders[0][1])} nothing fits"] * (ranking.name == "memory")
    text = listed([*said, *floor])
    return [f"{text[0].upper()}{text[1:]}."]


def _unsure(ranking: Ranking) -> list[str]:
    if not ranking.doubtful:
        return []
    verb = "is" if len(ranking.doubtful) == 1 else "are"
    return [f"In doubt {verb} the clock of {listed(list(ranking.doubtful))}: see the notes on ~ below."]


def _row(ranking: Ranking, standing: Standing) -> dict[str, Any]:
    cells = _cells(ranking, standing)
    return {
        "method": standing.method,
        "cells": cells,
        "strip": strip(standing.accuracy, list(standing.values.values())),
    }


def _cells(ranking: Ranking, standing: Standing) -> list[str]:
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
    """Where the interval, the median and each seed lie between 0 and 100%; a run that diverged stands at 0."""
    low, middle, high = (max(x, 0.0) for x in (accuracy.low, accuracy.median, accuracy.high))
    places = {"low": low, "width": high - low, "median": middle}
    return {name: f"{100 * x:.2f}" for name, x in places.items()} | {
        "dots": [f"{100 * max(x, 0):.2f}" for x in values]
    }


def _strip(ranking: Ranking) -> list[dict[str, Any]]:
    """The reigns side by side, as wide as their share of the budgets on a logarithmic scale is."""
    leaders = [(method, low, high) for method, low, high in ranking.leaders if high > low > 0]
    if not leaders:
        return []
    whole = log(leaders[-1][2] / leaders[0][1])
    return [
        {
            "method": method,
            "width": f"{100 * log(high / low) / whole:.2f}",
            "text": f"{method}: {ranking.text(low)} to {ranking.text(high)}",
        }
        for method, low, high in leaders
    ]
