"""`gradcost plan`: parse the options, forecast each method, print the table."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradcost.cli import console, quantities, spec
from gradcost.cli.changes import levels
from gradcost.cli.objective import dtypes, of_model, of_task, refuse, without_numbers
from gradcost.cli.options import PlanOptions
from gradcost.core.errors import BadInput
from gradcost.core.evaluation.autocast import UnderAutocast
from gradcost.core.objective import Objective
from gradcost.core.units import size
from gradcost.estimators.presets import backprop
from gradcost.planning.candidates import PROBES
from gradcost.planning.changes import Change, smallest_changes
from gradcost.planning.curve import curve
from gradcost.planning.plan import Plan, plan
from gradcost.planning.recommend import main_rows
from gradcost.planning.row import Row, table
from gradcost.planning.sharding import per_device
from gradcost.results.wording import count
from gradcost.training.customary import optimizer_of

NOTHING_FITS = 4  # exit code
NO_CHANGE = "No other --chunks, --optimizer, --dtype, --lora or --bits makes an exact gradient fit either."


def plan_methods(options: PlanOptions) -> int:
    """Print the forecast of each method and the recommended one, and return the exit code."""
    if options.sweep:
        from gradcost.cli.sweep import write_calculator

        return write_calculator(options, _objective)
    if options.fail_over and not options.method:
        raise BadInput("--fail-over needs the methods that must fit: add --method EXPRESSION, once or more.")
    budget, device = quantities.size(options.memory), spec.device(options.device)
    estimators = [spec.method(text) for text in options.method or ()] or None
    optimizer = spec.optimizer_or_customary(options.optimizer)
    is_complete = options.all_rows or options.as_json or options.output is not None
    with console.status("planning") as progress:
        progress(f"making {options.model or options.task}")
        objective, batch = _objective(options)
    gc.freeze()  # the collector passes over millions of objects of the imported libraries no more
    with console.status("planning") as progress:
        result = plan(
            objective,
            batch,
            budget,
            estimators,
            optimizer,
            device=device,
            largest=options.max_batch,
            probes=PROBES if is_complete else PROBES[:1],
            on_progress=progress,
        )
        is_short = not options.method and not _has_exact(result)
        changes = _changes(options, objective, batch, budget, progress) if is_short else []
        exact = optimizer_of(optimizer, backprop())
        points = [] if options.output is None else curve(objective, batch, exact, device, on_progress=progress)
    record = result.record() | {"dtype": dtypes(objective), "curve": points}
    record["changes"] = [change.record() for change in changes]
    record["per_device"] = _per_device(result, objective, options.devices)
    if options.output is not None:
        from gradcost.report import plan as page

        page.write(record, options.output)
    if options.as_json:
        console.print_json(record)
    else:
        rows = result.rows if options.all_rows or options.method else main_rows(result.rows, result.choice)
        _show_changes(changes, options.memory)
        console.show(result.sentence, bold=not changes)
        if is_short and not changes:
            console.show(NO_CHANGE)
        _show(result, rows, record, options.output)
    over = [row.method for row in result.rows[: len(options.method or ())] if not row.fits]
    if options.fail_over and over:
        console.complain(f"over the budget of {options.memory}: {', '.join(over)}.")
        return NOTHING_FITS
    return 0 if result.choice is not None else NOTHING_FITS


def _objective(options: PlanOptions) -> tuple[Objective, Any]:
    objective, batch = _of_options(options)
    autocast = spec.dtype(options.autocast)
    if autocast is None:
        return objective, batch
    # A simulation runs on the CPU, also for another device.
    return replace(objective, loss=UnderAutocast(objective.loss, "cpu", autocast)), batch


def _of_options(options: PlanOptions) -> tuple[Objective, Any]:
    dtype = spec.dtype(options.dtype)
    of_transformers = {name: getattr(options, name) for name in ("length", "lora", "chunks", "bits", "attention")}
    if options.task is not None:
        unusable = {"--data": options.data, "--dtype": dtype}
        refuse("--task", **unusable, **{f"--{name}": value for name, value in of_transformers.items()})
        return of_task(options.task, options.model, options.batch)
    if options.model is None:
        raise BadInput("no model is given: write --model hf:CONFIG.json, --model FILE.py:FACTORY, or --task digits.")
    return of_model(options.model, options.data, options.batch, without_numbers, dtype=dtype, **of_transformers)


def _has_exact(result: Plan) -> bool:
    return any(row.fits and row.exact for row in result.rows)


def _changes(
    options: PlanOptions, objective: Objective, batch: Any, budget: int, progress: Callable[[str], None]
) -> list[Change]:
    """Return the smallest changes of the options under which an exact gradient fits."""
    progress("changes under which an exact gradient fits")
    return list(smallest_changes(levels(options, objective, batch, _objective), budget, spec.device(options.device)))


def _show_changes(changes: Sequence[Change], memory: str) -> None:
    if not changes:
        return
    rows = [change.cells() for change in changes]
    typed, method, peak, forwards = rows[0]
    answer = f"No exact gradient fits {memory} as asked. With {typed} one does: {method}, {peak} at the peak, "
    console.show(f"{answer}{forwards} forwards a step.", bold=True)
    console.show()
    console.show("Options to add to the command, the smallest change first:")
    console.show()
    console.show_table(["options", "method", "peak", "forwards"], rows)
    console.show()


def _per_device(result: Plan, objective: Objective, devices: int) -> dict[str, Any] | None:
    """Return the peak of each device for each stage of ZeRO, for the chosen method or `checkpointed()`."""
    exact = [row for row in result.rows if row.exact and row.forecast is not None]
    row = next((row for row in exact if row is result.chosen), None)
    row = row or min(exact, key=lambda row: row.forecast.peak if row.forecast else 0, default=None)
    if devices == 1 or row is None or row.forecast is None:
        return None
    return {"devices": devices, "method": row.method, "peaks": per_device(row.forecast, objective, devices)}


def _show(result: Plan, shown: Sequence[Row], record: dict[str, Any], output: Path | None) -> None:
    console.show()
    console.show(f"{result.title}   {record['dtype']}")
    console.show()
    console.show_table(*table(shown))
    if len(shown) < len(result.rows):
        console.show(f"{count(len(result.rows) - len(shown), 'further method')}, and several directions: --all")
    console.show()
    for line in result.lines():
        console.show(line)
    if (shared := record["per_device"]) is not None:
        peaks = ", ".join(f"{stage} {size(peak)}" for stage, peak in shared["peaks"].items())
        where = f"each of {shared['devices']} devices, with this batch on each"
        console.show(f"{shared['method']} on {where}, by arithmetic: {peaks}")
    if output is not None:
        console.show(f"page    {output}")
