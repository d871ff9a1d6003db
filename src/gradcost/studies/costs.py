"""What a step of each method of a study costs: told before it runs, and timed alone on the machine after."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gradcost.core.errors import BadInput, GradcostError
from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective, loss_errors
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.reverse import Reverse
from gradcost.instruments.measure import time_step
from gradcost.planning.forecast import Forecast, forecast
from gradcost.planning.within import Within
from gradcost.results import ledger
from gradcost.results.records import Results, read
from gradcost.training.optimizers import SGD, Optimizer

Methods = Mapping[str, tuple[Estimator, Optimizer]]  # by label


def forecast_methods(task: Any, methods: Methods, memory: int | None) -> Iterator[tuple[str, Forecast | str]]:
    """For each method its step's bytes and FLOPs, told without a step, or why it cannot serve or does not fit.

    memory: the budget beyond the weights, in bytes. Raises: ValueError when the loss is not finite before the first
    step, for that is nobody's method's doing.
    """
    objective, batch = first_step(task)
    with loss_errors(objective):
        loss = float(objective.evaluate(batch, Key(0)))
    if not math.isfinite(loss):
        raise BadInput(f"the loss of {task} is {loss} before the first step: look at its data and its loss.")
    for label, (estimator, optimizer) in methods.items():
        objective, batch = first_step(task)
        yield label, _forecast_or_reason(objective, batch, estimator, optimizer, memory)


def _forecast_or_reason(
    objective: Objective, batch: Any, estimator: Estimator, optimizer: Optimizer, memory: int | None
) -> Forecast | str:
    try:
        cost = forecast(estimator, objective, batch, optimizer)
    except GradcostError as objection:
        return str(objection)
    if memory is not None and cost.beyond > memory:
        over = cost.beyond - memory
        return f"a step needs {cost.beyond:,} bytes beyond the weights, {over:,} over the budget."
    return cost


def exact_within(task: Any, memory: int) -> Estimator | None:
    """Backpropagation that recomputes as little as it can to stay within `memory` bytes beyond the weights; None
    where that is nothing."""
    plain = forecast(Reverse(), *first_step(task), SGD(1e-9))
    return None if plain.beyond <= memory else Reverse(Within(memory + plain.peak - plain.beyond))


def clock(
    task: Any, methods: Methods, memory: int | None, folder: Path, costs: Mapping[str, Forecast]
) -> Iterator[str]:
    """Time a step of each method, alone on the machine, and put its whole cost on record; one that an earlier
    call timed in doubt is timed again."""
    known = {cost.method for cost in read(folder).costs if cost.doubt is None}
    for label, (estimator, optimizer) in methods.items():
        if label not in costs or label in known:
            continue
        objective, batch = first_step(task)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Note)
            timing = time_step(objective, batch, estimator, optimizer)
        cost = costs[label]
        low, high = timing.quartiles
        ledger.append(
            folder,
            {"schema": 1, "kind": "cost", "method": label, "estimator": repr(estimator)}
            | {"peak_bytes": cost.beyond, "flops": cost.flops, "forwards": cost.forwards}
            | {"breakdown": dict(cost.breakdown), "operator": cost.memory.operator, "module": cost.memory.module}
            | {"matmuls": cost.matmuls, "ms": timing.median, "ms_low": low, "ms_high": high}
            | {"doubt": timing.doubt, "others": timing.others, "fits": None if memory is None else True}
            | {"samples": [round(sample, 4) for sample in timing.samples]},
        )
        yield label


def refuse(folder: Path, label: str, estimator: Estimator, reason: str) -> None:
    """Put on record why a method is not run; said once."""
    results: Results = read(folder)
    if label not in {refusal.method for refusal in results.refused}:
        record = {"schema": 1, "kind": "refused", "method": label, "estimator": repr(estimator), "reason": reason}
        ledger.append(folder, record)


def first_step(task: Any) -> tuple[Any, Any]:
    """The objective and the batch that every method is looked at with before it trains."""
    return task.objective(Key(0).fold("survey")), task.batch_at(Key(0).fold("survey"), 0)
