"""The weights of micro-batches: the sum of their weighted losses is the loss of the batch.

The weights depend on what the loss averages over: examples, targets that are not ignored (padding), a sum of class
weights, or nothing (a sum). The loss is any function. So its divisions are observed (`denominators`), and each is a
candidate. A test selects the candidates that give the loss of a small batch from the losses of its parts. The test is
repeated at some later uses (`is_due`), on the first batch with other `traits`, such as padding, and on a batch for
which two selected candidates give different weights. If no candidate passes, as for a contrastive loss, `Unsupported`
is raised.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from gradcost.core.batching.batch_traits import traits
from gradcost.core.batching.candidate_weights import (
    EXAMPLES,
    SUM,
    Candidate,
    Evaluate,
    count_of,
    divisions,
    kink_of_average,
    passing,
    refuse,
    shares,
)
from gradcost.core.batching.denominators import Denominator, Observed, observed
from gradcost.core.batching.micro_batches import require_examples, selected
from gradcost.core.errors import GradcostError, Unsupported, brief
from gradcost.core.evaluation.autograd_use import custom_functions, examine, known_use
from gradcost.core.evaluation.first_use import can_check, findings, is_due
from gradcost.core.evaluation.gradient_mode import is_plain
from gradcost.core.evaluation.loss_without_draws import loss_without_draws
from gradcost.core.fake import is_fake
from gradcost.core.interrupts import raise_interrupt
from gradcost.core.notes import warn_once
from gradcost.core.pytree import leaves

T = TypeVar("T")
_MOST_KINDS = 32  # keys of `traits` that are tested; bounds the cost where they differ from batch to batch


class WeightedLoss(NamedTuple):
    """The loss of one micro-batch.

    Args:
        weight: the factor of the loss. 0 for a micro-batch without targets, whose loss may be nan.
        loss: a scalar tensor.
        rescale: multiply all earlier weighted losses by this factor. Always 1 before the last micro-batch.
    """

    weight: float
    loss: Tensor
    rescale: float


class Rule:
    """The candidates for the quantity to which the weights of a loss's micro-batches are proportional.

    candidates: those that no test has excluded, the preferred one first. None before the first test.
    is_static: whether the weights depend on numbers of examples only, so that divisions need not be observed.
    uses: number of calls of `settled`; `is_due` of it repeats the test.
    tested: the keys of the batches' `traits` with which it was tested.
    """

    def __init__(self) -> None:
        self.candidates: list[Candidate] | None = None
        self.is_static = False
        self.uses = 0
        self.tested: set[Any] = set()


def rule_of(model: nn.Module, loss: Callable[..., Tensor]) -> Rule:
    """Return the Rule that the tests of this model and loss have set. Equal losses have the same Rule."""
    stored = findings(model, getattr(loss, "observed_loss", loss))
    return stored.setdefault(("micro-batches", model.training), Rule())


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
    """The weights of the micro-batches of one batch, computed along with their losses.

    The sum of the denominators is known only at the last micro-batch. Earlier weights are correct up to a common
    factor, `rescale`, which is 1 where all micro-batches have equally many targets per example.

    Args:
        model: the model.
        loss: the loss. If it wraps another loss and has side effects, its attribute `observed_loss` is that loss.
        parts: the number of micro-batches.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], parts: int) -> None:
        self.rule, self.parts = rule_of(model, loss), parts
        self.fractions: list[float] = []  # per micro-batch, of the batch's examples
        self.counts: dict[Candidate, list[float]] = {}
        self.is_fake = False

    def observed(self, evaluate: Callable[[], Tensor]) -> Observed:
        """Evaluate a loss, and observe its divisions if the weights depend on them."""
        return Observed(evaluate(), (), True) if self.rule.is_static else observed(evaluate)

    def of(self, fraction: float, evaluated: Observed) -> WeightedLoss:
        """Return the weight of the next micro-batch. fraction: that of the batch's examples in it."""
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
        """Return the counts of a candidate; fractions of examples if a count is not known, as on fake tensors."""
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
        """Return count / fraction of examples of the first micro-batch with a count above 0; 1 without one."""
        return next((c / f for c, f in zip(counts, self.fractions, strict=False) if c), 1.0)

    def _relative(self, counts: list[float]) -> float:
        """Return the latest micro-batch's weight, before `rescale`. Its unit is count / fraction of the first one."""
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
        if weight:  # 0: a micro-batch without targets, whose loss may be nan
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
        work: may run several times, so it must have no effect before the last micro-batch's loss is known.
    """
    if hasattr(objective.loss, "observed_loss") or not (can_check(objective.model) and is_plain()):
        return work()
    rule, evaluate = rule_of(objective.model, objective.loss), loss_without_draws(objective, key)
    rule.uses += 1
    rows = _rows_of_parts(batch, objective.parts)
    kinds, pairs = traits(batch, rows)
    if rule.candidates is None or is_due(rule.uses) or (kinds not in rule.tested and len(rule.tested) < _MOST_KINDS):
        with _errors_of_parts():
            objective.prepare(batch, key)
            if known_use(objective) is None:
                examine(objective, batch, key)
            _test(rule, evaluate, batch, objective, rows, pairs)
        rule.tested.add(kinds)
    while True:
        try:
            return work()
        except Undecided as error:
            remaining = passing(
                rule.candidates or [], evaluate, batch, [rows[part] for part in error.pair], objective.model
            )
            if error.preferred in remaining:
                remaining = [candidate for candidate in remaining if candidate != error.other]
            rule.candidates = remaining


@contextmanager
def _errors_of_parts() -> Iterator[None]:
    try:
        yield
    except (GradcostError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise_interrupt(error)
        raise Unsupported(
            f"the loss cannot be evaluated on some of the examples of this batch ({brief(error)}), as micro-batches "
            "need. Evaluate the batch at once (without Accumulated, parts=1)."
        ) from error


def with_settled_weights(method: Callable[..., T]) -> Callable[..., T]:
    """Decorate a method (self, objective, batch, key, ...) whose evaluations need the weights of micro-batches."""

    @functools.wraps(method)
    def settling(self: Any, objective: Any, batch: Any, key: Any, *rest: Any) -> T:
        if objective.parts == 1:
            return method(self, objective, batch, key, *rest)
        return settled(objective, batch, key, lambda: method(self, objective, batch, key, *rest))

    return settling


def _test(
    rule: Rule,
    evaluate: Evaluate,
    batch: Any,
    objective: Any,
    rows: Sequence[list[int]],
    pairs: Sequence[tuple[int, int]],
) -> None:
    """Set the candidates by a test. Its evaluations have at most the examples of two micro-batches.

    A candidate that an earlier test excluded stays excluded, unless all others are: then the loss has changed.

    Args:
        rule: gets the candidates.
        evaluate: evaluates the loss.
        batch: any pytree.
        objective: the Objective.
        rows: the examples of each micro-batch.
        pairs: micro-batches on which the candidates are tested too.
    """
    first, last = rows[0], rows[-1]
    small = [first[:1], last[: (len(last) + 1) // 2]]
    least = [first[:1], last[:1]]  # for graphs: the blocks of a `Reverse` are not recomputed here
    try:
        evaluate(selected(batch, small[0]), 0)
    except Exception as error:
        raise_interrupt(error)
        small = least = [first, last]  # a layer that needs several examples, such as batch norm
    combined = evaluate(selected(batch, [*itertools.chain(*small)]), 0)
    candidates = [*divisions(combined), EXAMPLES, SUM]
    remaining = passing(candidates, evaluate, batch, small, objective.model)
    has_lists = len([*leaves(batch)]) != len([*leaves(selected(batch, first[:1]))])
    if not any(denominator.is_loss for denominator in combined.denominators):
        for other in rows[1:]:  # no observed division gives the loss: it may average over anything
            remaining = passing(remaining, evaluate, batch, [first, other], objective.model)
    for pair in pairs:
        remaining = passing(remaining, evaluate, batch, [rows[part] for part in sorted(pair)], objective.model)
    remaining = [one for one in remaining if one in (rule.candidates or remaining)] or remaining
    groups = least[0], [*itertools.chain(*least)]
    with_graphs = [evaluate(selected(batch, group), 0, gradients=True) for group in groups]
    kink = kink_of_average(with_graphs[0].loss, with_graphs[1].loss)
    if kink is not None:
        refuse(float(combined.loss), f"it applies `{kink}` to an average over examples")
    if names := custom_functions(objective):
        warn_once(
            objective.model,
            "custom functions in micro-batches",
            "micro-batches are weighted by what the value of the loss averages over. If the backward of "
            f"`{names[0]}` adds a gradient that the value does not show (an auxiliary loss), it is added once per "
            "micro-batch.",
        )
    if not combined.is_static:
        # If a denominator depends on the parameters, the weighted sum has the right loss, but a wrong gradient.
        example = with_graphs[0].denominators
        remaining = [one for one in remaining if isinstance(one, str) or not _depends_on_weights(example, one)]
        remaining = remaining or refuse(float(combined.loss))
    rule.is_static = combined.is_static and not has_lists and not {EXAMPLES, SUM}.isdisjoint(remaining)
    rule.candidates = [one for one in remaining if one in (EXAMPLES, SUM)] if rule.is_static else remaining


def _depends_on_weights(denominators: Sequence[Denominator], index: int) -> bool:
    return len(denominators) >= -index and denominators[index].depends_on_weights


def _rows_of_parts(batch: Any, parts: int) -> list[list[int]]:
    """Return the indices of the examples of each micro-batch, in the division of `split`."""
    size = require_examples(batch, parts)
    return [piece.tolist() for piece in torch.arange(size, device="cpu").tensor_split(parts)]
