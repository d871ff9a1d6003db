"""The report as one HTML file: verdict, rankings, tables, figures, tuning and machine. Needs gradcost[report]."""

from __future__ import annotations

from math import inf, isfinite
from pathlib import Path
from typing import Any

from gradcost.core.files import write_chosen
from gradcost.report import series, tables, targets
from gradcost.report.answer import answer
from gradcost.report.budgets import panels, strip
from gradcost.report.families import families, twins
from gradcost.report.figures import figures
from gradcost.report.pages import by_family, cell, rendered
from gradcost.report.quality import pictures
from gradcost.report.theme import Figure, intervals, protocol, study_marks
from gradcost.results import ledger
from gradcost.results.facts import facts
from gradcost.results.guessing import guess_of
from gradcost.results.lint import Finding, lint
from gradcost.results.records import Results, TrialRecord, read
from gradcost.results.summary import MethodSummary, summarise
from gradcost.results.tuning import final_steps
from gradcost.results.verdict import certainty, choose, is_sure, sentences
from gradcost.results.wording import count, listed, rate, size


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
    drawn = {figure.name: figure for figure in [*figures(results), *pictures(results)]}
    shown = [_switched(name, drawn[name], axis) for name, axis in _PICTURES.items() if name in drawn]
    if len({row["probes"] for row in series.estimates(results, "cosine")[0]}) < 2:  # all marks above one number
        drawn = {name: figure for name, figure in drawn.items() if name not in ("estimate-cosine", "estimate-error")}
    groups = {key: [drawn[name] for name in names if name in drawn] for key, names in _GROUPS.items()}
    lists = _lists(results)
    audit, ranked, reached = tables.audit(results), panels(results), targets.sections(results)
    known = certainty(results)
    filled = {"certainty": ranked or reached or known, "tuning": audit.rows or groups["tuning"], "where": True}
    filled |= {"unfair": any(lines for *_, lines in lists)} | {k: groups[k] for k in ("time", "cost", "estimates")}
    used = [*(drawn[each["name"]] for each in shown), *(figure for group in groups.values() for figure in group)]
    return rendered(
        "report.html.j2",
        used,
        answer(results),
        title=f"{study.task_name} / {study.model_name}",
        reload=reload,
        facts=[*_facts(results), *([] if reload is None else [f"still running, reloaded every {reload} s"])],
        sentences=sentences(results),
        certainty=known,
        pictures=shown,
        picture_title="Quality against cost",
        groups=groups,
        folds={key: heading for key, heading in _FOLDS.items() if filled[key]},
        targets=reached,
        target_note=targets.note(results),
        panels=ranked,
        panel_notes=_panel_notes(results),
        picked=choice.row.method if choice and is_sure(results) else None,
        marks=study_marks(results),
        entries=_entries(results),
        decision=_decision(results, rows),
        notes=_notes(results, rows),
        audit=audit,
        lists=lists,
        environment=results.environment,
        footer=_footer(results),
    )


# Figures of the picture and the words of its switch. Each fold: its heading, and its figures.
_PICTURES = {
    "accuracy-memory": "memory",
    "quality-flops": "FLOPs",
    "quality-seconds": "seconds",
    "quality-steps": "steps",
}
_FOLDS = {
    "certainty": "How sure is this?",
    "time": "What did each method do over time?",
    "cost": "What does a step cost, and why?",
    "estimates": "How good are the estimates?",
    "tuning": "How was each method tuned?",
    "unfair": "What is unfair here, or not finished?",
    "where": "Where and how did it run?",
}
_GROUPS = {
    "time": ("validation-loss", "training-loss", "time-to-target"),
    "cost": ("memory", "forwards", "milliseconds"),
    "estimates": ("estimate-cosine", "estimate-error", "slope-spikes"),
    "tuning": ("tuning", "tuning-points"),
}


def _switched(name: str, figure: Figure, axis: str) -> dict[str, str]:
    return {"name": name, "title": figure.title, "caption": figure.caption, "axis": axis}


