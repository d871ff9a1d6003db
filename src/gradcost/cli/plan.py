"""`gradcost plan`: parse the options, forecast each method, print the table."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradcost.cli import console, spec
from gradcost.cli.objective import dtypes, of_model, of_task, refuse, without_numbers
from gradcost.cli.options import PlanOptions
from gradcost.core.errors import BadInput
from gradcost.core.objective import Objective
from gradcost.core.units import DASH
from gradcost.planning.curve import curve
from gradcost.planning.plan import Plan, plan
from gradcost.planning.recommend import main_rows
from gradcost.planning.row import COLUMNS, Row
from gradcost.results.wording import count

NOTHING_FITS = 4  # exit code
_FIXED_COLUMNS = 4  # always shown; each later column only if a row has a value in it


def plan_methods(options: PlanOptions) -> int:
    """Print the forecast of each method and the recommended one, and return the exit code."""
    if options.sweep:
        from gradcost.cli.sweep import write_calculator

        return write_calculator(options, _objective)
    if options.fail_over and not options.method:
        raise BadInput("--fail-over needs the methods that must fit: add --method EXPRESSION, once or more.")
    budget, device = spec.size(options.memory), spec.device(options.device)
    estimators = [spec.method(text) for text in options.method or ()] or None
    optimizer = spec.optimizer(options.optimizer)
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
            on_progress=progress,
        )
        points = [] if options.output is None else curve(objective, batch, optimizer, device, on_progress=progress)
    record = result.record() | {"dtype": dtypes(objective), "curve": points}
    if options.output is not None:
        from gradcost.report import plan as page

        page.write(record, options.output)
    if options.as_json:
        print(json.dumps(record, indent=2))
    else:
        rows = result.rows if options.all_rows or options.method else main_rows(result.rows, result.choice)
        _show(result, rows, record, options.output)
    over = [row.method for row in result.rows[: len(options.method or ())] if not row.fits]
    if options.fail_over and over:
        console.complain(f"over the budget of {options.memory}: {', '.join(over)}.")
        return NOTHING_FITS
    return 0 if result.choice is not None else NOTHING_FITS


def _objective(options: PlanOptions) -> tuple[Objective, Any]:
    dtype = spec.dtype(options.dtype)
    if options.task is not None:
        unusable = {"--data": options.data, "--dtype": dtype, "--length": options.length}
        refuse("--task", **unusable, **{"--lora": options.lora, "--chunks": options.chunks, "--bits": options.bits})
        return of_task(options.task, options.model, options.batch)
    if options.model is None:
        raise BadInput("no model is given: write --model hf:CONFIG.json, --model FILE.py:FACTORY, or --task digits.")
    transformers_options = {
        "length": options.length,
        "lora": options.lora,
        "chunks": options.chunks,
        "bits": options.bits,
    }
    with console.status("planning") as progress:
        progress(f"making {options.model}")
        return of_model(
            options.model, options.data, options.batch, without_numbers, dtype=dtype, **transformers_options
        )


def _show(result: Plan, shown: Sequence[Row], record: dict[str, Any], output: Path | None) -> None:
    console.show(result.sentence, bold=True)
    console.show()
    console.show(f"{result.title}   {record['dtype']}")
    console.show()
    rows = [row.cells() for row in shown]
    columns = [i for i in range(len(COLUMNS)) if i < _FIXED_COLUMNS or any(row[i] != DASH for row in rows)]
    console.show_table([COLUMNS[i] for i in columns], [[row[i] for i in columns] for row in rows])
    if len(shown) < len(result.rows):
        console.show(f"{count(len(result.rows) - len(shown), 'further method')}: --all")
    console.show()
    for line in result.lines():
        console.show(line)
    if output is not None:
        console.show(f"page    {output}")
