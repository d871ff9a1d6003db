"""Clip slopes, because along a few directions the loss is much steeper than along most."""

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
    """Clip each slope of `estimator` to [-slope, slope] before it multiplies its direction.

    The slopes are clipped, not the norm of the estimate. For d weights, a one-probe estimate is about sqrt(d) times
    as long as the gradient, so a limit on its norm would shorten every step, as in normalised SGD. The clipped
    estimate is biased: it is shorter on average. `Estimate.clipped` is the fraction of slopes that were clipped;
    `Estimate.slopes` holds the slopes before clipping.

    Args:
        estimator: the estimator whose slopes are clipped.
        slope: the largest absolute value of a clipped slope, in units of the loss.
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
        return self.estimator.facts._replace(
            inner=self.estimator, exact=False, unbiased=False, scales_with_slopes=False, transparent=True
        )

    def init(self, objective: Objective) -> State | None:
        return self.estimator.init(objective)

    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        if (reason := self._refusal()) is not None:
            raise Unsupported(reason)
        unclipped = self.estimator.estimate(objective, batch, key, state)
        assert unclipped.slopes is not None
        assert isinstance(unclipped.gradient, Seeded)
        too_steep = unclipped.slopes.abs() > self.slope
        factors = (self.slope / unclipped.slopes.abs()).where(too_steep, 1.0)
        gradient = unclipped.gradient.scaled(numbers(factors))
        return replace(unclipped, gradient=gradient, clipped=sum(numbers(too_steep.double())) / len(too_steep))

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
        cure = "use combine=Mean()" if self.estimator.inner is None else "put Clipped around the estimator inside it"
        return (
            f"the gradient of {self.estimator} is not a sum of slopes times directions, so its slopes cannot be "
            f"clipped: {cure}."
        )
