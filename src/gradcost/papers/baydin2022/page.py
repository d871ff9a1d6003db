"""Write the Markdown page that compares recorded runs with the claims of Baydin et al. (2022)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf
from statistics import median

from gradcost.core.units import number
from gradcost.papers.baydin2022.claims import claims
from gradcost.papers.baydin2022.speed import StepTimes
from gradcost.papers.baydin2022.table import (
    ASSUMPTIONS,
    GRADIENTS,
    PUBLISHED_FACTS,
    TITLE,
    experiments,
    tuned_method,
)
from gradcost.papers.claims import Glance, claims_page, markdown_table
from gradcost.results.records import Results, TrialRecord
from gradcost.results.tuning import completed_finals

HEADERS = ("method", "learning rate", "seeds", "validation loss", "test loss", "test accuracy", "ms per step")


def page(results: Results, times: Mapping[int, StepTimes], rows: str, command: str, records: str) -> str:
    """Return the page as Markdown.

    Args:
        results: the records of the study.
        times: the paired times by seed.
        rows: the model.
        command: the command that writes the page.
        records: the folder of the records, or a link to it.
    """
    scope = f"{_scope(results, rows)} Not run: the test functions and the scaling with depth."
    glance = Glance.of(scope, results)
    sections = [
        "## The runs\n\n" + markdown_table(HEADERS, run_rows(results, times, rows)),
        "Medians over seeds; a run that diverged is the worst. The times of a step were taken in turn in one "
        "process.",
        "## Published facts and assumptions\n\n" + "\n".join(f"- {fact}" for fact in PUBLISHED_FACTS),
        "These details are not published, or not known to us:\n\n"
        + markdown_table(("detail", "assumed here"), ASSUMPTIONS),
    ]
    listed = list(claims(results, times, rows, command, records))
    return claims_page(f"{TITLE}: what reproduces", glance, listed, sections)


def _scope(results: Results, rows: str) -> str:
    """Return the task, and the steps of a run with the shared rate and with the tuned rates."""
    tuned = [tuned_method(gradient, rows) for gradient in GRADIENTS]
    shared = max((run.steps for run in results.trials if run.method not in tuned), default=0)
    own = max((run.steps for run in results.trials if run.method in tuned), default=0)
    if not results.trials:
        return f"Rows {rows} on `{results.study.task}`: only the times of a step; no run was trained."
    text = f"Rows {rows} on `{results.study.task}`: {shared:,} steps per run with the shared rate"
    return f"{text}, {own:,} with the tuned rates." if own else f"{text}. The rates were not tuned."


def run_rows(results: Results, times: Mapping[int, StepTimes], rows: str) -> list[list[str]]:
    """Return the cells of the table whose columns are HEADERS.

    Args:
        results: the records of the study.
        times: the paired times by seed.
        rows: the model.
    """
    names = [(gradient, each.method(gradient)) for each in experiments(rows) for gradient in GRADIENTS]
    names += [(gradient, tuned_method(gradient, rows)) for gradient in GRADIENTS]
    return [
        list(_cells(name, runs, [getattr(each, f"{gradient}_ms") for each in times.values()]))
        for gradient, name in names
        if (runs := completed_finals(results.trials, name))
    ]


def _cells(name: str, runs: Sequence[TrialRecord], ms: Sequence[float]) -> Iterator[str]:
    yield name
    yield f"{runs[0].lr:g}"
    yield str(len(runs))
    diverged = sum(run.status == "diverged" for run in runs)
    if 2 * diverged >= len(runs):
        yield from (f"{diverged} of {len(runs)} diverged", "-", "-")
    else:
        for scores, what in (("validation", "loss"), ("test", "loss"), ("test", "accuracy")):
            worst = 0.0 if what == "accuracy" else inf  # of a run that diverged
            values = [
                getattr(getattr(run, scores), what, None) if run.status == "finished" else worst for run in runs
            ]
            known = [value for value in values if value is not None]
            middle = median(known) if len(known) > diverged else None
            yield "-" if middle is None else f"{100 * middle:.1f}%" if what == "accuracy" else f"{middle:.3f}"
    yield number(median(ms)) if ms else "-"
