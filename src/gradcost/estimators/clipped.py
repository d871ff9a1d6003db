"""A cap on the slopes, for the rare direction along which the loss is very steep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.fake import numbers
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.value import value
from gradcost.estimators.estimator import Estimate, Estimator, Facts, LeafConsumer, State
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.probing import replayed


@value
class Clipped(Estimator):
    """`estimator` with each slope clipped to [-slope, slope] before it multiplies its direction.

    The slope is clipped, not the gradient. One direction is about sqrt(d) times as long as the gradient, so clipping
    the gradient's norm would cut every step and amount to normalised SGD. Clipping slopes shortens the estimate on
    average. `Estimate.clipped` is the share of slopes that were cut; `Estimate.slopes` holds the slopes before it.

    Args:
        estimator: the estimator whose slopes are clipped.
        slope: the largest absolute slope, in units of the loss per unit of a direction.
    Raises:
        BadInput: slope is not above 0.
        Unsupported: the gradient is not a sum of slopes times directions.
    Source: Rike and Foerland 2022 (directional derivatives capped at 1).
    """

    estimator: Estimator
    slope: float = 1.0

    def __post_init__(self) -> None:
        if not self.slope > 0:
            raise BadInput(f"the cap on the slope must be above 0, not {self.slope!r}.")

    @property
    def facts(self) -> Facts:
        return self.estimator.facts._replace(inner=self.estimator, exact=False, unbiased=False, transparent=True)

    def init(self, objective: Objective) -> State | None:
        return self.estimator.init(objective)

    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        if (reason := self._refusal()) is not None:
            raise Unsupported(reason)
        found = self.estimator.estimate(objective, batch, key, state)
        assert found.slopes is not None
        assert isinstance(found.gradient, Seeded)
        cut = found.slopes.abs() > self.slope
        factors = (self.slope / found.slopes.abs()).where(cut, 1.0)
        gradient = found.gradient.scaled(numbers(factors))
        return replace(found, gradient=gradient, clipped=sum(numbers(cut.double())) / len(cut))

    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        return replayed(self.estimate(objective, batch, key, state), use)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return self._refusal() or self.estimator.objection(objective, batch)

    def _refusal(self) -> str | None:
        if self.estimator.scales_with_slopes:
            return None
        if self.estimator.exact:
            return f"{self.estimator} measures no slopes to clip: clip the norm of its gradient instead."
        return (
            f"the gradient of {self.estimator} is not a sum of slopes times directions, so its slopes cannot be "
            "clipped: put Clipped around the estimator inside it."
        )
