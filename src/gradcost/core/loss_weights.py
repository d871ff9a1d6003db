"""The weights of micro-batches: those for which the sum of the weighted losses is the loss of the batch.

They depend on what the loss averages over: examples, targets that are not ignored (padding), a sum of class weights,
or nothing (a sum). The code does not know the loss, so it observes each division (`denominators`) and tests which of
the candidates gives the loss of a small batch from the losses of its parts. It tests again where two candidates that
passed disagree. A loss for which none passes, such as a contrastive loss, is refused.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from gradcost.core.autograd_use import examine, known_use
from gradcost.core.candidate_weights import (
    EXAMPLES,
    SUM,
    Candidate,
    Evaluate,
    count_of,
    divisions,
    passing,
    refuse,
    shares,
)
from gradcost.core.denominators import Denominator, Observed, observed
from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.fake import is_fake
from gradcost.core.first_use import can_check, findings
from gradcost.core.gradient_mode import is_plain
from gradcost.core.isolation import seeded_generators
from gradcost.core.micro_batches import selected
from gradcost.core.pytree import batch_size, leaves

T = TypeVar("T")


class WeightedLoss(NamedTuple):
    """The loss of one micro-batch.

    Args:
        weight: the factor of the loss. 0 for a micro-batch without targets, whose loss may be nan.
        loss: a scalar tensor.
        rescale: a factor of all earlier weighted losses, known from here on. 1 but for the last micro-batch.
    """

    weight: float
    loss: Tensor
    rescale: float


class Rule:
    """What the weights of the micro-batches of a loss are proportional to.

    candidates: those that no test has excluded, the preferred one first. None before the first test.
    is_static: whether the weights depend on numbers of examples only, so that nothing has to be observed.
    """

    def __init__(self) -> None:
        self.candidates: list[Candidate] | None = None
        self.is_static = False


def rule_of(model: nn.Module, loss: Callable[..., Tensor]) -> Rule:
    """Return what the tests of this model and loss found. Equal losses share it."""
    kept = findings(model, getattr(loss, "observed_loss", loss))
    return kept.setdefault(("micro-batches", model.training), Rule())


class Undecided(Unsupported):
    """Two candidates that passed the tests give different weights for this batch. `settled` tests them on it."""

    def __init__(self, shares: Sequence[Sequence[float]], preferred: Candidate, other: Candidate) -> None:
        super().__init__(
            "the weights of this batch's micro-batches are not known yet: evaluate the loss once without a tracker "
            "of memory or FLOPs before."
        )
        self.preferred, self.other = preferred, other
        ratios = [one / other if other else math.inf for one, other in zip(*shares, strict=True)]
        self.pair = sorted((ratios.index(min(ratios)), ratios.index(max(ratios))))


class Weights:
    """The weights of the micro-batches of one batch, found while their losses are computed.

    The total of a denominator is known at the last micro-batch only. Earlier weights are correct up to a common
    factor, `rescale`, which is 1 where all micro-batches have equally many targets per example.

    Args:
        model: the model.
        loss: the loss. If it wraps another one and has effects, its attribute `observed_loss` is the other one.
        parts: the number of micro-batches.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], parts: int) -> None:
        self.rule, self.parts = rule_of(model, loss), parts
        self.fractions: list[float] = []  # of the batch's examples
        self.counts: dict[Candidate, list[float]] = {}
        self.is_fake = False

    def observed(self, evaluate: Callable[[], Tensor]) -> Observed:
        """Evaluate a loss and observe what the weights depend on."""
        return Observed(evaluate(), (), True) if self.rule.is_static else observed(evaluate)

    def of(self, fraction: float, evaluated: Observed) -> WeightedLoss:
        """Return the weight of the next micro-batch. fraction: its share of the batch's examples."""
        if not self.counts:
            candidates = self.rule.candidates or [*divisions(evaluated), EXAMPLES]
            self.counts = {candidate: [] for candidate in candidates}
        self.fractions.append(fraction)
        self.is_fake = is_fake(evaluated.loss)
        for candidate, counts in self.counts.items():
            counts.append(count_of(candidate, fraction, evaluated))
        preferred = next(iter(self.counts))
        if preferred == SUM:
            return WeightedLoss(1.0, evaluated.loss, 1.0)
        counts = self._known(preferred)
        if len(counts) < self.parts or not any(counts):
            return WeightedLoss(self._relative(counts), evaluated.loss, 1.0)
        self._check_agreement(preferred)
        rescale = self._per_example(counts) / sum(counts)
        if math.isclose(rescale, 1.0, rel_tol=1e-12):
            return WeightedLoss(self._relative(counts), evaluated.loss, 1.0)
        return WeightedLoss(counts[-1] / sum(counts), evaluated.loss, rescale)

    def _known(self, candidate: Candidate) -> list[float]:
        """The counts of a candidate; numbers of examples where one is not known, as on fake tensors."""
        counts = self.counts[candidate]
        if not any(math.isnan(count) for count in counts):
            return counts
        if self.rule.candidates is not None and not self.is_fake:
            raise Unsupported(
                "the loss of a micro-batch divides by another number than that of the other micro-batches, or by one "
                "that is not above 0, so its weight is not known. Evaluate the batch at once (without Accumulated)."
            )
        return self.fractions

    def _per_example(self, counts: list[float]) -> float:
        """The count per share of the examples, of the first micro-batch that has any."""
        return next((c / f for c, f in zip(counts, self.fractions, strict=False) if c), 1.0)

    def _relative(self, counts: list[float]) -> float:
        """The weight of the latest micro-batch if all others had as many targets per example as the first."""
        weight, fraction = counts[-1] / self._per_example(counts), self.fractions[-1]
        if not any(counts):
            return fraction if len(counts) == self.parts else 0.0
        return fraction if math.isclose(weight, fraction, rel_tol=1e-12) else weight

    def _check_agreement(self, preferred: Candidate) -> None:
        if self.rule.candidates is None:
            return
        expected = shares(self._known(preferred))
        for name in self.counts:
            if name != SUM and not _close(found := shares(self._known(name)), expected):
                raise Undecided((expected, found), preferred, name)


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in zip(one, other, strict=True))


