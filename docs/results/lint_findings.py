"""What `gradcost lint` finds in each study of this folder.

    python docs/results/lint_findings.py

It prints the table of lint_findings.md: each code, and the number of methods that it was found for.
"""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

from gradcost.papers.claims import markdown_table
from gradcost.results.facts import facts
from gradcost.results.lint import lint
from gradcost.results.records import read

HERE = Path(__file__).parent


def found() -> dict[str, Counter[str]]:
    """Return how often each rule was broken in each study with trials, by folder."""
    results = {path.parent.name: read(path.parent) for path in sorted(HERE.glob("*/study.json"))}
    return {
        name: Counter(f"{each.code} {each.rule}" for each in lint(facts(study)))
        for name, study in results.items()
        if study.trials
    }


def table() -> str:
    """Return the findings as a table, one row per study."""
    rows = [
        [f"`{name}`", ", ".join(f"{code} ({number})" for code, number in sorted(codes.items())) or "none"]
        for name, codes in found().items()
    ]
    return markdown_table(["study", "findings, and for how many methods"], rows)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(table())
