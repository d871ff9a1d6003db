"""Forward gradients and zero-order differences: one method, two ways of measuring a slope."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from gradcost.core.errors import BadInput
from gradcost.core.fake import numbers
from gradcost.core.key import Key
from gradcost.core.memory_events import tag
from gradcost.core.objective import Objective
from gradcost.core.value import value
from gradcost.directions import Directions, Gaussian, StatefulDirections
from gradcost.directions.direction import begun
from gradcost.estimators.combine import Combine, Mean
from gradcost.estimators.estimator import Estimate, Estimator, LeafConsumer, State
from gradcost.estimators.gradient import Streamed
from gradcost.slopes.slope import Slope


@value
class Probing(Estimator):
    """g = combine of s_k z_k: look along random directions, weigh each by the slope of the loss along it.

    Unbiased when the directions, the combination and the slope are. With independent directions and the
    mean, E|g|^2 = (1 + (d + 1)/n) |grad|^2 for Gaussian and (1 + (d - 1)/n) |grad|^2 for Rademacher ones.
    The gradient is seeded: 16 bytes a probe, whatever the model.

    Raises: ValueError when probes < 1.
    """

    slope: Slope
    directions: Directions | StatefulDirections = Gaussian()
    probes: int = 1
    combine: Combine = Mean()

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise BadInput(f"probes is how many directions an estimate looks along: 1 or more, not {self.probes!r}.")

    def init(self, objective: Objective) -> State | None:
        return self.directions.init(objective) if isinstance(self.directions, StatefulDirections) else None

    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        if isinstance(self.directions, StatefulDirections):
            state = begun(self.directions, key, self.init(objective) if state is None else state)
            found = self._along(self.directions.resolve(objective, key, state), objective, batch, key)
            return replace(found, state=self.directions.update(state, found.gradient.leaves()))
        return self._along(self.directions, objective, batch, key)

    def _along(self, directions: Directions, objective: Objective, batch: Any, key: Key) -> Estimate:
        seeds = directions.seeds(key, self.probes, objective.dimension)
        loss, slopes = self.slope.measure(objective, batch, key, directions, seeds)
        return Estimate(loss, self.combine.gradient(objective, directions, seeds, numbers(slopes)), slopes)

    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        return replayed(self.estimate(objective, batch, key, state), use)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return self.slope.objection(objective, batch)


def replayed(estimate: Estimate, use: LeafConsumer) -> Estimate:
    """Hand out the leaves of an estimate's gradient, one alive at a time."""
    for name, gradient in estimate.gradient.leaves():
        with torch.no_grad():
            use(name, tag("gradients", gradient))
        del gradient  # before the next one is made
    return replace(estimate, gradient=Streamed(estimate.gradient.objective, estimate.gradient.nbytes))
