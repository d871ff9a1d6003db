"""`gradcost reproduce baydin2022`: run the study of Baydin et al. (2022), and print the verdict on each claim."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from gradcost.cli import console, spec
from gradcost.cli.progress import RESUME, EventPrinter
from gradcost.cli.reproduce_options import ReproduceOptions
from gradcost.cli.reproduction import other_task, run_or_resume, with_file, write_page
from gradcost.core.errors import BadInput
from gradcost.core.files import locked
from gradcost.core.units import count, number
from gradcost.papers.baydin2022 import page as pages
from gradcost.papers.baydin2022 import speed
from gradcost.papers.baydin2022.claims import claims
from gradcost.papers.baydin2022.study import MODELS, POINTS, Reproduction, task_of
from gradcost.papers.claims import measured, outcome
from gradcost.results.records import read
from gradcost.studies.run import RUNS, open_study
from gradcost.tasks import placed


def reproduce_baydin2022(options: ReproduceOptions) -> int:
    """Run or resume the study, print the verdicts, and return the exit code."""
    reproduction, file = _reproduction(options)
    study = with_file(reproduction.study, file)
    folder = options.output or RUNS / f"{options.paper}-{_rows(options)}"
    if options.dry_run:
        _show_dry_run(reproduction, options.as_json)
        return 0
    if options.times_only:
        open_study(study.on(options.device), folder)
        printer = EventPrinter()
    else:
        printer = run_or_resume(study, folder, options)
    if not options.records and not printer.failed:
        task = placed(reproduction.training_task, options.device)
        with locked(folder):
            for times in speed.time_seeds(task, folder, _seeds(options)):
                console.say(f"paired times of seed {times.seed}: forward / backprop {times.ratio:.2f}")
    _show(folder, printer.ran, options, _command(options, reproduction))
    return 1 if printer.failed else 0


def _reproduction(options: ReproduceOptions) -> tuple[Reproduction, str | None]:
    """Return the settings of the study, and the user's file that defines the task or None."""
    if _rows(options) not in MODELS:
        raise BadInput(
            f"there are no rows {_rows(options)!r}.{spec.hint(_rows(options), MODELS)} Rows: {', '.join(MODELS)}."
        )
    if options.epochs is not None or options.tuned_epochs is not None:
        raise BadInput("baydin2022 counts steps: write --steps 20000 instead of --epochs, or --tuned-steps.")
    task, file = other_task(options, lambda data: task_of(_rows(options), data))
    reproduction = Reproduction(
        rows=_rows(options),
        steps=options.steps,
        seeds=_seeds(options),
        is_tuned=options.tuned,
        points=POINTS if options.tuning_points is None else options.tuning_points,
        tuned_steps=options.tuned_steps,
        task=task,
    )
    if options.times_only and options.records:
        raise BadInput("--times-only times the steps now and --records runs nothing: choose one.")
    return reproduction, file


def _command(options: ReproduceOptions, reproduction: Reproduction) -> str:
    """Return the command that writes the page."""
    words = ["gradcost", "reproduce", options.paper, "--rows", _rows(options), "--steps", str(reproduction.length)]
    words += ["--seeds", str(_seeds(options))]
    if options.tuned:
        words += ["--tuned", "--tuning-points", str(reproduction.points)]
    if reproduction.tuned_length != reproduction.length:
        words += ["--tuned-steps", str(reproduction.tuned_length)]
    words += ["--device", options.device] if options.device is not None else []
    words += ["--times-only"] if options.times_only else []
    words += ["--task", options.task] if options.task not in (None, "mnist") else []
    return shlex.join([*words, "--page", options.page.name] if options.page is not None else words)


def _show_dry_run(reproduction: Reproduction, as_json: bool) -> None:
    trials, counts = reproduction.shared_trials(), reproduction.run_counts()
    whats = ("the shared rate", "tuning", "the tuned rate")
    headers = ("method", "gradient", "optimizer", "seed")
    rows = [[trial.method, repr(trial.estimator), repr(trial.optimizer), str(trial.seed)] for trial in trials]
    hours = reproduction.hours()
    if as_json:
        parts = [
            {"rate": what, "runs": runs, "steps": steps}
            for (runs, steps, _), what in zip(counts, whats, strict=False)
        ]
        shared = [dict(zip(headers, row, strict=True)) for row in rows]
        console.print_json({"hours": hours, "runs of each gradient": parts, "runs at the shared rate": shared})
        return
    console.show(f"{reproduction.study.question}.")
    for (runs, steps, _), what in zip(counts, whats, strict=False):
        console.show(f"Each gradient, {what}: {count(runs, 'run')} of {count(steps, 'step')}.")
    console.show_table(headers, rows, left=True)
    console.show(f"All runs together take about {number(hours, 2)} hours of one core, from a few steps timed now.")


def _show(folder: Path, ran: int, options: ReproduceOptions, command: str) -> None:
    results, times = read(folder), speed.recorded(folder)
    if options.page is not None:
        write_page(options.page, pages.page(results, times, _rows(options), command, f"`{folder.name}`"))
    listed = list(claims(results, times, _rows(options), command, folder.name))
    headers = ["claim", "published", "measured", "verdict"]
    lines = [[c.name, str(c.published), measured(c, e), outcome(c, e)] for c, e in listed]
    rows = pages.run_rows(results, times, _rows(options))
    if options.as_json:
        found = {
            "runs": [dict(zip(pages.HEADERS, row, strict=True)) for row in rows],
            "claims": [dict(zip(headers, line, strict=True)) for line in lines],
        }
        console.print_json({"folder": str(folder), "ran": ran, **found})
        return
    console.show_table(list(pages.HEADERS), rows)
    console.show_table(headers, lines, left=True)
    if options.page is not None:
        console.show(f"page     {os.fspath(options.page)}")
    console.show(RESUME)


def _rows(options: ReproduceOptions) -> str:
    return options.rows or "nn"


def _seeds(options: ReproduceOptions) -> int:
    return options.seeds or 1
