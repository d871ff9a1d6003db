"""`gradcost check`: is a method right on this model and this data, and how good is it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

from gradcost.checks.check import SERVES, check
from gradcost.checks.reference import Reference
from gradcost.checks.report import CheckReport, short
from gradcost.cli import console, spec
from gradcost.cli.plan import of_model, of_task, progress, refuse
from gradcost.core.errors import BadInput
from gradcost.core.isolation import randomness
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.estimators.structure import micro_batches

_COSINE, _MOMENT = "cosine to the true gradient", "second moment"


def check_methods(
    method: str | None,
    model: str | None,
    data: str | None,
    task: str | None,
    batch: int | None,
    draws: int,
    as_json: bool,
) -> int:
    """Show what is found of a method, or of every preset in short. Returns the exit code."""
    every = method is None
    estimators = _presets() if method is None else {method: spec.method(method)}
    objective, examples = _objective(model, data, task, batch)
    found = []
    with progress("checking") as told:
        reference = Reference(objective, examples, Key(0))  # what is true of the model is found once
        for written, estimator in estimators.items():

            def tell(what: str, name: str = written) -> None:
                told(f"{name}: {what}" if every else what)

            shared = reference if micro_batches(estimator) == 1 else None
            found.append(check(estimator, objective, examples, Key(0), draws, tell, shared))
    failed = any(_wrong(diagnosis) for diagnosis in found) if every else bool(found[0].failed)
    if as_json:
        records = [diagnosis.record() for diagnosis in found]
        print(json.dumps(records if every else records[0], indent=2))
    elif every:
        _show_all(list(estimators), found)
    else:
        _show(found[0])
    return 1 if failed else 0


def _presets() -> dict[str, Any]:
    """What each preset makes that needs no argument, by how it is written."""
    every = {name: inspect.signature(preset).parameters.values() for name, preset in spec.presets().items()}
    return {
        f"{name}()": spec.method(f"{name}()")
        for name, parameters in every.items()
        if not any(parameter.default is parameter.empty for parameter in parameters)
    }


def _objective(model: str | None, data: str | None, task: str | None, batch: int | None) -> tuple[Objective, Any]:
    if task is not None or model is None or ":" not in model:  # else a name of one of a task's models
        if task is None and data is not None:
            raise BadInput("--data says what --model FILE.py:FACTORY is trained on: add --model.")
        refuse("--task", **{"--data": data})
        return of_task(task or "digits", model, batch)
    if model.startswith("hf:"):
        raise BadInput(
            "a check needs numbers, and hf:CONFIG.json has none: write --model FILE.py:FACTORY with "
            "from_pretrained in it."
        )
    with randomness(Key(0).fold("data")):  # so that the same check has the same batch
        return of_model(model, data, None, batch, None, None, None, _with_numbers)


def _with_numbers(factory: Callable[[], Any]) -> Any:
    """What a factory makes, the same at every call."""
    with randomness(Key(0).fold("init")):
        return factory()


def _show(found: CheckReport) -> None:
    title, *rows = str(found).split("\n")
    console.show(title, bold=True)
    for row in rows:
        console.show(row)
    wrong = [line.what for line in found.failed]
    console.show()
    console.show(f"failed: {'; '.join(wrong)}" if wrong else "nothing failed", bold=True)


def _wrong(found: CheckReport) -> bool:
    """Whether a method fails where it can serve: of all presets, some need what this model has not."""
    return bool(found.failed) and _refusal(found) is None


def _refusal(found: CheckReport) -> str | None:
    return next((line.found for line in found.failed if line.what == SERVES), None)


def _show_all(written: list[str], found: list[CheckReport]) -> None:
    console.show(found[0].subject, bold=True)
    console.show()
    headers = ["method", "cosine", "theory", "second moment", "theory", "verdict"]
    console.show_table(headers, [[name, *_cells(one)] for name, one in zip(written, found, strict=True)], left=True)


def _cells(found: CheckReport) -> list[str]:
    cells = []
    for what in (_COSINE, _MOMENT):
        numbers = next((line.numbers for line in found.lines if line.what.startswith(what)), {})
        cells += [short(numbers[key]) if key in numbers else "" for key in ("mean", "theory")]
    refusal = _refusal(found)
    wrong = "; ".join(f"{line.what}: {line.found}" for line in found.failed)
    verdict = f"cannot serve here: {refusal}" if refusal else f"failed: {wrong}" if wrong else "ok"
    return [*cells, verdict]
