"""Compare the gradient of micro-batches with that of the whole batch."""

from __future__ import annotations

import math
from typing import Any

from gradcost.checks.reference import dot
from gradcost.checks.report import CheckLine, format_number
from gradcost.core.isolation import eval_mode
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.estimators.reverse import Reverse

WHAT = "micro-batches give the gradient of the whole batch"


def accumulation_lines(objective: Objective, parts: int, batch: Any, key: Key, tolerance: float) -> list[CheckLine]:
    """Return a line that compares the gradient of the micro-batches with that of the batch; [] if `parts` is 1.

    All gradients are by backpropagation in eval mode: in train mode, dropout and batch norm make them differ.
    Cost: three backpropagations (the batch under two keys, and the micro-batches). Memory: three gradients.

    Args:
        objective: the model and the loss, evaluated on the batch at once.
        parts: the number of micro-batches.
        batch: any pytree.
        key: seeds the random layers.
        tolerance: the accepted relative error.
    """
    if parts == 1:
        return []
    with eval_mode(objective.model):
        whole, again, split = (
            dict(Reverse().estimate(each, batch, key.fold("accumulation", number)).gradient.leaves())
            for number, each in enumerate((objective, objective, objective.in_micro_batches(parts)))
        )
    error = _distance(split, whole)
    key_distance = _distance(again, whole)  # not 0 if the loss draws random numbers in eval mode
    numbers = {"error": error}
    if error <= tolerance:
        return [CheckLine(WHAT, f"{format_number(error)} relative, in eval mode", "ok", numbers)]
    if error <= 10 * key_distance:
        return [CheckLine(WHAT, f"{format_number(error)} relative: the loss draws random numbers", "note", numbers)]
    why = "the loss is not a mean over examples or over targets, or some of the batch is not split"
    return [CheckLine(WHAT, f"{format_number(error)} relative in eval mode: {why}", "failed", numbers)]


def _distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    gap = sum(float(dot(one[name] - other[name], one[name] - other[name])) for name in other)
    scale = sum(float(dot(gradient, gradient)) for gradient in other.values())
    return math.sqrt(gap / scale) if scale else math.sqrt(gap)
