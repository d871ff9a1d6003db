"""`gradcost reproduce`: repeat the experiments of a paper, and show which of its numbers are reproduced."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from pathlib import Path

from gradcost.cli import console, reproduce_panchal2025, spec
from gradcost.cli.options import ReproduceOptions
from gradcost.cli.progress import RESUME, EventPrinter
from gradcost.core.errors import BadInput
from gradcost.papers.panchal2025 import methods
from gradcost.papers.rike2022 import page as rike2022_page
from gradcost.papers.rike2022 import study as rike2022_study
from gradcost.papers.rike2022 import table as rike2022
from gradcost.papers.rike2022.verdicts import is_published_setup, row_results
from gradcost.results.records import Results, read
from gradcost.studies.run import RUNS, run_study
from gradcost.tasks import TASKS

PAPERS = {"rike2022": rike2022.TITLE, "panchal2025": methods.TITLE}


def reproduce_paper(options: ReproduceOptions) -> int:
    """Run or resume the rows of a paper, print a verdict on each number, and return the exit code."""
    if options.paper not in PAPERS:
        raise BadInput(
            f"there is no paper {options.paper!r}.{spec.hint(options.paper, PAPERS)} Papers: {', '.join(PAPERS)}."
        )
    if options.paper == "panchal2025":
        return reproduce_panchal2025.reproduce(options)
    options = dataclasses.replace(
        options, rows=options.rows or "nn", task=options.task or "mnist", seeds=options.seeds or 1
    )
    return _reproduce_rike2022(options)


def _reproduce_rike2022(options: ReproduceOptions) -> int:
    assert options.rows is not None
    reproduction = _reproduction(options)
    executor = spec.executor(options.executor, options.workers)
    folder = options.output or RUNS / f"{options.paper}-{options.rows}"
    if options.dry_run:
        _show_dry_run(reproduction)
        return 0
    with EventPrinter() as printer:
        if not options.records:
            run = {"executor": executor, "every": options.every, "measure": False, "on_event": printer}
            for _ in run_study(reproduction.study, folder, **run):
                pass
    results, table = read(folder), rike2022.rows(options.rows)
    if options.page is not None:
        options.page.parent.mkdir(parents=True, exist_ok=True)
        options.page.write_text(rike2022_page.page(results, table, _command(options)), encoding="utf-8")
    _show(results, table, folder, printer.ran, options)
    return 1 if printer.failed else 0


def _reproduction(options: ReproduceOptions) -> rike2022_study.Reproduction:
    models = rike2022_study.MODELS
    assert options.rows is not None
    assert options.task is not None
    assert options.seeds is not None
    if options.rows not in models:
        raise BadInput(
            f"the rows {options.rows!r} cannot be run.{spec.hint(options.rows, models)} Rows: {', '.join(models)}; "
            "the CNN rows would take days on a CPU."
        )
    if options.task not in TASKS:
        raise BadInput(
            f"there is no task {options.task!r}.{spec.hint(options.task, TASKS)} Tasks: {', '.join(TASKS)}."
        )
    tuning = rike2022_study.Tuning(options.tuning_points, epochs=options.tuned_epochs) if options.tuned else None
    task = TASKS[options.task](model=models[options.rows], batch=rike2022.BATCH)  # type: ignore[call-arg]
    return rike2022_study.Reproduction(options.rows, options.epochs, options.seeds, tuning, task)


def _command(options: ReproduceOptions) -> str:
    """Return the command that writes the page."""
    words = ["gradcost", "reproduce", options.paper, "--rows", options.rows or "nn"]
    words += ["--epochs", f"{options.epochs:g}", "--seeds", str(options.seeds)]
    if options.task is not None and options.task != "mnist":
        words += ["--task", options.task]
    if options.tuned:
        words += ["--tuned", "--tuning-points", str(options.tuning_points)]
        if options.tuned_epochs is not None:
            words += ["--tuned-epochs", f"{options.tuned_epochs:g}"]
    assert options.page is not None
    return shlex.join([*words, "--page", options.page.name])


def _show_dry_run(reproduction: rike2022_study.Reproduction) -> None:
    stage = next(reproduction.study.trials())
    console.show(f"{reproduction.study.question}: {len(stage)} runs of {reproduction.steps:,} steps.")
    if (tuning := reproduction.tuning) is not None:
        runs = len(rike2022.rows(reproduction.model)) * (tuning.points + tuning.more + reproduction.seeds)
        console.show(f"Then the same rows with equal tuning: {runs} more.")
    rows = [[trial.method, repr(trial.estimator), repr(trial.optimizer), str(trial.seed)] for trial in stage]
    console.show_table(["row", "gradient", "optimizer", "seed"], rows, left=True)


def _show(
    results: Results, table: tuple[rike2022.TableRow, ...], folder: Path, ran: int, options: ReproduceOptions
) -> None:
    published = is_published_setup(results, table)
    parts = [
        ("as published", row_results(results, table), published),
        ("tuned alike", row_results(results, table, rike2022.TUNED_SUFFIX), False),  # the paper has no such runs
    ]
    tables = [
        (part, rike2022_page.table_rows(rows, has_verdicts))
        for part, rows, has_verdicts in parts
        if any(row.runs for row in rows)
    ]
    if options.as_json:
        by_part = {
            part: [dict(zip(rike2022_page.HEADERS, row, strict=True)) for row in rows] for part, rows in tables
        }
        print(json.dumps({"folder": str(folder), "ran": ran, "published": published, "rows": by_part}, indent=2))
        return
    for part, rows in tables:
        console.show(part, bold=True)
        console.show_table(list(rike2022_page.HEADERS), rows)
    if not published:
        console.show("No verdicts: these runs use another task or another number of epochs than the paper.")
    if options.page is not None:
        console.show(f"page     {os.fspath(options.page)}")
    console.show(RESUME)
