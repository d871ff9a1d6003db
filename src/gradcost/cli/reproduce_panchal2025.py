"""`gradcost reproduce panchal2025`: train with the methods of the paper, at equal FLOPs and equal tuning."""

from __future__ import annotations

import dataclasses
import json
from statistics import median

from gradcost.cli import console, spec
from gradcost.cli.options import ReproduceOptions
from gradcost.cli.progress import RESUME, EventPrinter
from gradcost.core.errors import BadInput
from gradcost.papers.panchal2025.study import DISTINCT, Reproduction, forward_seconds
from gradcost.results.records import Results, read
from gradcost.results.tuning import finals
from gradcost.studies.run import RUNS, run_study

HEADERS = ("method", "forwards per step", "steps", "learning rate", "test accuracy", "step at the target")


def reproduce(options: ReproduceOptions) -> int:
    """Run or resume the study of the paper, show the results of each method, and return the exit code."""
    if options.page is not None or options.tuned:
        option = "--page" if options.page is not None else "--tuned"
        raise BadInput(f"panchal2025 has no {option}: all its runs are tuned, and `gradcost report` shows them.")
    reproduction, file = _reproduction(options)
    if options.dry_run:
        _show_dry_run(reproduction, options)
        return 0
    study = dataclasses.replace(reproduction.study, file=file or reproduction.study.file)
    folder = options.output or RUNS / options.paper
    executor = spec.executor(options.executor, options.workers)
    with EventPrinter() as printer:
        if not options.records:
            for _ in run_study(study, folder, executor=executor, every=options.every, on_event=printer):
                pass
    rows = _rows(reproduction, read(folder))
    if options.as_json:
        answers = [dict(zip(HEADERS, row, strict=True)) for row in rows]
        print(json.dumps({"folder": str(folder), "ran": printer.ran, "rows": answers}, indent=2))
    else:
        console.show_table(list(HEADERS), rows)
        console.show(RESUME)
    return 1 if printer.failed else 0


def _reproduction(options: ReproduceOptions) -> tuple[Reproduction, str | None]:
    """Return the settings of the study, and the user's file that defines the task or None."""
    names = tuple(name.strip() for name in options.rows.split(";")) if options.rows else DISTINCT
    choices = {"methods": names, "forwards": options.forwards, "seeds": options.seeds or Reproduction.seeds}
    if options.task is None:
        return Reproduction(**choices), None
    task, _, _, file = spec.task(options.task)
    return Reproduction(task, **choices), file


def _show_dry_run(reproduction: Reproduction, options: ReproduceOptions) -> None:
    lengths = reproduction.lengths()
    seconds = forward_seconds(reproduction.task)
    hours = reproduction.hours(seconds, lengths)
    rows = [
        [each.name, f"{each.forwards:.2f}", f"{each.steps:,}", str(reproduction.runs), repr(each.estimator)]
        for each in lengths
    ]
    total = (
        f"{len(lengths) * reproduction.runs} runs, {hours:.1f} core-hours: a forward pass takes {1000 * seconds:.0f} "
        "ms here. Scores on validation and test splits are not included."
    )
    if options.as_json:
        keys = ("method", "forwards per step", "steps", "runs", "estimator")
        answers = [dict(zip(keys, row, strict=True)) for row in rows]
        print(json.dumps({"hours": hours, "seconds per forward": seconds, "rows": answers}, indent=2))
        return
    console.show(reproduction.study.question)
    console.show_table(["method", "forwards per step", "steps", "runs", "gradient"], rows, left=True)
    console.show(total)


def _rows(reproduction: Reproduction, results: Results) -> list[list[str]]:
    """Return the cells of the table whose columns are HEADERS: medians over the final runs of each method."""
    rows = []
    for each in reproduction.lengths():
        runs = finals(results.trials, each.name)
        scores = [run.test.accuracy or 0.0 if run.test is not None else 0.0 for run in runs]
        reached = [run.reached for run in runs]
        rates = sorted({run.lr for run in runs})
        known = [step for step in reached if step is not None]
        at_target = f"{median(known):,.0f}" if runs and len(known) == len(reached) else f"{len(known)} of {len(runs)}"
        rows.append(
            [each.name, f"{each.forwards:.2f}", f"{each.steps:,}", ", ".join(f"{rate:.3g}" for rate in rates) or "-"]
            + [f"{100 * median(scores):.1f}%" if scores else "-", at_target if runs else "-"]
        )
    return rows
