"""The report as one HTML file: verdicts, tables, figures, tuning, machine. Needs gradcost[report]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradcost.core.files import write_whole
from gradcost.report import tables
from gradcost.report.captions import intervals, protocol
from gradcost.report.cards import cards, strip
from gradcost.report.figures import figures
from gradcost.report.pages import cell, rendered
from gradcost.report.palette import marks
from gradcost.results.facts import facts
from gradcost.results.lint import Finding, lint
from gradcost.results.records import Results, TrialRecord, read
from gradcost.results.summary import Row, choose, sentences, summarise
from gradcost.results.wording import count, listed, number, percent, rate, size


def write(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a results folder to `output`, by default report.html inside it; return its path.

    The file appears whole or not at all. Raises ValueError when `folder` holds no results, and ImportError
    with the name of the extra when a package is missing.
    """
    path = Path(output) if output is not None else Path(folder) / "report.html"
    return write_whole(path, page(read(folder)))


def page(results: Results) -> str:
    """The whole page, a pure function of the results."""
    rows, study = summarise(results), results.study
    choice = choose(rows, study)
    findings = lint(facts(results))
    named = [*study.methods, *(row.method for row in rows), *(r.method for r in results.refused)]
    return rendered(
        "report.html.j2",
        figures(results),
        title=f"{study.task_name} / {study.model_name}",
        facts=_facts(results),
        sentences=sentences(results),
        cards=cards(results),
        card_notes=_card_notes(results),
        picked=choice.row.method if choice else None,
        marks=marks(list(dict.fromkeys(named))),
        methods=[row.method for row in rows],
        decision=_decision(results, rows),
        notes=_notes(results, rows),
        audit=tables.audit(results),
        lists=[
            (_FAIRNESS, ("method", "rule", "what was found"), [(f.method, _rule(f), _found(f)) for f in findings]),
            ("Refused", ("method", "why"), [(r.method, r.reason) for r in results.refused]),
            ("Runs that did not finish", ("method", "runs", "why"), _unfinished(results)),
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
    facts.append(f"tuning {count(study.points, 'point')} a method")
    facts.append(count(study.steps, "step") + ("" if study.batch is None else f" of batch {study.batch}"))
    facts.append(study.optimizer)
    if study.memory is not None:
        facts.append(f"budget {size(study.memory)} beyond the weights")
    return facts


def _decision(results: Results, rows: list[Row]) -> dict[str, Any]:
    """The decision table with what only a page can show: where each number lies among the others."""
    columns, lines = tables.table(results)
    most = max((row.peak_bytes or 0 for row in rows), default=0)
    made = []
    for row, line in zip(rows, lines, strict=True):
        cells = [cell(*pair) for pair in zip(columns[1:], line[1:], strict=True)]
        cells[0]["strip"] = strip(row.accuracy, row.accuracies) if row.accuracy else None
        if row.peak_bytes:
            cells[2]["bar"] = f"{100 * row.peak_bytes / most:.1f}"
        cells[2]["warn"] = row.fits is False
        cells[6]["warn"] = row.diverged > 0
        cells[7]["warn"] = row.edge is not None
        made.append({"method": row.method, "cells": cells})
    return {"title": "What each method costs, and what it does to accuracy", "columns": columns, "rows": made}


def _notes(results: Results, rows: list[Row]) -> list[str]:
    target = f"to {number(100 * results.study.target)}%"
    notes = [
        f"Each number is the median over seeds, brackets hold {intervals(results)}; a run that diverged is the worst "
        "result. Beyond the weights are the most bytes alive in a step, less the weights, the buffers and the batch. "
        "The strip under an accuracy runs from 0 to 100%, a dot a seed. The column "
        f"“{target}” tells the first evaluation whose validation accuracy reached it, the "
        "median over the seeds that did, and what those steps take at the measured milliseconds."
    ]
    if results.study.chance is not None:
        notes[0] += f" Guessing gives {percent(results.study.chance)}."
    return notes + [f"~ {row.method}: {row.doubt}" for row in rows if row.doubt]


def _card_notes(results: Results) -> list[str]:
    memory = "the most that any method needs" if results.study.memory is None else "that of the study"
    return [
        f"All from one set of final runs ({protocol(results)[:-1]}): the validation accuracy of each when the budget "
        "is spent, read off its evaluations, linear between two of them; no method was tuned for a smaller budget. "
        f"The budget is the largest that every method's runs cover, and for memory {memory}. Brackets hold "
        f"{intervals(results)}; a dot is a seed, and a run that diverged is the worst result. P(best) is the share "
        "of seeds on which a method is the best, ties shared; P(worse) the chance that a run of the winner is better "
        "than one of it; p that of the exact sign-flip test against the winner, after Holm. The bar tells whose "
        "median leads at each smaller budget, on a logarithmic scale; a few seeds more may move where it changes."
    ]


_FAIRNESS = "What is unfair here, or says less than it seems to"


def _rule(finding: Finding) -> str:
    return f"{finding.code} {finding.rule}"


def _found(finding: Finding) -> str:
    return f"{finding.found}. {finding.remedy}"


def _unfinished(results: Results) -> list[tuple[str, str, str]]:
    """The runs that diverged or failed, gathered by method, phase and fate, with two reasons at most."""
    gathered: dict[tuple[str, str, str], list[TrialRecord]] = {}
    for trial in results.trials:
        if trial.status != "finished":
            gathered.setdefault((trial.method, trial.phase, trial.status), []).append(trial)
    lines = []
    for (method, phase, status), runs in gathered.items():
        at = listed([rate(lr) for lr in sorted({run.lr for run in runs})])
        kind = {"tune": "tuning run", "confirm": "confirming run"}.get(phase, "final run")
        reasons = list(dict.fromkeys(run.reason or "no reason was recorded" for run in runs))
        rest = [f"{len(reasons) - 2} more"] * (len(reasons) > 2)
        why = "; ".join([*reasons[:2], *rest])
        lines.append((method, f"{count(len(runs), kind)} {status} at lr {at}", why))
    return lines


def _footer(results: Results) -> str:
    runs, costs = count(len(results.trials), "run"), count(len(results.costs), "cost measurement")
    text = f"Made from {runs} and {costs}."
    if results.torn:
        were = "was" if results.torn == 1 else "were"
        text += f" {count(results.torn, 'line')} of records.jsonl could not be read and {were} skipped."
    return text
