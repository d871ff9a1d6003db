"""A cap on the slopes, for the rare direction along which the loss is a cliff."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.fake import numbers
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.value import value
from gradcost.estimators.estimator import Estimate, Estimator, LeafConsumer, State
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.probing import replayed


@value
class Clipped(Estimator):
    """`estimator`, with each slope cut to [-slope, slope] before it weighs its direction.

    It is the slope that is clipped, not the gradient: one direction's norm is about sqrt(d) times that of the
    gradient, so a norm clip would cut every step and make normalised SGD of it. A clip biases the estimate
    towards short steps; `Estimate.clipped` says how many slopes it cut, and `Estimate.slopes` keeps them as
    they were measured.

    Source: Rike and Foerland 2022 (directional derivative capped at 1). Raises: ValueError when slope is not
    above 0, or the estimator measures no slopes.
    """

    estimator: Estimator
    slope: float = 1.0

    def __post_init__(self) -> None:
        if not self.slope > 0:
            raise BadInput(f"the cap on the slope must be above 0, not {self.slope!r}.")

    def init(self, objective: Objective) -> State | None:
        return self.estimator.init(objective)

    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        found = self.estimator.estimate(objective, batch, key, state)
        seeds = found.gradient.seeds if isinstance(found.gradient, Seeded) else ()
        if found.slopes is None or not isinstance(found.gradient, Seeded) or len(seeds) != len(found.slopes):
            raise Unsupported(self._unclippable(found.slopes is None))
        cut = found.slopes.abs() > self.slope
        factors = (self.slope / found.slopes.abs()).where(cut, 1.0)
        gradient = found.gradient.scaled(numbers(factors))
        return replace(found, gradient=gradient, clipped=sum(numbers(cut.double())) / len(cut))

    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        return replayed(self.estimate(objective, batch, key, state), use)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        from gradcost.estimators.by_length import ByLength
        from gradcost.estimators.mixed import Mixed
        from gradcost.estimators.momentum import Momentum
        from gradcost.estimators.reverse import Reverse
        from gradcost.estimators.variance_reduced import VarianceReduced

        if isinstance(self.estimator, Reverse):
            return self._unclippable(True)
        if isinstance(self.estimator, ByLength | Mixed | Momentum | VarianceReduced):
            return self._unclippable(False)
        return self.estimator.objection(objective, batch)

    def _unclippable(self, without_slopes: bool) -> str:
        if without_slopes:
            return f"{self.estimator} measures no slopes to clip: clip the norm of its gradient instead."
        return (
            f"the gradient of {self.estimator} is more than one slope times each of its directions, so there are no "
            "slopes of it to clip: put Clipped around the estimator within it instead."
        )
