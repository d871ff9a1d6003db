"""The comparison: every method tuned alike on validation, run on fresh seeds, tested once."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gradcost.cost.forecast import Forecast, forecast
from gradcost.cost.measure import time_step
from gradcost.cost.within import Within
from gradcost.dual import Note
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.reverse import Reverse
from gradcost.key import Key
from gradcost.objective import Objective
from gradcost.study import ledger
from gradcost.study.environment import describe, fingerprint
from gradcost.study.executors import perform_all
from gradcost.study.records import Results, read
from gradcost.study.trial import Trial
from gradcost.study.tune import chosen
from gradcost.training.optimizers import SGD
from gradcost.value import digest, value


@value
class Comparison:
    """What is compared, and how: the whole protocol.

    methods: (label, estimator) pairs. rates: the learning rates that every method is tuned over, on one seed
    that no final run uses. memory: the budget of a step beyond the weights, in bytes, or None.
    """

    task: Any
    methods: tuple[tuple[str, Estimator], ...]
    rates: tuple[float, ...]
    steps: int
    seeds: tuple[int, ...]
    target: float
    memory: int | None = None
    user_file: str | None = None  # where the task comes from, if not from this package

    def __post_init__(self) -> None:
        labels = [label for label, _ in self.methods]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is given twice: name each method once.")
        if not labels:
            raise ValueError("there is no method to compare: name one or more.")
        if self.steps < 1 or not self.seeds or not self.rates:
            raise ValueError("a comparison needs at least 1 step, 1 seed and 1 learning rate.")

    @property
    def code(self) -> str:
        return fingerprint(self.user_file)

    @property
    def name(self) -> str:
        """A hash of what is compared and by which code: two folders under one name hold the same figures."""
        return digest((self, self.code))

    def tuning(self) -> list[Trial]:
        return [self._trial(label, e, lr, "tune", 0) for label, e in self.methods for lr in self.rates]

    def finals(self, rates: dict[str, float]) -> list[Trial]:
        return [
            self._trial(label, e, rates[label], "final", seed)
            for label, e in self.methods
            if label in rates
            for seed in self.seeds
        ]

    def _trial(self, label: str, estimator: Estimator, lr: float, phase: str, seed: int) -> Trial:
        return Trial(self.task, label, estimator, SGD(lr), self.steps, phase, seed, self.target)


def open_folder(folder: Path, comparison: Comparison, task_name: str, model_name: str) -> None:
    """Make the folder of a comparison, or take up the one that is there.

    Raises: ValueError when it holds another comparison; OSError when it cannot be written.
    """
    objective = comparison.task.objective(Key(0))
    document = {
        "schema": 1,
        "comparison": comparison.name,
        "task": repr(comparison.task),
        "task_name": task_name,
        "model_name": model_name,
        "weights": objective.dimension,
        "weights_bytes": sum(leaf.parameter.nbytes for leaf in objective.leaves),
        "methods": [label for label, _ in comparison.methods],
        "seeds": list(comparison.seeds),
        "points": len(comparison.rates),
        "steps": comparison.steps,
        "batch": getattr(comparison.task, "batch", None),
        "target": comparison.target,
        "memory": comparison.memory,
        "optimizer": "SGD",
        "chance": 1 / comparison.task.classes,
    }
    if (folder / "study.json").exists():
        if read(folder).study.comparison != document["comparison"]:
            raise ValueError(
                f"{folder} holds another comparison, or the same one made by other code. Give another folder with -o."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    ledger.write_document(folder / "environment.json", dict(describe(torch.get_num_threads(), comparison.code)))
    (folder / "records.jsonl").touch()
    ledger.write_document(folder / "study.json", document)  # last: a folder without it is not taken up


def survey(comparison: Comparison) -> Iterator[tuple[str, Forecast | str]]:
    """For each method its step's bytes and FLOPs, told without a step, or why it cannot serve or does not fit.

    Raises: ValueError when the loss is not finite before the first step, for that is nobody's method's doing.
    """
    objective, batch = _first_step(comparison.task)
    loss = float(objective.evaluate(batch, Key(0)))
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss of {comparison.task} is {loss} before the first step: look at its data and its loss."
        )
    for label, estimator in comparison.methods:
        objective, batch = _first_step(comparison.task)
        yield label, _surveyed(objective, batch, estimator, comparison.memory)


def _surveyed(objective: Objective, batch: Any, estimator: Estimator, memory: int | None) -> Forecast | str:
    try:
        cost = forecast(estimator, objective, batch, SGD(1e-9))
    except ValueError as objection:
        return str(objection)
    if memory is not None and cost.beyond > memory:
        over = cost.beyond - memory
        return f"a step needs {cost.beyond:,} bytes beyond the weights, {over:,} over the budget."
    return cost


def exact_within(task: Any, memory: int) -> Estimator | None:
    """Backpropagation that recomputes as little as it can to stay within `memory` bytes beyond the weights; None
    where that is nothing."""
    plain = forecast(Reverse(), *_first_step(task), SGD(1e-9))
    return None if plain.beyond <= memory else Reverse(Within(memory + plain.peak - plain.beyond))


def trials_of(comparison: Comparison, folder: Path, phase: str) -> list[Trial]:
    """What is still to be run of a phase: trials that neither finished nor diverged yet."""
    results = read(folder)
    refused = {refusal.method for refusal in results.refused}
    if phase == "tune":
        trials = comparison.tuning()
    else:
        rates = {label: chosen(results.trials, label) for label, _ in comparison.methods}
        trials = comparison.finals({label: lr for label, lr in rates.items() if lr is not None})
    done = {trial.trial for trial in results.trials if trial.status in ("finished", "diverged")}
    return [t for t in trials if t.method not in refused and t.name(comparison.code) not in done]


def perform(comparison: Comparison, folder: Path, phase: str) -> Iterator[dict[str, Any]]:
    """Run what is still to be run of a phase on all cores, each record on disk before it is yielded."""
    trials = trials_of(comparison, folder, phase)
    if trials:
        for record in perform_all(trials, comparison.code, os.cpu_count() or 1, comparison.user_file):
            ledger.append(folder, record)
            yield record


def clock(comparison: Comparison, folder: Path, costs: dict[str, Forecast]) -> Iterator[str]:
    """Time a step of each method, alone on the machine, and put its whole cost on record; one that an earlier
    call timed in doubt is timed again."""
    known = {cost.method for cost in read(folder).costs if cost.doubt is None}
    for label, estimator in comparison.methods:
        if label not in costs or label in known:
            continue
        objective, batch = _first_step(comparison.task)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Note)
            timing = time_step(objective, batch, estimator, SGD(1e-9))
        cost = costs[label]
        low, high = timing.quartiles
        ledger.append(
            folder,
            {"schema": 1, "kind": "cost", "method": label, "estimator": repr(estimator)}
            | {"peak_bytes": cost.beyond, "flops": cost.flops, "forwards": cost.forwards}
            | {"breakdown": dict(cost.breakdown), "operator": cost.memory.operator, "module": cost.memory.module}
            | {"matmuls": cost.matmuls, "ms": timing.median, "ms_low": low, "ms_high": high}
            | {"doubt": timing.doubt, "others": timing.others, "fits": None if comparison.memory is None else True}
            | {"samples": [round(sample, 4) for sample in timing.samples]},
        )
        yield label


def refuse(comparison: Comparison, folder: Path, label: str, reason: str) -> None:
    """Put on record why a method is not run; said once."""
    results: Results = read(folder)
    if label not in {refusal.method for refusal in results.refused}:
        estimator = repr(dict(comparison.methods)[label])
        record = {"schema": 1, "kind": "refused", "method": label, "estimator": estimator, "reason": reason}
        ledger.append(folder, record)


def _first_step(task: Any) -> tuple[Any, Any]:
    return task.objective(Key(0).fold("survey")), task.batch_at(Key(0).fold("survey"), 0)
