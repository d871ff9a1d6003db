"""`gradcost check`: check a method, or every preset, on a model and a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from gradcost.checks.check import USABLE, check
from gradcost.checks.reference import Reference
from gradcost.checks.report import CheckReport, format_number
from gradcost.cli import console, spec
from gradcost.cli.objective import of_model, of_task, refuse
from gradcost.cli.options import CheckOptions
from gradcost.core.errors import BadInput
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.estimators.structure import micro_batches

# The report lines that the table shows: their descriptions start with these words.
_COSINE, _MOMENT = "cosine to the true gradient", "second moment"


def check_methods(options: CheckOptions) -> int:
    """Print the report of one method, or one line per preset, and return the exit code."""
    method = options.method
    estimators = _presets() if method is None else {method: spec.method(method)}
    objective, batch = _objective(options)
    reports = []
    with console.status("checking") as progress:
        reference = Reference(objective, batch, Key(0))  # the same for every method
        for label, estimator in estimators.items():

            def on_progress(stage: str, label: str = label) -> None:
                progress(f"{label}: {stage}" if method is None else stage)

            usable = reference if micro_batches(estimator) == 1 else None  # micro-batches need their own
            reports.append(check(estimator, objective, batch, Key(0), options.draws, on_progress, usable))
    if options.as_json:
        records = [report.record() for report in reports]
        console.print_json(records if method is None else records[0])
    elif method is None:
        _show_all(list(estimators), reports)
    else:
        show(reports[0])
    failed = any(map(_is_wrong, reports)) if method is None else bool(reports[0].failed)
    return 1 if failed else 0


def _presets() -> dict[str, Any]:
    """Return {"mezo()": its estimator, ...} for the presets that need no argument."""
    signatures = {name: inspect.signature(preset) for name, preset in spec.presets().items()}
    return {
        f"{name}()": spec.method(f"{name}()")
        for name, signature in signatures.items()
        if not any(parameter.default is parameter.empty for parameter in signature.parameters.values())
    }


def _objective(options: CheckOptions) -> tuple[Objective, Any]:
    model, data = options.model, options.data
    if options.task is not None or model is None or ":" not in model:  # without a colon: a model of the task
        if options.task is None and data is not None:
            raise BadInput("--data needs a model: add --model FILE.py:FACTORY.")
        refuse("--task", **{"--data": data})
        return of_task(options.task or "digits", model, options.batch)
    if model.startswith("hf:"):
        raise BadInput(
            "a check needs weights, and hf:CONFIG.json has none. Use --model FILE.py:FACTORY, and call "
            "from_pretrained in FACTORY."
        )
    with seeded_generators(Key(0).fold("data")):  # so that the same command draws the same batch
        return of_model(model, data, options.batch, _call_seeded)


def _call_seeded(factory: Callable[[], Any]) -> Any:
    """Call a model factory with a fixed seed, so that every call gives the same weights."""
    with seeded_generators(Key(0).fold("init")):
        return factory()


def show(report: CheckReport) -> None:
    """Print a report and what failed."""
    title, *rows = str(report).split("\n")
    console.show(title, bold=True)
    for row in rows:
        console.show(row)
    failed = "; ".join(line.what for line in report.failed)
    console.show()
    console.show(f"failed: {failed}" if failed else "nothing failed", bold=True)


def _is_wrong(report: CheckReport) -> bool:
    """Return whether a method runs on this model and fails a check. A method that cannot run is not wrong."""
    return bool(report.failed) and _refusal(report) is None


def _refusal(report: CheckReport) -> str | None:
    """Return why the method cannot run on this model; None if it can."""
    return next((line.found for line in report.failed if line.what == USABLE), None)


def _show_all(labels: list[str], reports: list[CheckReport]) -> None:
    console.show(reports[0].subject, bold=True)
    console.show()
    headers = ["method", "cosine", "theory", "second moment", "theory", "verdict"]
    rows = [[label, *_cells(report)] for label, report in zip(labels, reports, strict=True)]
    console.show_table(headers, rows, left=True)


def _cells(report: CheckReport) -> list[str]:
    """Return a method's cells of the table: mean and theory of cosine and second moment, then the verdict."""
    cells = []
    for what in (_COSINE, _MOMENT):
        numbers = next((line.numbers for line in report.lines if line.what.startswith(what)), {})
        cells += [format_number(numbers[key]) if key in numbers else "" for key in ("mean", "theory")]
    refusal = _refusal(report)
    failed = "; ".join(f"{line.what}: {line.found}" for line in report.failed)
    if refusal:
        return [*cells, f"cannot be used here: {refusal}"]
    return [*cells, f"failed: {failed}" if failed else "ok"]
