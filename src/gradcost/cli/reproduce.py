"""`gradcost reproduce`: repeat the experiments of a paper, and show which of its numbers are reproduced."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from gradcost.cli import console, reproduce_panchal2025, spec
from gradcost.cli.progress import RESUME
from gradcost.cli.reproduce_baydin import reproduce_baydin2022
from gradcost.cli.reproduce_options import ReproduceOptions
from gradcost.cli.reproduction import other_task, refuse_options_of_other_papers, run_or_resume, with_file, write_page
from gradcost.core.errors import BadInput, MissingExtra
from gradcost.core.units import number
from gradcost.papers.baydin2022 import table as baydin2022
from gradcost.papers.claims import outcome
from gradcost.papers.panchal2025 import methods
from gradcost.papers.rike2022 import page as rike2022_page
from gradcost.papers.rike2022 import study as rike2022_study
from gradcost.papers.rike2022 import table as rike2022
from gradcost.papers.rike2022.claims import claims
from gradcost.papers.rike2022.picture import loss_curves
from gradcost.papers.rike2022.protocols import PROTOCOLS
from gradcost.papers.rike2022.runs import is_published_setup, row_results
from gradcost.report import assets
from gradcost.results.records import Results, read
from gradcost.studies.run import RUNS
from gradcost.tasks.placed import require_device

PAPERS = {"rike2022": rike2022.TITLE, "baydin2022": baydin2022.TITLE, "panchal2025": methods.TITLE}
ROWS = "nn"  # of rike2022, by default


def reproduce_paper(options: ReproduceOptions) -> int:
    """Run or resume the rows of a paper, print the verdict on each claim, and return the exit code."""
    if options.paper not in PAPERS:
        raise BadInput(
            f"there is no paper {options.paper!r}.{spec.hint(options.paper, PAPERS)} Papers: {', '.join(PAPERS)}."
        )
    refuse_options_of_other_papers(options)
    if not options.records:
        require_device(options.device)
    if options.paper == "baydin2022":
        return reproduce_baydin2022(options)
    if options.paper == "panchal2025":
        return reproduce_panchal2025.reproduce(options)
    return _reproduce_rike2022(options)


def _reproduce_rike2022(options: ReproduceOptions) -> int:
    reproduction, file = _reproduction(options)
    if options.dry_run:
        _show_dry_run(reproduction, options.as_json)
        return 0
    folder = options.output or _default_folder(options)
    if (folder / "study.json").exists():
        reproduction.require_one_tuned_length(read(folder).trials)
    printer = run_or_resume(with_file(reproduction.study, file), folder, options)
    results, table = read(folder), rike2022.rows(options.rows or ROWS)
    if options.page is not None:
        _write_page_and_picture(options.page, results, table, _command(options), folder.name)
    _show(results, table, folder, printer.ran, options)
    return 1 if printer.failed else 0


def _write_page_and_picture(
    page: Path, results: Results, table: Sequence[rike2022.TableRow], command: str, folder: str
) -> None:
    """Write the page and, where gradcost[report] is installed, its picture beside it."""
    picture, spec = page.with_suffix(".svg"), loss_curves(results, table)
    try:
        drawn = None if spec is None else assets.svg(spec)
    except MissingExtra as error:
        drawn = None
        console.complain(f"the page has no picture: {error}")
    if drawn is not None:
        write_page(picture, drawn)
    write_page(page, rike2022_page.page(results, table, command, folder, picture.name if drawn else None))


def _default_folder(options: ReproduceOptions) -> Path:
    return RUNS / f"{options.paper}-{options.rows or ROWS}{'' if options.protocol == 'paper' else '-as-run'}"


def _reproduction(options: ReproduceOptions) -> tuple[rike2022_study.Reproduction, str | None]:
    """Return the settings of the study, and the user's file that defines the task or None."""
    rows = options.rows or ROWS
    for option, name, known in (
        ("rows", rows, rike2022_study.MODELS),
        ("protocol", options.protocol, PROTOCOLS),
    ):
        if name not in known:
            raise BadInput(
                f"--{option} {name} is not known.{spec.hint(name, known)} Choose from: {', '.join(known)}."
            )
    if options.steps is not None or options.tuned_steps is not None:
        raise BadInput("rike2022 counts epochs: write --epochs or --tuned-epochs, not --steps or --tuned-steps.")
    task, file = other_task(options, lambda data: rike2022_study.task_of(rows, data))
    reproduction = rike2022_study.Reproduction(
        group=rows,
        epochs=_epochs(options),
        seeds=options.seeds or 1,
        protocol=PROTOCOLS[options.protocol],
        tuning=rike2022_study.Tuning(_points(options), epochs=options.tuned_epochs) if options.tuned else None,
        uncapped=options.uncapped,
        points=options.points,
        task=task or rike2022_study.task_of(rows),
    )
    return reproduction, file


