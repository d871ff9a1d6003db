"""`gradcost compare`: parse the options, run the comparison, print the recommendation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NoReturn

from gradcost.cli import console, spec
from gradcost.cli.options import CompareOptions
from gradcost.cli.progress import RESUME, EventPrinter
from gradcost.core.units import size
from gradcost.planning.forecast import Forecast
from gradcost.report import html, tables
from gradcost.results import recommendation, summary
from gradcost.results.records import Results, read
from gradcost.studies.compare import forecast_comparison, run_comparison
from gradcost.studies.comparison import Comparison, make_comparison

NOTHING_RUNS = 4  # exit code: no method can run, or none fits the budget


def compare_methods(options: CompareOptions) -> int:
    """Run or resume a comparison, print its result, and return the exit code."""
    task, task_name, model_name, file = spec.task(options.task, options.model)
    comparison = make_comparison(
        task,
        None if not options.method else [(text.strip(), spec.method(text)) for text in options.method],
        steps=options.steps,
        seeds=options.seeds,
        tuning_points=options.tuning_points,
        extra_points=options.extra_points,
        confirm_seeds=options.confirm_seeds,
        lr_range=spec.lr_range(options.lr_range),
        target=options.target,
        memory_beyond_weights=spec.size(options.memory) if options.memory else None,
        file=file,
    )
    executor = spec.executor(options.executor, options.workers)
    names = {"task": task_name, "model": model_name}
    with EventPrinter() as printer:
        if options.dry_run:
            started, forecasts, _ = forecast_comparison(comparison, options.output, on_event=printer, **names)
            _show_dry_run(comparison, forecasts, started.folder)
            return 0 if forecasts else NOTHING_RUNS
        try:
            settings = {"executor": executor, "every": options.every, "trial_timeout": options.trial_timeout}
            results = run_comparison(comparison, options.output, **settings, on_event=printer, **names)
        except KeyboardInterrupt:
            _exit_interrupted(printer)
    assert printer.folder is not None
    _show(results, printer.folder, options.as_json)
    if printer.failed:
        return 1
    return NOTHING_RUNS if len(results.refused) == len(comparison.methods) else 0


def _exit_interrupted(printer: EventPrinter) -> NoReturn:
    """Print the number of finished trials and exit with code 130.

    If the results folder is not complete yet, raise KeyboardInterrupt again.
    """
    if printer.folder is None or not (printer.folder / "study.json").exists():
        raise KeyboardInterrupt
    printer.close()
    done = sum(trial.status != "failed" for trial in read(printer.folder).trials)
    console.complain(f"interrupted. {printer.folder} has {done} finished trials; the same command resumes.")
    console.abandon(130)


def _show_dry_run(comparison: Comparison, forecasts: dict[str, Forecast], folder: Path) -> None:
    count = len(forecasts) * comparison.trials
    console.show(
        f"{count} trials of {comparison.steps:,} steps would run and be recorded in {folder}. Cost of one step:"
    )
    rows = [
        [label, size(cost.beyond), f"{cost.forwards:.2f}", str(cost.matmuls)] for label, cost in forecasts.items()
    ]
    console.show_table(["method", "beyond weights", "forwards", "matmuls"], rows)


def _show(results: Results, folder: Path, as_json: bool) -> None:
    try:
        report = html.write(folder)
    except ImportError as error:
        report = None
        console.complain(str(error))
    if as_json:
        rows = [summary.plain(row) for row in summary.summarise(results)]
        refused = [dataclasses.asdict(refusal) for refusal in results.refused]
        answer = {"verdict": recommendation.verdict(results), "rows": rows, "refused": refused, "folder": str(folder)}
        print(json.dumps(answer, indent=2, default=str))
        return
    console.show()
    console.show(recommendation.verdict(results), bold=True)
    console.show()
    table = tables.table(results)
    console.show_table(table.columns, table.rows)
    for refusal in results.refused:
        console.show(f"{refusal.method}: {refusal.reason}")
    for cost in results.costs:
        if cost.doubt is not None:  # "~" marks a timing that is not reliable, also in the table
            console.show(f"~ {cost.method}: {cost.doubt}.")
    console.show()
    if report is not None:
        console.show(f"report   {report}")
    console.show(RESUME)
