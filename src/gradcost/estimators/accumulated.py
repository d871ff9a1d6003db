"""Micro-batches: the same gradient with a smaller batch's activations."""

from __future__ import annotations

from typing import Any

from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.value import value
from gradcost.estimators.estimator import Estimate, Estimator, LeafConsumer, State


@value
class Accumulated(Estimator):
    """`estimator`, with each batch cut into `parts` micro-batches that are evaluated one after the other.

    Law: the estimate is that of the whole batch (the mean, weighted by size), for every estimator, along the
    same directions; up to rounding, and to layers that mix the examples of a batch or draw a mask for it.

    Raises: ValueError when parts < 1, or a batch is smaller than parts.
    """

    estimator: Estimator
    parts: int

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise BadInput(f"a batch is cut into 1 part or more, not {self.parts!r}.")

    def init(self, objective: Objective) -> State | None:
        return self.estimator.init(objective.in_parts(self.parts))

    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        return self.estimator.estimate(objective.in_parts(self.parts), batch, key, state)

    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        return self.estimator.stream(objective.in_parts(self.parts), batch, key, use, state)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return self.estimator.objection(objective.in_parts(self.parts), batch)
