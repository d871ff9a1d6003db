"""Compare the gradient of micro-batches with that of the whole batch."""

from __future__ import annotations

import math
from typing import Any

from gradcost.checks.reference import dot
from gradcost.checks.report import CheckLine, format_number
from gradcost.core.batching.mixed_examples import mixing_layer, mixing_layers
from gradcost.core.isolation import eval_mode
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.estimators.reverse import Reverse

WHAT = "micro-batches give the gradient of the whole batch"


def accumulation_lines(objective: Objective, parts: int, batch: Any, key: Key, tolerance: float) -> list[CheckLine]:
    """Return lines that compare the gradient of the micro-batches with that of the batch; [] if `parts` is 1.

    All gradients are by backpropagation in eval mode: in train mode, dropout makes them differ. If the model has
    BatchNorm in train mode, a second line compares them with that in train mode.
    Cost: three backpropagations (the batch under two keys, and the micro-batches), and two for the second line.
    Memory: three gradients.

    Args:
        objective: the model and the loss, evaluated on the batch at once.
        parts: the number of micro-batches.
        batch: any pytree.
        key: seeds the random layers.
        tolerance: the accepted relative error.
    """
    if parts == 1:
        return []
    return [_eval_line(objective, parts, batch, key, tolerance), *_mixing_lines(objective, parts, batch, key)]


def _mixing_lines(objective: Objective, parts: int, batch: Any, key: Key) -> list[CheckLine]:
    layers = mixing_layers(objective.model)
    if not layers:
        return []
    with eval_mode(objective.model):
        for layer in layers.values():
            layer.train()
        whole, split = (_gradient(each, batch, key) for each in (objective, objective.in_micro_batches(parts)))
    error = _distance(split, whole)
    text = (
        f"{format_number(error)} relative: each micro-batch has its own statistics in {mixing_layer(objective.model)}"
    )
    return [CheckLine(f"{WHAT} in train mode", text, "note", {"error": error})]


def _gradient(objective: Objective, batch: Any, key: Key) -> dict[str, Any]:
    return dict(Reverse().estimate(objective, batch, key).gradient.leaves())


def _eval_line(objective: Objective, parts: int, batch: Any, key: Key, tolerance: float) -> CheckLine:
    with eval_mode(objective.model):
        whole, again, split = (
            _gradient(each, batch, key.fold("accumulation", number))
            for number, each in enumerate((objective, objective, objective.in_micro_batches(parts)))
        )
    error = _distance(split, whole)
    key_distance = _distance(again, whole)  # not 0 if the loss draws random numbers in eval mode
    numbers = {"error": error}
    if error <= tolerance:
        return CheckLine(WHAT, f"{format_number(error)} relative, in eval mode", "ok", numbers)
    if error <= 10 * key_distance:
        return CheckLine(WHAT, f"{format_number(error)} relative: the loss draws random numbers", "note", numbers)
    why = "the loss is not a mean over examples or over targets, or some of the batch is not split"
    return CheckLine(WHAT, f"{format_number(error)} relative in eval mode: {why}", "failed", numbers)


def _distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    gap = sum(float(dot(one[name] - other[name], one[name] - other[name])) for name in other)
    scale = sum(float(dot(gradient, gradient)) for gradient in other.values())
    return math.sqrt(gap / scale) if scale else math.sqrt(gap)
