"""Candidates for the weights of micro-batches, and the test that excludes those that do not give the batch's loss."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gradcost.core.denominators import Observed, number
from gradcost.core.errors import Unsupported
from gradcost.core.micro_batches import selected

Candidate = int | str  # the denominator at this (negative) index of `Observed.denominators`, or one of:
EXAMPLES, SUM = "examples", "sum"
Evaluate = Callable[..., Observed]  # (batch, number of a key, gradients=False) -> the loss in eval mode

_TOLERANCE = 4e-6  # relative; a loss in float64 may compute in float32
_HALF_TOLERANCE = 4e-3
_KEYS = 8  # evaluations of a loss that draws random numbers in eval mode


def divisions(evaluated: Observed) -> list[Candidate]:
    """Return the divisions as candidates: the one whose result is the loss, then from the last to the first."""
    found = evaluated.denominators
    order = sorted(range(-1, -len(found) - 1, -1), key=lambda index: not found[index].is_loss)
    return list(order)


def count_of(candidate: Candidate, fraction: float, evaluated: Observed) -> float:
    """Return what a candidate counts in a micro-batch with this share of the examples; nan if it is not known."""
    if isinstance(candidate, str):
        return fraction
    if len(evaluated.denominators) < -candidate:
        return math.nan
    value = evaluated.denominators[candidate].value()
    if value is None or not math.isfinite(value) or value < 0:
        return math.nan
    if value <= 1 and isinstance(evaluated.loss, Tensor) and number(evaluated.loss) == 0:
        return 0.0  # max(count, 1): a denominator that guards a micro-batch without targets
    return value


def shares(counts: Sequence[float]) -> list[float]:
    """Return counts divided by their sum."""
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]


def passing(
    candidates: Sequence[Candidate], evaluate: Evaluate, batch: Any, groups: list[list[int]], model: nn.Module
) -> list[Candidate]:
    """Return the candidates whose weighted losses of groups of examples add up to the loss of all these examples.

    Args:
        candidates: the candidates.
        evaluate: evaluates the loss.
        batch: any pytree.
        groups: the examples of each group.
        model: the model. If it has weights in half precision, the test is less strict.
    Raises:
        Unsupported: there are none.
    """
    whole_batch = selected(batch, [*itertools.chain(*groups)])
    group_batches = [selected(batch, rows) for rows in groups]
    fractions = [len(rows) / sum(map(len, groups)) for rows in groups]
    wholes = [float(evaluate(whole_batch, key).loss) for key in range(2)]
    is_random = wholes[0] != wholes[1]
    wholes += [float(evaluate(whole_batch, key).loss) for key in range(2, _KEYS if is_random else 2)]
    if not all(map(math.isfinite, wholes)):
        # Such as the mean of no targets: there is no number to compare with, but it is a mean.
        return [candidate for candidate in candidates if candidate != SUM]
    differences: dict[Candidate, list[float]] = {candidate: [] for candidate in candidates}
    scale = max(map(abs, wholes))
    for key, whole in enumerate(wholes if is_random else wholes[:1]):
        found = [evaluate(group, key) for group in group_batches]
        losses = [float(one.loss) for one in found]
        scale = max(scale, *(abs(loss) for loss in losses if math.isfinite(loss)), 1e-300)
        for candidate in candidates:
            weights = _weights(candidate, fractions, found)
            total = sum(weight * loss for weight, loss in zip(weights, losses, strict=True) if weight)
            differences[candidate].append(total - whole)
    known = {name: found for name, found in differences.items() if not any(map(math.isnan, found))}
    if is_random:
        return _unbiased(known) or refuse(wholes[0])
    return _exact({name: abs(found[0]) / scale for name, found in known.items()}, model) or refuse(wholes[0])


def refuse(loss: float) -> NoReturn:
    """Raise Unsupported: the losses of the micro-batches do not determine that of the batch."""
    raise Unsupported(
        f"the loss of some examples, {loss:.6g}, is not a weighted mean or a sum of the losses of its micro-batches: "
        "it compares examples with each other, adds different averages, or divides in a way that was not recognized. "
        "Evaluate the batch at once (without Accumulated, parts=1). Or let the loss be a sum, divided by a number "
        "that the batch contains."
    )


def _weights(candidate: Candidate, fractions: list[float], found: list[Observed]) -> list[float]:
    """The weights of groups of examples under a candidate; nan where a count is not known."""
    if candidate == SUM:
        return [1.0] * len(found)
    return shares([count_of(candidate, fraction, one) for fraction, one in zip(fractions, found, strict=True)])


def _exact(errors: dict[Candidate, float], model: nn.Module) -> list[Candidate]:
    """Return the candidates whose relative error is rounding, as small as that of the best one."""
    best = min(errors.values(), default=math.inf)
    is_half = any(parameter.dtype not in (torch.float32, torch.float64) for parameter in model.parameters())
    is_half = is_half or any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    if best > (_HALF_TOLERANCE if is_half else _TOLERANCE):
        return []
    return [candidate for candidate, error in errors.items() if error <= max(10 * best, 1e-14)]


def _unbiased(differences: dict[Candidate, list[float]]) -> list[Candidate]:
    """Return the candidates whose mean error is within the noise of a loss that draws; at least the best one."""
    errors = {name: abs(statistics.fmean(found)) for name, found in differences.items()}
    noise = {name: statistics.stdev(found) / math.sqrt(_KEYS) for name, found in differences.items()}
    return [name for name, error in errors.items() if error <= max(3 * noise[name], min(errors.values()))]
