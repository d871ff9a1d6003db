"""The cost of one step of each method: forecast before its first trial, timed after the last trial of the study."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gradcost.core.errors import BadInput, GradcostError
from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective, loss_errors
from gradcost.core.pytree import batch_size
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.estimators.structure import find
from gradcost.estimators.variance_reduced import VarianceReduced, full_gradient
from gradcost.instruments.measure import time_step
from gradcost.instruments.timing import time_steps
from gradcost.planning.forecast import Forecast, forecast
from gradcost.planning.forecasts import Forecasts
from gradcost.planning.within import Within
from gradcost.results import ledger
from gradcost.results.records import read
from gradcost.studies.task_info import first_step
from gradcost.studies.trial import Trial
from gradcost.training.loop import train
from gradcost.training.optimizers import Optimizer, with_rate

TIMED_STEPS = 3  # after one untimed step
TIMED_BATCHES = 4  # of a pass over the data

MOST_SIMULATED = 100  # probes of a forecast that simulates each; more are extrapolated
Methods = Mapping[str, tuple[Estimator, Optimizer]]  # by label


def forecast_methods(task: Any, methods: Methods, memory: int | None) -> Iterator[tuple[str, Forecast | str]]:
    """Yield (label, forecast of one step) of each method; (label, reason) for a method that cannot run.

    Args:
        task: the task to train on.
        methods: maps each label to its estimator and optimizer.
        memory: budget in bytes for the peak memory of a step, beyond the weights. None: no budget.
    Raises:
        BadInput: the loss is not finite at the initial weights, so no method can train.
    """
    objective, batch = first_step(task)
    with loss_errors(objective):
        loss = float(objective.evaluate(batch, Key(0)))
    if not math.isfinite(loss):
        raise BadInput(f"the loss of {task} is {loss} before the first step: check its data and its loss function.")
    for label, (estimator, optimizer) in methods.items():
        objective, batch = first_step(task)
        yield label, _forecast_or_reason(objective, batch, estimator, optimizer, memory)


def _forecast_or_reason(
    objective: Objective, batch: Any, estimator: Estimator, optimizer: Optimizer, memory: int | None
) -> Forecast | str:
    if any(probing.probes > MOST_SIMULATED for probing in find(estimator, Probing)):
        cost = Forecasts(objective, batch, optimizer, None).of(estimator)
        if isinstance(cost, str):
            return cost
    else:
        try:
            cost = forecast(estimator, objective, batch, optimizer)
        except GradcostError as error:
            return str(error)
    passes = _passes(objective, batch, estimator)
    cost = replace(cost, spread=round(sum(forecast(part, objective, batch).flops * n for part, n in passes)))
    if memory is not None and cost.beyond > memory:
        excess = cost.beyond - memory
        return f"a step needs {cost.beyond:,} bytes beyond the weights, {excess:,} over the budget."
    return cost


def _passes(objective: Objective, batch: Any, estimator: Estimator) -> Iterator[tuple[Estimator, float]]:
    """Yield what passes over the data, the snapshots of `VarianceReduced`, and its batches divided by the steps.

    Yields:
        The estimator of the full gradient, and how many of its estimates, each on one batch, a step takes on average.
    """
    for part in find(estimator, VarianceReduced):
        assert objective.data is not None  # else it is refused
        examples = sum(map(batch_size, objective.data()))
        yield part.anchor or part.estimator, examples / batch_size(batch) / part.every


def _milliseconds_of_passes(objective: Objective, batch: Any, estimator: Estimator) -> float:
    """Return the milliseconds of passes over the data per step, from timed passes over a few batches."""
    passes = list(_passes(objective, batch, estimator))
    if not passes:
        return 0.0
    few = Objective(objective.model, objective.loss, data=lambda: itertools.repeat(batch, TIMED_BATCHES))
    return sum(
        n * time_steps(lambda part=part: full_gradient(part, few, Key(0))).median / TIMED_BATCHES
        for part, n in passes
    )


def exact_within(task: Any, memory: int, optimizer: Optimizer) -> Estimator | None:
    """Return backpropagation that recomputes as little as possible to fit a memory budget.

    Args:
        task: the task to train on.
        memory: the budget in bytes, beyond the weights.
        optimizer: its state counts as memory.
    Returns:
        The estimator; None if plain backpropagation fits the budget.
    """
    # The budget of `Within` covers all memory, so the bytes of weights and batch are added to `memory`.
    plain = forecast(Reverse(), *first_step(task), optimizer)
    return None if plain.beyond <= memory else Reverse(Within(memory + plain.peak - plain.beyond))


def time_methods(
    task: Any, methods: Methods, memory: int | None, folder: Path, forecasts: Mapping[str, Forecast]
) -> Iterator[str]:
    """Time one step of each method in `forecasts`, add its cost to the records, and yield its label.

    A method is skipped if the records have a reliable timing of it (`doubt` is None). The machine must be idle.
    A step contains its share of passes over the data.
    """
    timed = {cost.method for cost in read(folder).costs if cost.doubt is None}
    for label, (estimator, optimizer) in methods.items():
        if label not in forecasts or label in timed:
            continue
        objective, batch = first_step(task)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Note)
            timing = time_step(objective, batch, _changed(estimator, _without_passes), optimizer)
            passes = _milliseconds_of_passes(objective, batch, estimator)
        timing = replace(timing, samples=tuple(sample + passes for sample in timing.samples))
        cost = forecasts[label]
        low, high = timing.quartiles
        ledger.append(
            folder,
            {"schema": 1, "kind": "cost", "method": label, "estimator": repr(estimator)}
            | {"peak_bytes": cost.beyond, "flops": cost.flops, "forwards": cost.forwards}
            | {"breakdown": dict(cost.breakdown), "operator": cost.memory.operator, "module": cost.memory.module}
            | {"matmuls": cost.matmuls, "elementwise": cost.counts.elementwise, "drawn": cost.counts.drawn}
            | {"ms": timing.median, "ms_low": low, "ms_high": high}
            | {"doubt": timing.doubt, "others": timing.others, "fits": None if memory is None else True}
            | {"samples": [round(sample, 4) for sample in timing.samples]},
        )
        yield label


def forward_seconds(task: Any, repeats: int = 5) -> float:
    """Return the core-seconds of one forward pass of a batch, over all threads: the least of some runs.

    Args:
        task: the task.
        repeats: number of timed evaluations, after one that is not timed.
    """
    objective, batch = first_step(task)
    seconds = []
    for _ in range(repeats + 1):
        start = time.process_time()  # of all threads; other processes do not count
        objective.evaluate(batch, Key(0))
        seconds.append(time.process_time() - start)
    return min(seconds[1:])


def seconds_per_step(trials: Iterable[Trial]) -> dict[str, float]:
    """Return the seconds of a training step by method: the median of three steps on one thread, as trials run.

    A step contains its share of passes over the data.
    An estimator of more than `MOST_SIMULATED` probes is timed with so many, and the time is multiplied.

    Args:
        trials: the trials whose methods are timed. Each method is timed once.
    """
    by_method = {trial.method: replace(trial, optimizer=with_rate(trial.optimizer, 1e-9)) for trial in trials}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Note)
            return {method: _seconds(trial) for method, trial in by_method.items()}
    finally:
        torch.set_num_threads(threads)


def _seconds(trial: Trial) -> float:
    most = max((probing.probes for probing in find(trial.estimator, Probing)), default=0)
    estimator = _changed(_changed(trial.estimator, _with_fewer_probes), _without_passes)
    times = []
    for _ in train(trial.task, estimator, trial.optimizer, trial.key, 1 + TIMED_STEPS):
        times.append(time.perf_counter())
    passes = _milliseconds_of_passes(*first_step(trial.task), _changed(trial.estimator, _with_fewer_probes)) / 1e3
    step = median(end - start for start, end in itertools.pairwise(times))
    return max(1.0, most / MOST_SIMULATED) * (step + passes)


def _changed(part: Any, change: Callable[[Any], dict[str, Any]]) -> Any:
    """Return an estimator, or a part of one, in which each part has the fields that `change` returns for it."""
    if isinstance(part, tuple):
        return tuple(_changed(item, change) for item in part)
    if not is_dataclass(part) or isinstance(part, type):
        return part
    inner = {field.name: _changed(getattr(part, field.name), change) for field in fields(part) if field.init}
    return replace(part, **inner | change(part))


def _with_fewer_probes(part: Any) -> dict[str, Any]:
    return {"probes": min(part.probes, MOST_SIMULATED)} if isinstance(part, Probing) else {}


def _without_passes(part: Any) -> dict[str, Any]:
    """The first step takes the only snapshot."""
    return {"every": 1 << 62} if isinstance(part, VarianceReduced) else {}


def record_refusal(folder: Path, label: str, estimator: Estimator, reason: str) -> None:
    """Add the reason why a method does not run to the records, unless they have one."""
    if label not in {refusal.method for refusal in read(folder).refused}:
        record = {"schema": 1, "kind": "refused", "method": label, "estimator": repr(estimator), "reason": reason}
        ledger.append(folder, record)