def weighted_sum(losses: Iterable[WeightedLoss]) -> Tensor:
    """Return the loss of the batch from those of its micro-batches."""
    total: Tensor | None = None
    for weight, loss, rescale in losses:
        if rescale != 1.0 and total is not None:
            total = total * rescale
        if weight:  # without targets the loss may be nan
            total = weight * loss if total is None else total + weight * loss
    assert total is not None
    return total


# ---- tests of the candidates


def settled(objective: Any, batch: Any, key: Any, work: Callable[[], T]) -> T:
    """Return `work()`, which evaluates the objective on the batch. Test the candidates for the weights where needed.

    Args:
        objective: the Objective.
        batch: any pytree.
        key: seeds the random layers.
        work: has no effect before the last micro-batch's loss is known, so that it can be repeated.
    """
    if hasattr(objective.loss, "observed_loss") or not (can_check(objective.model) and is_plain()):
        return work()
    rule, evaluate = rule_of(objective.model, objective.loss), loss_in_eval_mode(objective, key)
    if rule.candidates is None:
        objective.prepare(batch, key)
        if known_use(objective) is None:
            examine(objective, batch, key)
        _first_test(rule, evaluate, batch, objective)
    while True:
        try:
            return work()
        except Undecided as error:
            rows = _rows_of_parts(batch, objective.parts)
            kept = passing(
                rule.candidates or [], evaluate, batch, [rows[part] for part in error.pair], objective.model
            )
            if error.preferred in kept:
                kept = [candidate for candidate in kept if candidate != error.other]
            rule.candidates = kept


def with_settled_weights(method: Callable[..., T]) -> Callable[..., T]:
    """Decorate a method (self, objective, batch, key, ...) whose evaluations need the weights of micro-batches."""

    @functools.wraps(method)
    def settling(self: Any, objective: Any, batch: Any, key: Any, *rest: Any) -> T:
        if objective.parts == 1:
            return method(self, objective, batch, key, *rest)
        return settled(objective, batch, key, lambda: method(self, objective, batch, key, *rest))

    return settling


def _needs_gradients(objective: Any) -> bool:
    use = known_use(objective)
    return use is not None and use.needs_gradients


def loss_in_eval_mode(objective: Any, key: Any) -> Evaluate:
    """Return a function that evaluates the loss in eval mode; in the current mode where it fails in eval mode.

    Args:
        objective: the Objective. Its number of micro-batches does not matter.
        key: seeds the random layers.
    Returns:
        A function of (batch, number, gradients=False). number: equal numbers give equal draws. gradients: whether
        autograd records the evaluation.
    """
    in_eval_mode = True

    def evaluate(batch: Any, number: int, gradients: bool = False) -> Observed:
        nonlocal in_eval_mode
        test_key = key.fold("test", number)
        with (
            torch.set_grad_enabled(gradients or _needs_gradients(objective)),
            objective.isolation.entered(test_key),
            seeded_generators(test_key, objective.devices),
        ):
            for module in objective.modules if in_eval_mode else ():
                module.training = False
            try:
                return observed(lambda: objective.scalar_loss(batch))
            except Exception:
                if not in_eval_mode:
                    raise
        in_eval_mode = False
        return evaluate(batch, number, gradients)

    return evaluate


def _first_test(rule: Rule, evaluate: Evaluate, batch: Any, objective: Any) -> None:
    """Find the candidates. The evaluations are at most about as large as a micro-batch, or two."""
    rows = _rows_of_parts(batch, objective.parts)
    first, last = rows[0], rows[-1]
    small = [first[:1], last[: (len(last) + 1) // 2]]
    try:
        evaluate(selected(batch, small[0]), 0)
    except Exception:
        small = [first, last]  # a layer that needs several examples, such as batch norm
    whole = evaluate(selected(batch, [*itertools.chain(*small)]), 0)
    candidates = [*divisions(whole), EXAMPLES, SUM]
    kept = passing(candidates, evaluate, batch, small, objective.model)
    has_lists = len([*leaves(batch)]) != len([*leaves(selected(batch, first[:1]))])
    if not any(denominator.is_loss for denominator in whole.denominators):
        for other in rows[1:]:  # an unknown computation may average over anything
            kept = passing(kept, evaluate, batch, [first, other], objective.model)
    if not whole.is_static:
        # A denominator that depends on the weights gives the loss, but not the gradient.
        example = evaluate(selected(batch, small[0]), 0, gradients=True).denominators
        kept = [one for one in kept if isinstance(one, str) or not _depends_on_weights(example, one)]
        kept = kept or refuse(float(whole.loss))
    rule.is_static = whole.is_static and not has_lists and not {EXAMPLES, SUM}.isdisjoint(kept)
    rule.candidates = [one for one in kept if one in (EXAMPLES, SUM)] if rule.is_static else kept


def _depends_on_weights(denominators: Sequence[Denominator], index: int) -> bool:
    return len(denominators) >= -index and denominators[index].depends_on_weights


def _rows_of_parts(batch: Any, parts: int) -> list[list[int]]:
    """The examples of each micro-batch, as `split` cuts them."""
    size = batch_size(batch)
    if size < parts:
        raise BadInput(f"a batch of {size} cannot be cut into {parts} micro-batches: use at most {size}.")
    return [piece.tolist() for piece in torch.arange(size, device="cpu").tensor_split(parts)]
