"""Gradient accumulation: the same gradient with the activation memory of a smaller batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gradcost.core.batching.loss_weights import settled
from gradcost.core.batching.micro_batches import at_most, require_examples
from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.value import value
from gradcost.estimators.estimator import Estimate, Estimator, Facts, LeafConsumer, State


@value
class Accumulated(Estimator):
    """Gradient accumulation: apply `estimator` to a batch that is evaluated as micro-batches, one after the other.

    Law: for every estimator, the estimate equals that without micro-batches, along the same directions, up to
    rounding. Exceptions are layers that mix the examples of a batch (BatchNorm) or draw one mask for the batch.

    The estimate of a batch with fewer examples than `parts`, such as the last one of an epoch, has one example per
    micro-batch. But `objection` refuses such a batch: `train` begins with a larger one, and forecasts need one.

    The weight of a micro-batch is the fraction of the batch's denominator that it contributes. The denominator counts
    examples, targets that are not ignored, or class weights. For a loss that is a sum, the weight is 1. The
    first estimate (and the 8th, 32nd, 128th, ...) tests which of these applies, by a few small evaluations in eval
    mode. A batch is tested too if two possible denominators give different weights for it but gave equal ones before.

    Args:
        estimator: the estimator to apply to the batch.
        parts: the number of micro-batches per batch.
    Raises:
        BadInput: parts < 1, or the batch of `objection` has fewer examples than parts.
        Unsupported: the losses of the micro-batches do not determine that of the batch (a contrastive loss), or an
            object in the batch cannot be split.
    """

    estimator: Estimator
    parts: int

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise BadInput(f"parts is the number of micro-batches per batch, 1 or more, not {self.parts!r}.")

    @property
    def facts(self) -> Facts:
        return self.estimator.facts._replace(inner=self.estimator, transparent=True)

    def init(self, objective: Objective) -> State | None:
        return self.estimator.init(objective.in_micro_batches(self.parts))

    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        return self.estimator.estimate(self._in_parts(objective, batch), batch, key, state)

    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        return self.estimator.stream(self._in_parts(objective, batch), batch, key, use, state)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        in_parts = objective.in_micro_batches(self.parts)
        if in_parts.parts > 1:
            require_examples(batch, in_parts.parts)
        try:
            settled(in_parts, batch, Key(0), _nothing)
        except Unsupported as reason:
            return str(reason)
        return self.estimator.objection(in_parts, batch)

    def _in_parts(self, objective: Objective, batch: Any) -> Objective:
        return replace(objective, parts=at_most(objective.parts * self.parts, batch))


def _nothing() -> None:
    pass
