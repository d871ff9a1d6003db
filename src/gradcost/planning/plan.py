"""Which way of getting a gradient to train with under a number of bytes, told before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.key import Key
from gradcost.core.objective import Objective, loss_errors
from gradcost.core.units import size
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.reverse import Reverse
from gradcost.planning import roofline
from gradcost.planning.batch import batch_size
from gradcost.planning.candidates import described, label, options, terse
from gradcost.planning.fake_model import on_fakes
from gradcost.planning.forecast import UNFOLLOWED, Forecast, device_type, unfollowed
from gradcost.planning.forecasts import Forecasts, offloads, quietly, stream
from gradcost.planning.recommend import Least, least_exact, recommendation
from gradcost.planning.row import COLUMNS, Row
from gradcost.planning.within import Within
from gradcost.theory.moments import second_moment
from gradcost.training.optimizers import Optimizer


@dataclass(frozen=True, eq=False)
class Plan:
    """Methods in rows, and which one to use. `str(plan)` is the table, refused rows keep their reasons.

    budget: bytes of the whole step, the weights among them. weights: how many numbers are trained. examples: of the
    batch; None when its tensors have no first dimension in common. choice: the estimator to use, as it stands; None
    when none fits. sentence: why, or the least that would do. least: the least that any exact gradient needs; None
    while one of the rows fits.
    """

    rows: tuple[Row, ...]
    budget: int
    device: str
    model: str
    weights: int
    examples: int | None
    optimizer: Optimizer | None
    choice: Estimator | None
    sentence: str
    least: Least | None = None

    @cached_property
    def chosen(self) -> Row | None:
        """The row of the choice."""
        return next((row for row in self.rows if row.estimator == self.choice), None)

    def lines(self) -> list[str]:
        """What is said under the table: refusals, the peak of the choice, and where estimates come from."""
        said = [f"{row.method}: {row.refusal}" for row in self.rows if row.refusal is not None]
        if self.chosen is not None and self.chosen.forecast is not None:
            if label(self.chosen.estimator) != self.chosen.method:
                said.append(f"{self.chosen.method} is written {label(self.chosen.estimator)}")
            said.append(_breakdown(self.chosen.method, self.chosen.forecast))
        if all(row.seconds is None for row in self.rows):
            said.append(
                f"no seconds: the rates of this machine are unknown for {self.device}. Measure them once on it: "
                "gradcost doctor --calibrate"
            )
        for row in self.rows:
            if row.forecast is not None and offloads(row.estimator):
                said.append(f"{row.method}: what it moves over the bus and back is in none of these figures")
        if any(row.steps not in (None, 1.0) for row in self.rows):
            said.append(
                "steps × is theory: how many times backpropagation's steps the variance of an estimate asks for "
                f"with {self.weights:,} trained weights"
            )
        return said

    def __str__(self) -> str:
        table = [list(COLUMNS), *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["   ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
        return "\n".join([self.title, "", *lines, "", self.sentence, *self.lines()])

    @property
    def title(self) -> str:
        batch = "" if self.examples is None else f", batch {self.examples:,}"
        updates = "no optimizer" if self.optimizer is None else terse(self.optimizer)
        return (
            f"{self.model}, {self.weights:,} trained weights{batch}, {self.device}, {updates}"
            f"   budget {self.budget:,} bytes = {size(self.budget)}, weights included"
        )

    def record(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        return {
            "kind": "plan",
            "model": self.model,
            "weights": self.weights,
            "budget": self.budget,
            "device": self.device,
            "batch": self.examples,
            "optimizer": None if self.optimizer is None else repr(self.optimizer),
            "rows": [row.record() for row in self.rows],
            "choice": None if self.chosen is None else self.chosen.method,
            "write": None if self.choice is None else label(self.choice),
            "sentence": self.sentence,
            "least": None if self.least is None else self.least.record(),
            "lines": self.lines(),
        }


def plan(
    objective: Objective,
    batch: Any,
    budget: int,
    estimators: Iterable[Estimator] | None = None,
    optimizer: Optimizer | None = None,
    device: str | torch.device | None = None,
    largest: bool = False,
    on_progress: Callable[[str], None] = lambda what: None,
) -> Plan:
    """What a step by each of the estimators would take, whether it fits `budget` bytes, and which one to use.

    Nothing is computed: all figures are forecasts, so the model may be on the `meta` device. The budget is for the
    whole step: weights, batch, activations, gradients, the optimizer's state. estimators: the usual ones and the
    recomputation schedule `Within(budget)` if None; when no exact gradient among them fits, micro-batches of that
    too. device: where the step would run. largest: find the largest batch that fits, too (a few more forecasts
    each). told: called with what is looked at next.

    Law: `choice` is the fastest exact gradient that fits, by estimated seconds where the device's rates are known
    and by FLOPs elsewhere, and Offloaded only where no other does; if none fits, the inexact one that theory expects
    to be cheapest for the same progress.
    Raises: ValueError when the budget is not above 0, or the loss cannot be evaluated on the batch.
    """
    if budget <= 0:
        raise BadInput(f"a budget is a number of bytes above 0, not {budget}.")
    where = device_type(objective, device)
    on_progress("the loss on this batch")
    _evaluated(objective, batch, where)
    try:
        examples = batch_size(batch)
    except BadInput:
        if largest:
            raise
        examples = None
    forecasts = Forecasts(objective, batch, optimizer, where)
    usual = estimators is None
    every = options(objective, examples or 1, budget, where) if usual else estimators
    rows: list[Row] = []
    clock = _clock(objective, where)
    for each in every or ():
        on_progress(described(each))
        alone = usual and each == Reverse(Within(budget))
        estimator, found = forecasts.within(budget) if alone else (each, forecasts.of(each))
        rows.append(_row(forecasts, estimator, found, budget, largest, clock))
    if usual and not any(row.fits and row.exact for row in rows):
        on_progress("micro-batches of Within the budget")
        rows += _in_micro_batches(forecasts, examples or 1, budget, largest, clock)
    least = None
    if not any(row.fits and row.exact for row in rows):
        on_progress("the least that an exact gradient needs")
        least = least_exact(forecasts, rows, examples or 1)
    choice, sentence = recommendation(rows, budget, least)
    name = type(getattr(objective.model, "get_base_model", lambda: objective.model)()).__name__
    dimension = objective.dimension
    return Plan(tuple(rows), budget, where, name, dimension, examples, optimizer, choice, sentence, least)


def _row(
    forecasts: Forecasts,
    estimator: Estimator,
    found: Forecast | str,
    budget: int,
    largest: bool,
    clock: Callable[[Forecast], float | None],
) -> Row:
    row = Row(estimator, None, steps=second_moment(estimator, forecasts.objective.dimension))
    if isinstance(found, str):
        row = replace(row, refusal=found)
    else:
        row = replace(row, forecast=found, over=max(found.peak - budget, 0), seconds=clock(found))
    return replace(row, largest=forecasts.largest(estimator, budget)) if largest else row


def _in_micro_batches(
    forecasts: Forecasts, examples: int, budget: int, largest: bool, clock: Callable[[Forecast], float | None]
) -> list[Row]:
    """Within the budget in as few micro-batches as fit, if any do."""
    parts = 2
    while parts < 2 * examples:
        parts = min(parts, examples)
        if (least := forecasts.least(parts)) is not None and least <= budget:
            return [_row(forecasts, *forecasts.within(budget, parts), budget, largest, clock)]
        parts *= 2
    return []


def _evaluated(objective: Objective, batch: Any, device: str) -> None:
    """Raises: BadInput when the loss raises on this batch, or is not a scalar."""
    with quietly(), loss_errors(objective), on_fakes(objective, batch, device) as (fake, fake_batch):
        try:
            fake.evaluate(fake_batch, Key(0))
        except UNFOLLOWED as error:
            raise Unsupported(unfollowed(objective, error)) from error


def _clock(objective: Objective, device: str) -> Callable[[Forecast], float | None]:
    """Seconds of a step from the remembered rates of the device; None where there are none."""
    there = device == "cpu" or torch.cuda.is_available()
    rates = roofline.remembered(device) if there else None
    sizes: dict[torch.dtype, int] = {}
    for parameter in objective.model.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.nbytes
    dtype = max(sizes, key=lambda kind: sizes[kind])

    def seconds(found: Forecast) -> float | None:
        try:
            return None if rates is None else roofline.seconds(found.counts, rates, dtype, stream(found.estimator))
        except Unsupported:
            return None  # no rate was measured for these numbers

    return seconds


def _breakdown(method: str, forecast: Forecast) -> str:
    parts = "  ".join(f"{purpose} {size(held)}" for purpose, held in forecast.breakdown.items() if held)
    where = f"in {forecast.memory.module}" if forecast.memory.module else "outside of the modules"
    return f"peak of {method}:  {parts}   at {forecast.memory.operator} {where}"