def _entries(results: Results) -> list[list[str]]:
    """Return the entries of the legend: methods whose runs are identical share one."""
    entries: dict[str, list[str]] = {}
    for method, first in twins(results).items():
        entries.setdefault(first, []).append(method)
    return list(entries.values())


def _lists(results: Results) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    findings = lint(facts(results))
    return [
        (_FAIRNESS, ("method", "rule", "finding"), [(f.method, _rule(f), _finding(f)) for f in findings]),
        ("Refused methods", ("method", "reason"), [(r.method, r.reason) for r in results.refused]),
        ("Runs that did not finish", ("method", "runs", "reason"), _unfinished(results)),
    ]


def _facts(results: Results) -> list[str]:
    study = results.study
    facts = [study.task]
    if study.weights is not None:
        facts.append(f"{study.weights:,} weights, {size(study.weights_bytes)}")
    facts.append(count(len(study.seeds), "seed"))
    facts.append(f"{count(study.points, 'tuning point')} per method")
    facts.append(final_steps(results) + ("" if study.batch is None else f" of batch {study.batch}"))
    facts.append(study.optimizer)
    facts += [str(results.environment[name]) for name in ("gpu", "cpu", "started") if name in results.environment]
    if study.memory is not None:
        facts.append(f"budget {size(study.memory)} beyond the weights")
    return facts


def _decision(results: Results, rows: list[MethodSummary]) -> dict[str, Any]:
    """Return the table: each family's best method first, then its other members, which the page folds in."""
    columns, lines = tables.table(results)
    most = max((row.peak_bytes or 0 for row in rows), default=0)
    made, kinds = [], families(results)
    for row, line in zip(rows, lines, strict=True):
        cells = dict(zip(columns[1:], (cell(*pair) for pair in zip(columns[1:], line[1:], strict=True)), strict=True))
        for name, value in zip(columns[1:], _sort_keys(row, len(columns)), strict=True):
            cells[name]["value"] = "" if value is None or not isfinite(value) else f"{value:.8g}"
        if row.accuracy:
            cells[columns[1]]["strip"] = strip(row.accuracy, row.accuracies)
        if row.peak_bytes:
            cells["beyond weights"]["bar"] = f"{100 * row.peak_bytes / most:.1f}"
        cells["beyond weights"]["warn"] = row.fits is False
        cells["diverged"]["warn"] = row.diverged > 0
        cells["lr"]["warn"] = row.edge is not None
        made.append({"method": row.method, "cells": list(cells.values()), "family": kinds[row.method]})
    scores = {row.method: -inf if row.score is None else row.score.median for row in rows}
    ordered = by_family(made, lambda line: -scores[line["method"]])
    return {"title": "Cost and accuracy of each method", "columns": columns, "rows": ordered}


def _sort_keys(row: MethodSummary, columns: int) -> list[float | None]:
    """Return the numbers by which the columns of the table are sorted, in the order of `tables.table`."""
    score, loss = (None if x is None else x.median for x in (row.score, row.loss))
    rest = [row.peak_bytes, row.forwards, row.ms, row.steps_to_target, row.diverged, row.lr]
    return [score, *([loss] if columns == len(rest) + 3 else []), *rest]


def _notes(results: Results, rows: list[MethodSummary]) -> list[str]:
    target = tables.target(results.study)
    notes = [
        f"Each number is the median over seeds; brackets are {intervals(results)}. A diverged run is the worst "
        "result. “beyond weights” is the peak memory of a step, without weights, buffers and batch. The strip "
        f"under an accuracy runs from 0 to 100%, with a dot per seed. “{target}” is the step of the first "
        f"evaluation with at least this validation {results.study.metric.name}: the median over the seeds that "
        "reach it. Its seconds are these steps times the milliseconds of a step."
    ]
    guess = guess_of(results.study)
    if guess is not None:
        notes[0] += f" {guess.text.capitalize()}."
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
