"""`gradcost reproduce`: a published comparison again, and what became of its numbers."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

from gradcost.cli import console, spec
from gradcost.cli.study import conducted, open_folder
from gradcost.core.errors import BadInput
from gradcost.papers.rike2022 import last_batch
from gradcost.papers.rike2022 import page as rike2022_page
from gradcost.papers.rike2022 import study as rike2022_study
from gradcost.papers.rike2022 import table as rike2022
from gradcost.papers.rike2022.verdicts import as_published, cells
from gradcost.results.records import Results, read
from gradcost.studies.environment import fingerprint
from gradcost.studies.executors import Local, Work
from gradcost.studies.study import alone
from gradcost.tasks import TASKS

PAPERS = {"rike2022": rike2022.TITLE}


def reproduce_paper(
    paper: str,
    rows: str,
    epochs: float,
    seeds: int,
    tuned: bool,
    points: int,
    tuned_epochs: float | None,
    task: str,
    workers: int,
    output: Path | None,
    page: Path | None,
    every: float,
    as_json: bool,
    dry_run: bool,
    only_tell: bool,
) -> int:
    """Run or resume the rows of a paper and say what became of them. Returns the exit code."""
    if paper not in PAPERS:
        raise BadInput(f"no paper {paper!r}.{spec.hint(paper, PAPERS)} Papers: {', '.join(PAPERS)}.")
    tuning = rike2022_study.Tuning(points, epochs=tuned_epochs) if tuned else None
    asked = _asked(rows, epochs, seeds, tuning, task)
    folder = output or Path("gradcost-runs") / f"{paper}-{rows}"
    failed, ran = 0, 0
    if dry_run:
        return _plan(asked)
    if not only_tell:
        work = Work(fingerprint(last_batch.__file__), folder, every=every)
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            open_folder(folder, asked.study, work)
            done = conducted(asked.study, Local(workers), work)
            failed, ran = done.failed, done.ran
    results = read(folder)
    table = rike2022.rows(rows)
    if page is not None:
        again = ["gradcost", "reproduce", paper, "--rows", rows, "--epochs", f"{epochs:g}", "--seeds", str(seeds)]
        again += ["--task", task] if task != "mnist" else []
        again += ["--tuned", "--points", str(points)] if tuned else []
        again += ["--tuned-epochs", f"{tuned_epochs:g}"] if tuned and tuned_epochs is not None else []
        command = shlex.join([*again, "--page", page.name])
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(rike2022_page.page(results, table, command), encoding="utf-8")
    if failed:
        console.complain(f"{failed} runs failed; their tracebacks are in {folder}/records.jsonl. Again to retry.")
    _tell(results, table, folder, ran, page, as_json)
    return 1 if failed else 0


def _asked(
    rows: str, epochs: float, seeds: int, tuning: rike2022_study.Tuning | None, task: str
) -> rike2022_study.Reproduction:
    models = rike2022_study.MODELS
    if rows not in models:
        raise BadInput(
            f"no rows {rows!r} to run.{spec.hint(rows, models)} Rows: {', '.join(models)}; the CNN's are in the "
            "table as data, and take days on a CPU."
        )
    if task not in TASKS:
        raise BadInput(f"no task {task!r}.{spec.hint(task, TASKS)} Tasks: {', '.join(TASKS)}.")
    on = TASKS[task](model=models[rows], batch=rike2022.BATCH)  # type: ignore[call-arg]  # as every task's fields are
    return rike2022_study.Reproduction(rows, epochs, seeds, tuning, on)


def _plan(asked: rike2022_study.Reproduction) -> int:
    stage = next(asked.study.trials())
    console.show(f"{asked.study.question}: {len(stage)} runs of {asked.steps:,} steps.")
    if asked.tuning is not None:
        runs = len(rike2022.rows(asked.model)) * (asked.tuning.points + asked.tuning.more + asked.seeds)
        console.show(f"Then the same rows tuned alike: {runs} more.")
    told = [[trial.method, repr(trial.estimator), repr(trial.optimizer), str(trial.seed)] for trial in stage]
    console.show_table(["row", "gradient", "optimizer", "seed"], told, left=True)
    return 0


def _tell(
    results: Results, table: tuple[rike2022.Row, ...], folder: Path, ran: int, page: Path | None, as_json: bool
) -> None:
    published = as_published(results, table)
    found = [
        ("as published", cells(results, table), published),
        ("tuned alike", cells(results, table, rike2022.TUNED), False),  # the paper says nothing of these
    ]
    told = [(part, rike2022_page.rows_of(some, judged)) for part, some, judged in found if any(c.runs for c in some)]
    if as_json:
        named = {part: [dict(zip(rike2022_page.HEADERS, row, strict=True)) for row in lines] for part, lines in told}
        print(json.dumps({"folder": str(folder), "ran": ran, "published": published, "rows": named}, indent=2))
        return
    for part, lines in told:
        console.show(part, bold=True)
        console.show_table(list(rike2022_page.HEADERS), lines)
    if not published:
        console.show("No verdicts: another task, fewer epochs than published, or not all of the runs.")
    if page is not None:
        console.show(f"page     {os.fspath(page)}")
    console.show("again    the same command goes on where it stopped; nothing is run twice")
