"""A results folder as one Markdown page: verdict, scope, ratios to targets, scores, tuning, linter findings."""

from __future__ import annotations

from collections.abc import Iterator

from gradcost.report import budgets, tables, targets
from gradcost.report.tables import Table, inert, markdown
from gradcost.results.facts import facts
from gradcost.results.lint import lint
from gradcost.results.records import Results
from gradcost.results.verdict import sentences
from gradcost.results.wording import listed, number, size

_HEADINGS = {
    "to-target-steps": "Steps to a common target, as a multiple",
    "to-target-flops": "FLOPs to a common target, as a multiple",
    "to-target-seconds": "Seconds to a common target, as a multiple",
    "equal-flops": "Validation accuracy at equal FLOPs",
    "equal-seconds": "Validation accuracy at equal seconds",
}


def summary_page(results: Results) -> str:
    """Return the page. It depends on `results` alone.

    Args:
        results: from `records.read`.
    """
    return inert("\n\n".join(_sections(results)) + "\n")


def _sections(results: Results) -> Iterator[str]:
    study = results.study
    yield f"# {study.task_name} / {study.model_name}"
    yield " ".join(sentences(results))
    yield "## At a glance\n\n" + markdown(_scope(results)).rstrip()
    found = {**targets.tables(results), **budgets.tables(results)}
    for name, heading in _HEADINGS.items():
        if name in found:
            yield f"## {heading}\n\n{markdown(found[name]).rstrip()}"
            if name == "to-target-flops":
                yield targets.note(results)
    yield "## Test scores and costs\n\n" + markdown(tables.table(results)).rstrip()
    yield "## Numbers per step that FLOPs of matrix products leave out\n\n" + markdown(_uncounted(results)).rstrip()
    yield "## Tuning\n\n" + markdown(tables.audit(results)).rstrip()
    findings = lint(facts(results))
    yield "## What the linter finds\n\n" + (
        "\n".join(f"- {finding.code}, {finding.method}: {finding.found}. {finding.remedy}" for finding in findings)
        or "Nothing."
    )


def _scope(results: Results) -> Table:
    study, runs = results.study, results.trials
    steps = sorted({run.steps for run in runs if run.phase == "final" and run.status == "finished"})
    hours = sum(run.seconds or 0.0 for run in runs) / 3600
    machine = [str(results.environment[name]) for name in ("gpu", "cpu", "torch") if name in results.environment]
    rows = [
        ("task", study.task),
        (
            "trained weights",
            "unknown" if study.weights is None else f"{study.weights:,}, {size(study.weights_bytes)}",
        ),
        ("methods", str(len(dict.fromkeys(run.method for run in runs)))),
        ("runs", f"{len(runs)}, of which {sum(run.status == 'diverged' for run in runs)} diverged"),
        ("final seeds", str(len(study.seeds))),
        ("steps of a final run", listed([f"{n:,}" for n in steps])),
        ("time", f"{number(hours, 2)} core-hours"),
        ("machine", ", torch ".join(machine)),
    ]
    return Table(("what", "how much"), rows)


def _uncounted(results: Results) -> Table:
    """Element-wise operations and random numbers of one step of each method."""
    rows = [
        [cost.method, _millions(cost.flops), _millions(cost.elementwise), _millions(cost.drawn)]
        for cost in results.costs
    ]
    return Table(("method", "FLOPs of products", "element-wise operations", "random numbers"), rows)


def _millions(x: int | None) -> str:
    return "unknown" if x is None else f"{number(x / 1e6)} M"
