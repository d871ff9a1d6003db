"""One estimator for long examples, another for short ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradcost.core.batching.micro_batches import selected
from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.evaluation.first_use import can_check, findings
from gradcost.core.evaluation.loss_without_draws import loss_without_draws
from gradcost.core.fake import is_fake, known
from gradcost.core.interrupts import raise_interrupt
from gradcost.core.key import Key
from gradcost.core.notes import warn_once
from gradcost.core.objective import Objective
from gradcost.core.pytree import tree_map
from gradcost.core.value import value
from gradcost.estimators.estimator import Estimate, Estimator, Facts, LeafConsumer, State
from gradcost.estimators.gradient import Seeded, Streamed, Sum
from gradcost.estimators.probing import replayed


class Lengths(NamedTuple):
    """The state of `ByLength`: the states of its two estimators."""

    short: State | None
    long: State | None


class _Groups(NamedTuple):
    """The short and the long examples of a batch (None if there are none), and the fraction of long examples."""

    short: Any
    long: Any
    long_fraction: float


@value
class ByLength(Estimator):
    """g = weight * g_long + (1 - weight) * g_short: one estimator for long examples, another for short ones.

    An example is long if it has more than `longest` tokens. Its number of tokens is its row sum in
    batch["attention_mask"], a tensor of zeros and ones of shape (examples, tokens). If all examples of a batch are
    long, or all short, g is their gradient.

    Memory: each estimator gets its group without the columns at either end that are padding in all its examples. They
    are removed from every tensor whose first two dimensions are those of the mask. So backprop of the short examples
    does not save activations for the padding that only long examples need. The first use compares the losses with and
    without these columns, in eval mode. If they differ (padding on the left and absolute positions, or a mean over
    all columns), the columns stay, and a Note reports it.

    Law: if both estimators are unbiased, E g is the gradient of
    weight * (mean loss of the long examples) + (1 - weight) * (mean loss of the short examples).
    That is the gradient of the batch's mean loss only if `weight` is the fraction of long examples.

    `Estimate.loss` is the mean loss of the batch; `Estimate.slopes` are those of `long`. If the gradient of the long
    examples is `Seeded` (seeds of directions, and coefficients), `stream` never stores all gradients at once.

    Args:
        short: the estimator for examples of at most `longest` tokens.
        long: the estimator for longer examples.
        longest: the most tokens of a short example.
        weight: the weight of the long examples' gradient, in [0, 1].
    Raises:
        BadInput: longest < 1, or weight is not in [0, 1].
        Unsupported: a batch has no attention mask, or a forecast cannot test the removal of padding on the left.
    Source: Addax (Li et al., arXiv 2410.06441, algorithm 1), which draws its two batches from two parts of the data.
        `ByLength` divides each batch instead.
    """

    short: Estimator
    long: Estimator
    longest: int
    weight: float = 0.5

    def __post_init__(self) -> None:
        if self.longest < 1:
            raise BadInput(f"longest, the most tokens of a short example, must be 1 or more, not {self.longest!r}.")
        if not 0 <= self.weight <= 1:
            raise BadInput(
                f"weight, the factor of the long examples' gradient, must be between 0 and 1, not {self.weight!r}."
            )

    @property
    def facts(self) -> Facts:
        return Facts()  # not unbiased: E g is the gradient of a weighted loss, not of the batch's mean loss

    def init(self, objective: Objective) -> Lengths | None:
        return _lengths(self.short.init(objective), self.long.init(objective))

    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        before, groups = state or Lengths(None, None), self._divided(objective, batch, key)
        if groups.short is None or groups.long is None:
            return self._of_single_group(objective, groups, key, before, None)
        long = self.long.estimate(objective, groups.long, key, before.long)
        short = self.short.estimate(objective, groups.short, key, before.short)
        gradient = Sum(objective, (long.gradient, short.gradient), (self.weight, 1 - self.weight))
        state = _lengths(short.state, long.state)
        return Estimate(_mean_loss(long, short, groups.long_fraction), gradient, long.slopes, state, long.clipped)

    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        before, groups = state or Lengths(None, None), self._divided(objective, batch, key)
        if groups.short is None or groups.long is None:
            return self._of_single_group(objective, groups, key, before, use)
        long = self.long.estimate(objective, groups.long, key, before.long)
        if not isinstance(long.gradient, Seeded):  # compute all gradients, then pass them on one by one
            return replayed(self.estimate(objective, batch, key, state), use)
        seeded, leaves = long.gradient, {leaf.name: leaf for leaf in objective.leaves}

        def use_sum(name: str, short_gradient: Tensor) -> None:
            long_gradient = seeded.directions.draw(leaves[name], seeded.seeds, seeded.coefficients)
            short_gradient = short_gradient.to_dense() if short_gradient.is_sparse else short_gradient
            use(name, short_gradient.mul_(1 - self.weight).add_(long_gradient.mul_(self.weight)))

        short = self.short.stream(objective, groups.short, key, use_sum, before.short)
        message = seeded.nbytes + short.gradient.message_nbytes
        state = _lengths(short.state, long.state)
        streamed = Streamed(objective, message)
        return Estimate(_mean_loss(long, short, groups.long_fraction), streamed, long.slopes, state, long.clipped)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        mask = _mask(batch)
        if isinstance(mask, str):
            return mask
        try:
            groups = self._divided(objective, batch, Key(0))
        except Unsupported as reason:
            return str(reason)
        return self.short.objection(
            objective, batch if groups.short is None else groups.short
        ) or self.long.objection(objective, batch if groups.long is None else groups.long)

    def _of_single_group(
        self, objective: Objective, groups: _Groups, key: Key, before: Lengths, use: LeafConsumer | None
    ) -> Estimate:
        """Return the estimate of a batch that is all short or all long. The other estimator keeps its state."""
        estimator, group, state = (
            (self.long, groups.long, before.long)
            if groups.short is None
            else (self.short, groups.short, before.short)
        )
        if use is None:
            found = estimator.estimate(objective, group, key, state)
        else:
            found = estimator.stream(objective, group, key, use, state)
        after = before._replace(long=found.state) if groups.short is None else before._replace(short=found.state)
        return Estimate(found.loss, found.gradient, found.slopes, _lengths(*after), found.clipped)

    def _divided(self, objective: Objective, batch: Any, key: Key) -> _Groups:
        mask = _mask(batch)
        if isinstance(mask, str):
            raise Unsupported(mask)
        is_long = mask.sum(1) > self.longest
        short, long = (
            _group(objective, key, batch, mask, np.flatnonzero(rows).tolist()) for rows in (~is_long, is_long)
        )
        return _Groups(short, long, float(is_long.mean()))


def _group(objective: Objective, key: Key, batch: Any, mask: np.ndarray, rows: list[int]) -> Any:
    """Return these examples (None for no rows), without columns at either end that are padding in all of them."""
    if not rows:
        return None
    used = np.flatnonzero(mask[rows].any(0)).tolist() or [0]
    first, end, columns = used[0], used[-1] + 1, mask.shape[1]

    def cropped(first: int, end: int) -> Any:
        def cut(leaf: Any) -> Any:
            return leaf[:, first:end] if isinstance(leaf, Tensor) and leaf.shape[:2] == mask.shape else leaf

        return selected(tree_map(cut, batch), rows)

    if end < columns and not _has_same_loss(objective, key, "right", lambda: (cropped(0, end), cropped(0, columns))):
        end = columns
    if first > 0 and not _has_same_loss(objective, key, "left", lambda: (cropped(first, end), cropped(0, end))):
        first = 0
    return cropped(first, end)


def _has_same_loss(objective: Objective, key: Key, side: str, batches: Callable[[], tuple[Any, Any]]) -> bool:
    """Return whether the loss is the same without the padding on this side: compared once per model and loss."""
    model, known_results = objective.model, findings(objective.model, objective.loss)
    finding = ("padding on the " + side, False)
    if finding not in known_results:
        if not can_check(model):
            if side == "left" and is_fake(objective.leaves[0].parameter):
                raise Unsupported(
                    "a forecast of ByLength does not know whether the loss changes without padding on the left, as "
                    "with absolute positions. Pad on the right, or make one estimate before the forecast."
                )
            return side == "right"
        known_results[finding] = _is_same(objective, key, *batches())
        if not known_results[finding]:
            warn_once(
                model,
                f"padding on the {side}",
                f"ByLength keeps the padding on the {side}, because the loss of {type(model).__name__} changes "
                "without it. So short examples need as much memory as the longest.",
            )
    return known_results[finding]


def _is_same(objective: Objective, key: Key, without: Any, padded: Any) -> bool:
    objective.prepare(padded, key)
    evaluate = loss_without_draws(objective, key)
    expected = evaluate(padded, 0).loss
    try:
        found = evaluate(without, 0).loss
    except Exception as error:
        raise_interrupt(error)
        return False  # such as a model with another input of the padded length
    types = {expected.dtype, *(leaf.parameter.dtype for leaf in objective.leaves)}
    precision = max(torch.finfo(dtype).eps for dtype in types)
    # In half precision, 32 roundings would hide a change of positions.
    tolerance = 32 * precision if precision < 1e-6 else precision / 16
    return bool((found - expected).abs() <= tolerance * expected.abs())


def _mask(batch: Any) -> np.ndarray | str:
    """Return the attention mask as booleans, or a message that explains why it is not available."""
    found = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(found, Tensor) or found.ndim != 2:
        return (
            "ByLength takes the lengths from an attention mask, and this batch has none: use a dictionary with "
            '"attention_mask", of shape (examples, tokens), or use the estimator for short examples alone.'
        )
    mask = known(found)  # None: a fake tensor without values
    if mask is None:
        return (
            "a forecast of ByLength needs the values of the attention mask: use an integer or boolean mask on the "
            "CPU, or measure a real step with `gradcost.measure`."
        )
    return np.asarray(mask.tolist()) != 0


def _mean_loss(long: Estimate, short: Estimate, long_fraction: float) -> Tensor:
    return long_fraction * long.loss + (1 - long_fraction) * short.loss


def _lengths(short: State | None, long: State | None) -> Lengths | None:
    return None if short is None and long is None else Lengths(short, long)
