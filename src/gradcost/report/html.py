"""The report as one HTML file: verdict, rankings, tables, figures, tuning and machine. Needs gradcost[report]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradcost.core.files import write_chosen
from gradcost.report import tables, targets
from gradcost.report.budgets import panels, strip
from gradcost.report.figures import figures
from gradcost.report.pages import cell, rendered
from gradcost.report.theme import intervals, marks, protocol
from gradcost.results import ledger
from gradcost.results.facts import facts
from gradcost.results.lint import Finding, lint
from gradcost.results.records import Results, TrialRecord, read
from gradcost.results.summary import MethodSummary, summarise
from gradcost.results.verdict import choose, sentences
from gradcost.results.wording import count, listed, percent, rate, size


def write(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    reload: int | None = None,
    results: Results | None = None,
) -> Path:
    """Write the report of a results folder.

    Args:
        folder: a results folder.
        output: the file. None: report.html inside `folder`.
        reload: seconds after which a browser loads the page again, while the study runs. None: it does not.
        results: the content of `folder`. None: it is read.
    Returns:
        The path of the file, which is written atomically.
    Raises:
        BadInput: `folder` is not a results folder, or `output` is one of its files.
        MissingExtra: a package of gradcost[report] is not installed.
    """
    path = Path(output) if output is not None else Path(folder) / "report.html"
    ledger.refuse_own(folder, path)
    return write_chosen(path, page(read(folder) if results is None else results, reload))


def page(results: Results, reload: int | None = None) -> str:
    """Return the HTML of the report, which depends on `results` alone, and on `reload` (see `write`)."""
    rows, study = summarise(results), results.study
    choice = choose(results)
    findings = lint(facts(results))
    labels = [*study.methods, *(row.method for row in rows), *(r.method for r in results.refused)]
    return rendered(
        "report.html.j2",
        figures(results),
        title=f"{study.task_name} / {study.model_name}",
        reload=reload,
        facts=[*_facts(results), *([] if reload is None else [f"still running, reloaded every {reload} s"])],
        sentences=sentences(results),
        targets=targets.sections(results),
        target_note=targets.note(results),
        panels=panels(results),
        panel_notes=_panel_notes(results),
        picked=choice.row.method if choice else None,
        marks=marks(list(dict.fromkeys(labels))),
        methods=[row.method for row in rows],
        decision=_decision(results, rows),
        notes=_notes(results, rows),
        audit=tables.audit(results),
        lists=[
            (_FAIRNESS, ("method", "rule", "finding"), [(f.method, _rule(f), _finding(f)) for f in findings]),
            ("Refused methods", ("method", "reason"), [(r.method, r.reason) for r in results.refused]),
            ("Runs that did not finish", ("method", "runs", "reason"), _unfinished(results)),
        ],
        environment=results.environment,
        footer=_footer(results),
    )


def _facts(results: Results) -> list[str]:
    study = results.study
    facts = [study.task]
    if study.weights is not None:
        facts.append(f"{study.weights:,} weights, {size(study.weights_bytes)}")
    facts.append(count(len(study.seeds), "seed"))
    facts.append(f"{count(study.points, 'tuning point')} per method")
    facts.append(count(study.steps, "step") + ("" if study.batch is None else f" of batch {study.batch}"))
    facts.append(study.optimizer)
    if study.memory is not None:
        facts.append(f"budget {size(study.memory)} beyond the weights")
    return facts


def _decision(results: Results, rows: list[MethodSummary]) -> dict[str, Any]:
    """Return the decision table, with a strip of seeds under each accuracy and a bar under each peak."""
    columns, lines = tables.table(results)
    most = max((row.peak_bytes or 0 for row in rows), default=0)
    table_rows = []
    for row, line in zip(rows, lines, strict=True):
        cells = [cell(*pair) for pair in zip(columns[1:], line[1:], strict=True)]
        cells[0]["strip"] = strip(row.accuracy, row.accuracies) if row.accuracy else None
        if row.peak_bytes:
            cells[2]["bar"] = f"{100 * row.peak_bytes / most:.1f}"
        cells[2]["warn"] = row.fits is False
        cells[6]["warn"] = row.diverged > 0
        cells[7]["warn"] = row.edge is not None
        table_rows.append({"method": row.method, "cells": cells})
    return {"title": "Cost and accuracy of each method", "columns": columns, "rows": table_rows}


def _notes(results: Results, rows: list[MethodSummary]) -> list[str]:
    target = tables.target(results.study)
    notes = [
        f"Each number is the median over seeds; brackets are {intervals(results)}. A diverged run is the worst "
        "result. “beyond weights” is the peak memory of a step, without weights, buffers and batch. The strip "
        f"under an accuracy runs from 0 to 100%, with a dot per seed. “{target}” is the step of the first "
        f"evaluation with at least this validation {results.study.metric.name}: the median over the seeds that "
        "reach it. Its seconds are these steps times the milliseconds of a step."
    ]
    if results.study.chance is not None:
        notes[0] += f" Guessing gives {percent(results.study.chance)}."
    return notes + [f"~ {row.method}: {row.doubt}" for row in rows if row.doubt]


def _panel_notes(results: Results) -> list[str]:
    memory = "the largest peak of any method" if results.study.memory is None else "the study's budget"
    return [
        f"All rankings come from one set of final runs ({protocol(results)[:-1]}). An accuracy is the validation "
        "accuracy at the step that uses up the budget, linear between two evaluations. No method was tuned for a "
        f"smaller budget. Each budget is the largest that the runs of every method cover; for memory it is {memory}. "
        f"Brackets are {intervals(results)}; a dot is a seed, and a diverged run is the worst result. P(best) is "
        "the fraction of seeds on which a method is the best; tied methods split a seed. P(worse) is the "
        "probability that a run of the winner is better than a run of the method. The bar shows the method with the "
        "best median at each smaller budget, on a logarithmic scale; with more seeds its boundaries may move."
    ]


_FAIRNESS = "What makes this comparison unfair or weaker"


def _rule(finding: Finding) -> str:
    return f"{finding.code} {finding.rule}"


def _finding(finding: Finding) -> str:
    return f"{finding.found}. {finding.remedy}"


def _unfinished(results: Results) -> list[tuple[str, str, str]]:
    """Return one line per method, phase and status of diverged or failed runs, with at most two reasons each."""
    groups: dict[tuple[str, str, str], list[TrialRecord]] = {}
    for trial in results.trials:
        if trial.status != "finished":
            groups.setdefault((trial.method, trial.phase, trial.status), []).append(trial)
    lines = []
    for (method, phase, status), runs in groups.items():
        rates = listed([rate(lr) for lr in sorted({run.lr for run in runs})])
        kind = {"tune": "tuning run", "confirm": "confirming run"}.get(phase, "final run")
        reasons = list(dict.fromkeys(run.reason or "no reason was recorded" for run in runs))
        why = "; ".join(reasons[:2])
        if len(reasons) > 2:
            why += f"; {len(reasons) - 2} more"
        lines.append((method, f"{count(len(runs), kind)} {status} at lr {rates}", why))
    return lines


def _footer(results: Results) -> str:
    runs, costs = count(len(results.trials), "run"), count(len(results.costs), "cost measurement")
    text = f"Made from {runs} and {costs}."
    if results.torn:
        verb = "was" if results.torn == 1 else "were"
        text += f" {count(results.torn, 'line')} of records.jsonl could not be read and {verb} skipped."
    return text