def _epochs(options: ReproduceOptions) -> float:
    return float(rike2022.rows(options.rows or ROWS)[0].epochs) if options.epochs is None else options.epochs


def _points(options: ReproduceOptions) -> int:
    return rike2022_study.Tuning.points if options.tuning_points is None else options.tuning_points


def _command(options: ReproduceOptions) -> str:
    """Return the command that writes the page."""
    words = ["gradcost", "reproduce", options.paper, "--rows", options.rows or ROWS, "--protocol", options.protocol]
    words += ["--epochs", f"{_epochs(options):g}", "--seeds", str(options.seeds or 1)]
    words += ["--task", options.task] if options.task is not None else []
    words += ["--device", options.device] if options.device is not None else []
    words += ["--uncapped"] if options.uncapped else []
    words += ["--points", str(options.points)] if options.points != ReproduceOptions.points else []
    if options.tuned:
        words += ["--tuned", "--tuning-points", str(_points(options))]
        if options.tuned_epochs is not None:
            words += ["--tuned-epochs", f"{options.tuned_epochs:g}"]
    assert options.page is not None
    return shlex.join([*words, "--page", options.page.name])


def _show_dry_run(reproduction: rike2022_study.Reproduction, as_json: bool) -> None:
    stage = reproduction.first_stage()
    further = sum(runs for _, runs, _ in reproduction.further_runs())
    headers = ("row", "gradient", "optimizer", "seed")
    rows = [[trial.method, repr(trial.estimator), repr(trial.optimizer), str(trial.seed)] for trial in stage]
    hours = reproduction.hours()
    if as_json:
        runs = [dict(zip(headers, row, strict=True)) for row in rows]
        console.print_json({"steps": reproduction.steps, "further runs": further, "hours": hours, "runs": runs})
        return
    console.show(f"{reproduction.study.question}: {len(stage)} runs of {reproduction.steps:,} steps.")
    if further:
        console.show(f"Then the same rows with equal tuning: {further} more.")
    console.show_table(headers, rows, left=True)
    console.show(f"All runs together take about {number(hours, 2)} hours of one core, from a few steps timed now.")


def _show(
    results: Results, table: tuple[rike2022.TableRow, ...], folder: Path, ran: int, options: ReproduceOptions
) -> None:
    published = is_published_setup(results, table)
    parts = {
        "as published": row_results(results, table),
        "tuned alike": row_results(results, table, rike2022.TUNED_SUFFIX),
    }
    tables = {
        part: rike2022_page.table_rows(rows, part == "as published" and published)
        for part, rows in parts.items()
        if any(row.runs for row in rows)
    }
    found = [[claim.name, outcome(claim, shown)] for claim, shown in claims(results, table, "-", folder.name)]
    if options.as_json:
        headers = rike2022_page.HEADERS
        by_part = {part: [dict(zip(headers, row, strict=True)) for row in rows] for part, rows in tables.items()}
        shown = {"folder": str(folder), "ran": ran, "published": published, "rows": by_part, "claims": dict(found)}
        console.print_json(shown)
        return
    for part, rows in tables.items():
        console.show(part, bold=True)
        console.show_table(list(rike2022_page.HEADERS), rows)
    console.show_table(["claim", "verdict"], found, left=True)
    if not published:
        console.show("These runs use another task, another net or another number of epochs than the paper.")
    if options.page is not None:
        console.show(f"page     {os.fspath(options.page)}")
    console.show(RESUME)
