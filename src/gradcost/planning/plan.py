"""Choose an estimator under a memory budget before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from gradcost.core.arguments import require_bytes, require_several
from gradcost.core.batching.mixed_examples import mixing_layer
from gradcost.core.errors import Unsupported
from gradcost.core.inner_model import inner_model
from gradcost.core.objective import Objective
from gradcost.core.pytree import batch_size
from gradcost.core.units import size
from gradcost.estimators.estimator import Estimator, require_estimator, require_objective
from gradcost.estimators.reverse import Reverse
from gradcost.instruments.cuda_allocator import CONTEXT, WORKSPACES, Reserved
from gradcost.planning import roofline
from gradcost.planning.candidates import PROBES, described, label, options, splits_mixed, terse
from gradcost.planning.copies import Copies
from gradcost.planning.forecast import Forecast, device_type
from gradcost.planning.forecasts import Forecasts, offloads, stream
from gradcost.planning.recommend import Least, least_exact, recommendation
from gradcost.planning.row import Row, table
from gradcost.planning.within import Within
from gradcost.theory.moments import second_moment
from gradcost.training.customary import Customary, optimizer_of
from gradcost.training.optimizers import Optimizer, require_optimizer


@dataclass(frozen=True, eq=False)
class Plan:
    """The forecast of each estimator, and the estimator to use. `str(plan)` is the answer and a table.

    Args:
        rows: one row per estimator, refused ones included.
        budget: bytes for the whole step, parameters included.
        device: the device type that the plan is for, such as "cuda".
        model: the name of the model's class.
        weights: the number of trainable weights.
        examples: the batch size; None if the first dimensions of the tensors differ.
        optimizer: the optimizer, or `Customary()`; None leaves the update out of the step.
        choice: the estimator to use; None if none fits.
        sentence: the reason for the choice; without a choice, the least memory that is needed.
        least: the exact gradient with the least peak; None if an exact row fits, or if no exact gradient is possible.
        mixing: the layer that mixes the examples of a batch, such as "1 (BatchNorm1d)"; None if there is none.
    """

    rows: tuple[Row, ...]
    budget: int
    device: str
    model: str
    weights: int
    examples: int | None
    optimizer: Optimizer | Customary | None
    choice: Estimator | None
    sentence: str
    least: Least | None = None
    mixing: str | None = None

    @cached_property
    def chosen(self) -> Row | None:
        """The row of `choice`; None without a choice."""
        return next((row for row in self.rows if row.estimator == self.choice), None)

    def lines(self) -> list[str]:
        """Return the lines below the table: refusals, the peak of the choice, and the source of the estimates."""
        lines = [f"{row.method}: {row.refusal}" for row in self.rows if row.refusal is not None]
        if self.chosen is not None and self.chosen.forecast is not None:
            if label(self.chosen.estimator) != self.chosen.method:
                lines.append(f"{self.chosen.method} is written {label(self.chosen.estimator)}")
            lines.append(_breakdown(self.chosen.method, self.chosen.forecast))
            if self.chosen.forecast.cuda is not None:
                lines.append(_on_cuda(self.chosen.method, self.chosen.forecast.cuda))
        if all(row.seconds is None for row in self.rows):
            lines.append(
                f"no estimate of seconds: the rates of this machine's {self.device} are unknown. Measure them once: "
                "gradcost doctor --calibrate"
            )
        for row in self.rows:
            if row.forecast is not None and offloads(row.estimator):
                lines.append(f"{row.method}: transfers to the CPU and back are not included in these figures")
        if any(splits_mixed(row.estimator, self.mixing) for row in self.rows):
            lines.append(
                f"micro-batches: {self.mixing} uses the statistics of each, so their gradient differs from that of "
                "the whole batch"
            )
        if any(row.steps not in (None, 1.0) for row in self.rows):
            lines.append(
                "steps × is a ratio of worst-case guarantees: steps of the method to steps of backprop, from the "
                f"variance of an estimate with {self.weights:,} trainable weights"
            )
        return lines

    def __str__(self) -> str:
        columns, cells = table(self.rows)
        rows = [columns, *cells]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["   ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        return "\n".join([self.sentence, "", self.title, "", *lines, "", *self.lines()])

    @property
    def title(self) -> str:
        """The line above the table: model, batch, device, optimizer and budget."""
        batch = "" if self.examples is None else f", batch {self.examples:,}"
        optimizer = "no optimizer" if self.optimizer is None else terse(self.optimizer)
        if isinstance(self.optimizer, Customary):
            optimizer = "AdamW for exact gradients, SGD for the others"
        return (
            f"{self.model}, {self.weights:,} trainable weights{batch}, {self.device}, {optimizer}"
            f"   budget {self.budget:,} bytes = {size(self.budget)}, weights included"
        )

    def record(self) -> dict[str, Any]:
        """Return the plan as plain JSON data."""
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
    optimizer: Optimizer | Customary | None = None,
    *,
    device: str | torch.device | None = None,
    largest: bool = False,
    probes: Sequence[int] = PROBES,
    on_progress: Callable[[str], None] = lambda what: None,
) -> Plan:
    """Forecast a step of each estimator, check whether it fits `budget` bytes, and choose one. No step runs.

    The model may be on the `meta` device. The default candidates include `Within(budget)`; if none of them fits with
    an exact gradient, `Within` with micro-batches is added.

    Law: `choice` is the exact gradient that fits with the fewest estimated seconds per step, or the fewest FLOPs if
    the device's rates are unknown; among equals, the one with the shortest expression, such as `backprop()`.
    Offloaded is chosen only if no other exact gradient fits, and so are micro-batches of a model with BatchNorm in
    train mode, whose gradient differs from that of the batch. If no exact gradient fits, `choice` is the estimator
    that fits with the smallest product of the cost of a step and `Row.steps`.

    Args:
        objective: the model and the loss.
        batch: a typical training batch.
        budget: bytes for the whole step: parameters, batch, activations, gradients and the optimizer's state.
        estimators: the estimators to consider; None for the default candidates.
        optimizer: the optimizer; `Customary()`: AdamW for exact gradients and SGD for the others; None leaves the
            update out of the step.
        device: where the step would run; None for the device of the model.
        probes: numbers of directions of the estimated gradients among the default candidates.
        largest: also find the largest batch that fits; this takes a few more forecasts per estimator.
        on_progress: called before each simulation, with its description.
    Returns:
        The rows and the choice.
    Raises:
        BadInput: the budget is not above 0, or the loss cannot be evaluated on the batch.
        Unsupported: the loss can be evaluated, but not simulated on tensors without data.
    """
    require_objective(objective)
    budget = require_bytes(budget, "the budget")
    if optimizer is not None and not isinstance(optimizer, Customary):
        require_optimizer(optimizer)
    is_default = estimators is None
    estimators = None if estimators is None else _each_checked(estimators)
    where = device_type(objective, device)
    on_progress("the loss on this batch")
    copies, of_optimizer = Copies(objective, where), dict[Optimizer | None, Forecasts]()

    def forecasts_of(estimator: Estimator) -> Forecasts:
        chosen = None if optimizer is None else optimizer_of(optimizer, estimator)
        return of_optimizer.setdefault(chosen, Forecasts(objective, batch, chosen, where, copies))

    forecasts = forecasts_of(Reverse())
    forecasts.evaluate()
    examples = batch_size(batch) if largest else forecasts.examples
    candidates = options(objective, examples or 1, budget, where, probes) if is_default else estimators
    rows: list[Row] = []
    seconds = seconds_estimator(objective, where)
    for each in candidates or ():
        on_progress(described(each))
        needs_beside = is_default and each == Reverse(Within(budget))
        own = forecasts_of(each)
        estimator, result = own.within(budget) if needs_beside else (each, own.of(each))
        rows.append(_row(own, estimator, result, budget, largest, seconds))
    if is_default and not any(row.fits and row.exact for row in rows):
        on_progress("micro-batches with Within(budget)")
        if (parts := forecasts.fewest_parts(budget)) is not None:
            rows.append(_row(forecasts, *forecasts.within(budget, parts), budget, largest, seconds))
    least = None
    if not any(row.fits and row.exact for row in rows):
        on_progress("the least memory for an exact gradient")
        least = least_exact(forecasts, rows, examples or 1, budget)
    mixing = mixing_layer(objective.model)
    choice, sentence = recommendation(rows, budget, least, mixing)
    for at, row in enumerate(rows):
        if row.forecast is not None and row.estimator == choice:
            rows[at] = replace(row, forecast=forecasts_of(row.estimator).with_reserved(row.forecast))
            sentence += _beyond_on_cuda(rows[at].forecast, budget)
    name = type(inner_model(objective.model)).__name__
    dimension = objective.dimension
    return Plan(tuple(rows), budget, where, name, dimension, examples, optimizer, choice, sentence, least, mixing)


def _each_checked(estimators: Any) -> list[Estimator]:
    found = require_several(estimators, "estimators")
    for each in found:
        require_estimator(each)
    return found


def _row(
    forecasts: Forecasts,
    estimator: Estimator,
    result: Forecast | str,
    budget: int,
    largest: bool,
    seconds: Callable[[Forecast], float | None],
) -> Row:
    row = Row(estimator, None, steps=second_moment(estimator, forecasts.objective.dimension))
    if isinstance(result, str):
        row = replace(row, refusal=result)
    else:
        row = replace(row, forecast=result, over=max(result.peak - budget, 0), seconds=seconds(result))
    return replace(row, largest=forecasts.largest(estimator, budget)) if largest else row


def seconds_estimator(objective: Objective, device: str) -> Callable[[Forecast], float | None]:
    """Return a function that estimates the seconds of a step; it returns None if the rates are unknown."""
    is_available = device == "cpu" or torch.cuda.is_available()
    rates = roofline.stored_rates(device) if is_available else None
    sizes: dict[torch.dtype, int] = {}
    for parameter in objective.model.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.nbytes
    dtype = max(sizes, key=lambda kind: sizes[kind])

    def seconds(result: Forecast) -> float | None:
        try:
            return None if rates is None else roofline.seconds(result.counts, rates, dtype, stream(result.estimator))
        except Unsupported:
            return None  # the rate of this dtype was not measured

    return seconds


def _beside_tensors() -> tuple[int, int]:
    """The least and the most bytes that the CUDA context of a process and cuBLAS take."""
    low, high = (sum(sizes) for sizes in zip(CONTEXT, WORKSPACES, strict=True))
    return low, high


def _on_cuda(method: str, cuda: Reserved) -> str:
    """Say what CUDA's allocator reserves."""
    low, high = _beside_tensors()
    return (
        f"{method}: CUDA's allocator reserves up to {size(cuda.reserved)}; the context of a process and cuBLAS take "
        f"{size(low)} to {size(high)}"
    )


def _beyond_on_cuda(forecast: Forecast | None, budget: int) -> str:
    """Say that the device may need more than the budget, though the tensors fit; "" if it does not."""
    if forecast is None or forecast.cuda is None:
        return ""
    needed = forecast.cuda.reserved + _beside_tensors()[1]
    if needed <= budget:
        return ""
    return (
        f" Its tensors fit, but with what CUDA's allocator reserves it may take {size(needed)}: set "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, or plan with a smaller budget."
    )


def _breakdown(method: str, forecast: Forecast) -> str:
    parts = "  ".join(f"{purpose} {size(nbytes)}" for purpose, nbytes in forecast.breakdown.items() if nbytes)
    where = f"in {forecast.memory.module}" if forecast.memory.module else "outside any module"
    more = f", and up to {size(forecast.within_kernels)} more inside {forecast.memory.kernel}"
    return (
        f"peak of {method}:  {parts}   at {forecast.memory.operator} {where}{more if forecast.within_kernels else ''}"
    )
