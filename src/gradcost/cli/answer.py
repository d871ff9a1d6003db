"""Print the answer of a comparison or a study: the verdict, a table, and what is not reliable."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gradcost.cli import console
from gradcost.report import tables
from gradcost.results.records import Cost, Results
from gradcost.results.verdict import verdict
from gradcost.results.wording import listed


def show_answer(results: Results) -> None:
    """Print the verdict, the table of methods, refused methods and doubtful timings."""
    console.show()
    console.show(verdict(results), bold=True)
    console.show()
    table = tables.table(results)
    console.show_table(table.columns, table.rows)
    for refusal in results.refused:
        console.show(f"{refusal.method}: {refusal.reason}")
    doubted = [cost for cost in results.costs if cost.doubt is not None]
    if doubted:
        console.show(_doubts(doubted))
    console.show()


def _doubts(costs: Sequence[Cost]) -> str:
    """One line on all timings marked with "~" in the table."""
    reasons = list(dict.fromkeys(str(cost.doubt).partition("; time it again")[0] for cost in costs))
    cores = [re.fullmatch(r"other programs used ([\d.]+) cores? during the timing", reason) for reason in reasons]
    if len(reasons) > 1 and all(cores):
        used = sorted((match[1] for match in cores if match), key=float)
        reasons = [f"other programs used {used[0]} to {used[-1]} cores during the timing"]
    return (
        f"~ {listed([cost.method for cost in costs])}: {'; '.join(reasons)}. On an idle machine, the same command "
        "times them again."
    )
