"""Forward gradients and zero-order finite differences: one estimator with two ways to measure a slope."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.fake import numbers
from gradcost.core.finite import require_finite
from gradcost.core.key import Key
from gradcost.core.memory_events import tag
from gradcost.core.objective import Objective
from gradcost.core.value import value
from gradcost.directions import Directions, Gaussian, StatefulDirections
from gradcost.estimators.combine import Combine, Mean
from gradcost.estimators.estimator import Estimate, Estimator, Facts, LeafConsumer, State, use_none
from gradcost.estimators.gradient import Seeded, Streamed
from gradcost.slopes.slope import Slope


@value
class Probing(Estimator):
    """g = combine of s_k z_k, where z_k is a random direction and s_k the slope of the loss along z_k.

    Law: unbiased if `directions`, `combine` and `slope` are unbiased. For the mean of n independent directions in
    d dimensions E|g|^2 = (1 + (d + 1)/n) |grad|^2 (Gaussian) or (1 + (d - 1)/n) |grad|^2 (Rademacher).

    Memory: the gradient is seeded, 16 bytes per probe for any model.

    Args:
        slope: the way to measure a slope: Jvp or a finite difference.
        directions: the distribution of the directions.
        probes: n, the number of directions per estimate.
        combine: the rule that combines slopes and directions into one gradient.
    Raises:
        BadInput: probes < 1.
        Unsupported: `combine` is Projection(), and the directions are not `symmetric`.
    """

    slope: Slope
    directions: Directions | StatefulDirections = Gaussian()
    probes: int = 1
    combine: Combine = Mean()

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise BadInput(f"probes is the number of directions per estimate, 1 or more, not {self.probes!r}.")

    @property
    def facts(self) -> Facts:
        return Facts(
            unbiased=self.directions.unbiased and self.combine.unbiased and self._refusal() is None,
            replayable=isinstance(self.directions, Directions) and self.combine.seeded,
            scales_with_slopes=self.combine.scales_with_slopes,
        )

    def init(self, objective: Objective) -> State | None:
        return self.directions.init(objective) if isinstance(self.directions, StatefulDirections) else None

    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        if (reason := self._refusal()) is not None:
            raise Unsupported(reason)
        if isinstance(self.directions, StatefulDirections):
            state = self.init(objective) if state is None else state
            directions, state = self.directions.resolve(objective, key, state)
            estimate = self._along(directions, objective, batch, key)
            return replace(estimate, state=self.directions.update(state, estimate.gradient.leaves()))
        return self._along(self.directions, objective, batch, key)

    def _along(self, directions: Directions, objective: Objective, batch: Any, key: Key) -> Estimate:
        seeds = directions.seeds(key, self.probes, objective.dimension)
        loss, slopes = self.slope.measure(objective, batch, key, directions, seeds)
        require_finite(loss, slopes)
        return Estimate(loss, self.combine.gradient(objective, directions, seeds, numbers(slopes)), slopes)

    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        return replayed(self.estimate(objective, batch, key, state), use)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return self._refusal() or self.slope.objection(objective, batch)

    def _refusal(self) -> str | None:
        if not self.combine.needs_symmetry or self.directions.symmetric:
            return None
        return (
            f"{self.combine} is biased along {self.directions}: the mean of their projection scales each parameter's "
            "gradient by a different factor. Use Mean(), or Gaussian(), Rademacher(), Sphere(), Orthogonal() or "
            "Coordinates()."
        )


def replayed(estimate: Estimate, use: LeafConsumer) -> Estimate:
    """Pass the gradient of an estimate to `use`, one parameter at a time, with one tensor in memory.

    If `use` has a true attribute `takes_pieces`, as for plain SGD, it gets pieces of a parameter instead where the
    gradient allows it, by `use.use_piece(name, start, piece)`. So no gradient of a large parameter is in memory.

    Args:
        estimate: an estimate with a gradient other than `Streamed`.
        use: called as `use(name, gradient)` for each parameter.
    Returns:
        The estimate, with a gradient of type `Streamed`.
    """
    gradient = estimate.gradient
    if getattr(use, "takes_pieces", False) and isinstance(gradient, Seeded) and gradient.has_pieces:
        for name, start, piece in gradient.pieces():
            use.use_piece(name, start, tag("gradients", piece))  # type: ignore[attr-defined]
            del piece
    else:
        names = gradient.unused
        unused = {leaf.name: leaf for leaf in gradient.objective.leaves if leaf.name in names}
        for name, tensor in gradient.leaves():
            with torch.no_grad():
                if name in unused:
                    use_none(use, unused[name])
                else:
                    use(name, tag("gradients", tensor))
            del tensor  # before the next one is allocated
    return replace(estimate, gradient=Streamed(gradient.objective, gradient.message_nbytes))
