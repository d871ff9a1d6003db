"""Candidates for the weights of micro-batches, and the test that excludes those that do not give the batch's loss."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gradcost.core.batching.denominators import Observed, number
from gradcost.core.batching.micro_batches import selected
from gradcost.core.errors import Unsupported

Candidate = int | str  # a negative index: this denominator of `Observed.denominators`; or one of these:
EXAMPLES, SUM = "examples", "sum"
Evaluate = Callable[..., Observed]  # (batch, number of a key, gradients=False) -> the loss, by `loss_without_draws`

_TOLERANCE = 4e-6  # relative; a float64 loss may compute in float32 internally
_HALF_TOLERANCE = 4e-3
_KEYS = 8  # evaluations of a loss that still draws random numbers


def divisions(evaluated: Observed) -> list[Candidate]:
    """Return the divisions as candidates: first the one whose result is the loss, then from the last to the first."""
    found = evaluated.denominators
    order = sorted(range(-1, -len(found) - 1, -1), key=lambda index: not found[index].is_loss)
    return list(order)


def count_of(candidate: Candidate, fraction: float, evaluated: Observed) -> float:
    """Return a candidate's denominator for a micro-batch with this fraction of the examples; nan if it is unknown."""
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


def kink_of_average(one: Tensor, other: Tensor) -> str | None:
    """Return a function with a kink that a loss applies to sums over examples, such as "abs"; None if there is none.

    Far from the kink, such a loss passes the test of `passing`; near it, the loss is not a weighted mean. Example:
    "flooding" (Ishida 2020), |mean loss - level| + level.

    Args:
        one: the loss of some examples, with its autograd graph.
        other: the loss of another number of examples.
    """
    pairs: list[tuple[Any, Any]] = [(one.grad_fn, other.grad_fn)] if one.grad_fn and other.grad_fn else []
    above: dict[tuple[Any, Any], list[Any]] = {}
    by_examples: list[tuple[Any, Any]] = []
    while pairs:
        pair = pairs.pop()
        if pair[0].name() != pair[1].name():
            return None  # the two evaluations compute different things
        below = zip(*([node for node, _ in node.next_functions if node is not None] for node in pair), strict=False)
        for following in below:
            if _shapes(following[0]) != _shapes(following[1]):
                by_examples.append(pair)  # a sum or another reduction over examples
            else:
                pairs += [following] if following not in above else []
                above.setdefault(following, []).append(pair)
    reduced: set[Any] = set()
    while by_examples:
        pair = by_examples.pop()
        if pair not in reduced:
            reduced.add(pair)
            by_examples += above.get(pair, [])
    names = sorted(match.group(1) for node, _ in reduced if (match := _KINKED.match(node.name())))
    return names[0].lower() if names else None


def _shapes(node: Any) -> list[Any]:
    """Return the shapes of the results of an autograd node."""
    return [getattr(metadata, "shape", None) for metadata in node._input_metadata]


_KINKED = re.compile(
    "(Abs|Clamp|ClampMin|ClampMax|Relu|LeakyRelu|Threshold|Hardtanh|Maximum|Minimum|Max|Min|Amax|Amin|Where|Sort|Topk)"
    r"Backward\d*$"
)


def shares(counts: Sequence[float]) -> list[float]:
    """Return counts divided by their sum."""
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]


def passing(
    candidates: Sequence[Candidate], evaluate: Evaluate, batch: Any, groups: list[list[int]], model: nn.Module
) -> list[Candidate]:
    """Return the candidates under which the weighted losses of groups of examples sum to the loss of all of them.

    Args:
        candidates: the candidates.
        evaluate: evaluates the loss.
        batch: any pytree.
        groups: the examples of each group.
        model: the model. If it has weights in half precision, the test is less strict.
    Raises:
        Unsupported: no candidate passes.
    """
    whole_batch = selected(batch, [*itertools.chain(*groups)])
    group_batches = [selected(batch, rows) for rows in groups]
    fractions = [len(rows) / sum(map(len, groups)) for rows in groups]
    batch_losses = [float(evaluate(whole_batch, key).loss) for key in range(2)]
    is_random = batch_losses[0] != batch_losses[1]
    batch_losses += [float(evaluate(whole_batch, key).loss) for key in range(2, _KEYS if is_random else 2)]
    if not all(map(math.isfinite, batch_losses)):
        # As the mean of no targets is nan: there is no number to compare with, but the loss is a mean, not a sum.
        return [candidate for candidate in candidates if candidate != SUM]
    differences: dict[Candidate, list[float]] = {candidate: [] for candidate in candidates}
    scale = max(map(abs, batch_losses))
    for key, batch_loss in enumerate(batch_losses if is_random else batch_losses[:1]):
        found = [evaluate(group, key) for group in group_batches]
        losses = [float(one.loss) for one in found]
        scale = max(scale, *(abs(loss) for loss in losses if math.isfinite(loss)), 1e-300)
        for candidate in candidates:
            weights = _weights(candidate, fractions, found)
            total = sum(weight * loss for weight, loss in zip(weights, losses, strict=True) if weight)
            differences[candidate].append(total - batch_loss)
    known = {name: found for name, found in differences.items() if not any(map(math.isnan, found))}
    if is_random:
        return _unbiased(known) or refuse(batch_losses[0])
    return _exact({name: abs(found[0]) / scale for name, found in known.items()}, model) or refuse(batch_losses[0])


_UNKNOWN = (
    "it compares examples with each other, adds different averages, or divides in a way that was not recognized"
)


def refuse(loss: float, why: str = _UNKNOWN) -> NoReturn:
    """Raise Unsupported: the losses of the micro-batches do not determine that of the batch."""
    raise Unsupported(
        f"the loss of some examples, {loss:.6g}, is not a weighted mean or a sum of the losses of its micro-batches: "
        f"{why}. "
        "Evaluate the batch at once (without Accumulated, parts=1). Or let the loss be a sum, divided by a number "
        "that the batch contains."
    )


def _weights(candidate: Candidate, fractions: list[float], found: list[Observed]) -> list[float]:
    """Return the weights of groups of examples under a candidate; nan where a count is not known."""
    if candidate == SUM:
        return [1.0] * len(found)
    return shares([count_of(candidate, fraction, one) for fraction, one in zip(fractions, found, strict=True)])


def _exact(errors: dict[Candidate, float], model: nn.Module) -> list[Candidate]:
    """Return the candidates with at most 10 times the least relative error; none if that is more than rounding."""
    best = min(errors.values(), default=math.inf)
    is_half = any(parameter.dtype not in (torch.float32, torch.float64) for parameter in model.parameters())
    is_half = is_half or any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    if best > (_HALF_TOLERANCE if is_half else _TOLERANCE):
        return []
    return [candidate for candidate, error in errors.items() if error <= max(10 * best, 1e-14)]


def _unbiased(differences: dict[Candidate, list[float]]) -> list[Candidate]:
    """Return the candidates whose mean error is within the noise of a random loss; always the best one."""
    errors = {name: abs(statistics.fmean(found)) for name, found in differences.items()}
    noise = {name: statistics.stdev(found) / math.sqrt(_KEYS) for name, found in differences.items()}
    return [name for name, error in errors.items() if error <= max(3 * noise[name], min(errors.values()))]
