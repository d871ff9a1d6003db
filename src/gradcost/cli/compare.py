"""`gradcost compare`: parse the options, run the comparison, print the recommendation."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from gradcost.cli import console, quantities, spec
from gradcost.cli.answer import show_answer
from gradcost.cli.objective import with_batch
from gradcost.cli.options import CompareOptions
from gradcost.cli.own_task import own_task
from gradcost.cli.progress import RESUME, EventPrinter
from gradcost.core.errors import BadInput
from gradcost.core.units import count, number, size
from gradcost.planning.forecast import Forecast
from gradcost.report import html
from gradcost.results import summary
from gradcost.results.records import Results, read
from gradcost.results.verdict import verdict
from gradcost.results.wording import duration
from gradcost.studies.compare import forecast_comparison, run_comparison
from gradcost.studies.comparison import Comparison, make_comparison
from gradcost.studies.costs import seconds_per_step
from gradcost.studies.folder import on_record
from gradcost.studies.study import first_stage

NOTHING_RUNS = 4  # exit code: no method can run, or none fits the budget


def compare_methods(options: CompareOptions) -> int:
    """Run or resume a comparison, print its result, and return the exit code."""
    if options.whole_memory is not None:
        raise BadInput(
            f"compare limits the memory beyond the weights: write --memory-beyond-weights {options.whole_memory}, "
            "without parameters, buffers and batch. `gradcost plan --memory` includes them."
        )
    with EventPrinter() as printer:
        try:
            comparison, names = _comparison(options)
            seconds = None if options.time is None else quantities.seconds_of(options.time)
            executor = spec.executor(options.executor, options.workers)
            if options.dry_run:
                started, forecasts, _ = forecast_comparison(comparison, options.output, on_event=printer, **names)
                known = on_record(started.folder, comparison.document(started.task, started.model))
                done = Counter(run.method for run in known.values())
                _show_dry_run(comparison, forecasts, done, started.folder, executor.workers, options.as_json)
                return 0 if forecasts else NOTHING_RUNS
            results = run_comparison(
                comparison,
                options.output,
                executor=executor,
                every=options.every,
                trial_timeout=options.trial_timeout,
                time=seconds,
                on_event=printer,
                **names,
            )
        except KeyboardInterrupt:
            _exit_interrupted(printer)
    assert printer.folder is not None
    _show(results, printer.folder, options.as_json)
    if printer.failed:
        return 1
    return NOTHING_RUNS if len(results.refused) == len(comparison.methods) else 0


def _comparison(options: CompareOptions) -> tuple[Comparison, dict[str, str]]:
    """Return the comparison of the options, and the names of its task and model."""
    task, task_name, model_name, file = _task(options)
    comparison = make_comparison(
        task,
        None if not options.method else [(text.strip(), spec.method(text)) for text in options.method],
        steps=options.steps,
        seeds=options.seeds,
        tuning_points=options.tuning_points,
        extra_points=options.extra_points,
        confirm_seeds=options.confirm_seeds,
        lr_range=None if options.lr_range is None else quantities.lr_range(options.lr_range),
        target=options.target,
        memory_beyond_weights=quantities.size(options.memory) if options.memory else None,
        optimizer=None if options.optimizer is None else spec.optimizer_template(options.optimizer),
        device=options.device,
        dtype=spec.dtype(options.dtype),
        autocast=spec.dtype(options.autocast),
        is_coarse=options.time is not None,
        file=file,
    )
    return comparison, {"task": task_name, "model": model_name}


def _task(options: CompareOptions) -> tuple[Any, str, str, str | None]:
    """Return the task, its name, the name of its model, and the user's file (None: it is found from the task)."""
    own = {"--data": options.data, "--metric": options.metric, "--lower-is-better": options.lower_is_better}
    is_own = options.task is None and (options.data is not None or ":" in (options.model or ""))
    if is_own and options.model is not None:
        return own_task(
            options.model,
            options.data,
            batch=options.batch,
            metric=options.metric,
            lower_is_better=options.lower_is_better,
        )
    given = [name for name, value in own.items() if value is not None]
    if given:
        with_what = "--task" if options.task is not None else "a task"
        raise BadInput(
            f"{given[0]} is for a model of your own, not for {with_what}: write --model FILE.py:MAKE "
            "--data FILE.py:LOADERS."
        )
    task, name, model, file = spec.task(options.task or "digits", options.model)
    return with_batch(task, options.batch, options.task or "digits"), name, model, file


def _exit_interrupted(printer: EventPrinter) -> NoReturn:
    """Print the number of finished trials and exit with code 130.

    If there is no results folder yet, raise KeyboardInterrupt with this reason.
    """
    if printer.folder is None or not (printer.folder / "study.json").exists():
        raise KeyboardInterrupt("this command had not recorded anything yet")
    printer.close()
    printer.end_page()
    done = sum(trial.status != "failed" for trial in read(printer.folder).trials)
    console.complain(f"interrupted. {printer.folder} has {count(done, 'finished trial')}; the same command resumes.")
    console.abandon(130)


def _show_dry_run(
    comparison: Comparison,
    forecasts: dict[str, Forecast],
    done: Mapping[str, int],
    folder: Path,
    workers: int,
    as_json: bool,
) -> None:
    left = {label: max(0, comparison.trials - done.get(label, 0)) for label in forecasts}
    trials = sum(left.values())
    seconds = seconds_per_step(first_stage(comparison.study(forecasts))) if forecasts else {}
    total = comparison.steps * sum(left[label] * seconds[label] for label in seconds) / workers
    if as_json:
        costs = {
            label: {"peak_bytes": cost.beyond, "forwards": cost.forwards, "matmuls": cost.matmuls}
            | {"ms": 1e3 * seconds[label]}
            for label, cost in forecasts.items()
        }
        plan = {"trials": trials, "on record": sum(done.values()), "steps": comparison.steps}
        plan |= {"seconds": total, "folder": str(folder)}
        console.print_json(plan | {"methods": costs})
        return
    more = f", which has {sum(done.values())} already" if done else ""
    console.show(
        f"Up to {trials} trials of {comparison.steps:,} steps would run and be recorded in {folder}{more}. "
        f"The steps take about {duration(total)} with -j {workers}. Cost of one step:"
    )
    rows = [
        [label, size(cost.beyond), f"{cost.forwards:.2f}", str(cost.matmuls), number(1e3 * seconds[label])]
        for label, cost in forecasts.items()
    ]
    console.show_table(["method", "beyond weights", "forwards", "matmuls", "ms"], rows)


def _show(results: Results, folder: Path, as_json: bool) -> None:
    try:
        report = html.write(folder)
    except ImportError as error:
        report = None
        console.complain(str(error))
    if as_json:
        rows = [summary.plain(row) for row in summary.summarise(results)]
        refused = [dataclasses.asdict(refusal) for refusal in results.refused]
        answer = {"verdict": verdict(results), "rows": rows, "refused": refused, "folder": str(folder)}
        console.print_json(answer)
        return
    show_answer(results)
    if report is not None:
        console.show(f"report   {report}")
    console.show(RESUME)
