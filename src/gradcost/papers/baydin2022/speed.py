"""Paired times of a step: forward gradient, backprop and one evaluation of the loss, in turn in one process.

Times of separate runs differ by the load of the machine. Here the three take turns, so a change of the load changes
all of them, and the ratio of each round is hardly affected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from gradcost.core.key import Key
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import backprop, forward_gradient
from gradcost.instruments.measure import TrainingStep
from gradcost.instruments.timing import Timing, time_in_turn
from gradcost.papers.baydin2022.table import BACKPROP, DECAY, FORWARD
from gradcost.results import ledger
from gradcost.tasks.task import Task
from gradcost.training.optimizers import SGD

ESTIMATORS: dict[str, Estimator] = {FORWARD: forward_gradient(), BACKPROP: backprop()}
KIND = "paired times"
LOSS = "loss"
ROUNDS = 30
LR = 1e-4  # so small that the weights hardly change


@dataclass(frozen=True)
class StepTimes:
    """The times of one seed.

    Args:
        seed: the seed of the initial weights and of the batch.
        forward_ms: milliseconds of a training step with forward gradients, the median over rounds.
        backprop_ms: the same with backprop.
        loss_ms: milliseconds of one evaluation of the loss, without derivatives.
        ratio: the median over rounds of forward / backprop.
        rounds: the number of rounds.
    """

    seed: int
    forward_ms: float
    backprop_ms: float
    loss_ms: float
    ratio: float
    rounds: int

    @property
    def costs(self) -> tuple[float, float]:
        """R_f and R_b: the times of a step, divided by that of one evaluation of the loss."""
        return self.forward_ms / self.loss_ms, self.backprop_ms / self.loss_ms


def time_seed(task: Task, seed: int, rounds: int = ROUNDS) -> StepTimes:
    """Time the steps of one seed.

    Args:
        task: the task.
        seed: the seed of the initial weights and of the batch.
        rounds: the number of rounds; in each round, each function runs once.
    Returns:
        StepTimes.
    """
    times = time_steps_in_turn(task, seed, rounds)
    forward, backprop = times[FORWARD].samples, times[BACKPROP].samples
    return StepTimes(
        seed=seed,
        forward_ms=times[FORWARD].median,
        backprop_ms=times[BACKPROP].median,
        loss_ms=times[LOSS].median,
        ratio=median(a / b for a, b in zip(forward, backprop, strict=True)),
        rounds=rounds,
    )


def time_steps_in_turn(task: Task, seed: int, rounds: int) -> dict[str, Timing]:
    """Time a training step of each gradient, and one evaluation of the loss, in turn.

    Args:
        task: the task.
        seed: the seed of the initial weights and of the batch.
        rounds: the number of rounds.
    Returns:
        The timings under the names FORWARD, BACKPROP and LOSS.
    """
    key = Key(seed).fold(KIND)
    batch, objective = task.batch_at(key, 0), task.objective(key)
    steps: dict[str, Callable[[], object]] = {
        gradient: TrainingStep(task.objective(key), batch, estimator, SGD(LR, decay=DECAY))
        for gradient, estimator in ESTIMATORS.items()
    }
    return time_in_turn(steps | {LOSS: lambda: objective.evaluate(batch, key)}, rounds)


def recorded(folder: Path) -> dict[int, StepTimes]:
    """Return the times on record by seed; the last record of each seed counts."""
    return {times.seed: times for times in map(_from_record, ledger.records(folder)) if times is not None}


def time_seeds(task: Task, folder: Path, seeds: int, rounds: int = ROUNDS) -> Iterator[StepTimes]:
    """Time each seed that is not on record, and record it. No other process may write to the folder.

    Args:
        task: the task.
        folder: the results folder.
        seeds: times the seeds 1, ..., seeds.
        rounds: the number of rounds of each seed.
    Yields:
        The times of each seed, once they are on disk.
    """
    known = recorded(folder)
    for seed in (seed for seed in range(1, seeds + 1) if seed not in known):
        times = time_seed(task, seed, rounds)
        ledger.append(folder, {"schema": 1, "kind": KIND, **asdict(times)})
        yield times


def _from_record(record: dict[str, Any]) -> StepTimes | None:
    if record.get("kind") != KIND:
        return None
    return StepTimes(**{name: record[name] for name in StepTimes.__dataclass_fields__})
