"""Momentum of seeds: the last gradients, kept as what made them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.value import value
from gradcost.directions import Directions
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.combine import Sign
from gradcost.estimators.estimator import Estimate, Estimator, LeafConsumer, State
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.probing import Probing, replayed

# The seeds and the coefficients of one estimate; a state is those of the last ones, the newest first.
Past = tuple[tuple[int, ...], tuple[float, ...]]


@value
class Momentum(Estimator):
    """g_t = sum_j decay^j ghat_(t-j) / sum_j decay^j over the last w = min(t + 1, window) estimates of `estimator`.

    It is the exponential moving average of heavy-ball momentum (Polyak 1964), cut off after `window` estimates and
    normalised: on a gradient that stands still its mean is that gradient from the first step on. Instead of a
    tensor as large as the weights the state keeps seeds and coefficients: 16 bytes a probe and estimate. A replay
    draws the noise of all w estimates.

    Biased once the weights move, as every momentum is: an old estimate is one of the gradient at old weights.

    The estimate's slopes are those of its own directions, the newest. Raises: ValueError when decay is not in
    [0, 1], window < 1, or the gradients of `estimator` are not seeded along plain `Directions`.
    """

    estimator: Estimator
    decay: float = 0.9
    window: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise BadInput(f"decay is what a step leaves of an older estimate's weight, 0 to 1, not {self.decay!r}.")
        if self.window < 1:
            raise BadInput(f"window is how many estimates are averaged: 1 or more, not {self.window!r}.")

    def init(self, objective: Objective) -> tuple[Past, ...]:
        return ()

    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        found = self.estimator.estimate(objective, batch, key)
        gradient = found.gradient
        if not isinstance(gradient, Seeded) or not _is_replayable(self.estimator):
            raise Unsupported(self._unkept())
        past: tuple[Past, ...] = ((gradient.seeds, gradient.coefficients), *(state or ()))[: self.window]
        weights = [self.decay**age for age in range(len(past))]
        total = sum(weights)
        seeds = tuple(seed for of, _ in past for seed in of)
        coefficients = tuple(w / total * c for w, (_, of) in zip(weights, past, strict=True) for c in of)
        return replace(found, gradient=Seeded(objective, gradient.directions, seeds, coefficients), state=past)

    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        return replayed(self.estimate(objective, batch, key, state), use)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return self.estimator.objection(objective, batch) if _is_replayable(self.estimator) else self._unkept()

    def _unkept(self) -> str:
        return (
            f"the gradients of {self.estimator} are not told by seeds and coefficients alone, in all later steps "
            "too, so their momentum cannot be kept as such: use an optimizer's, as in SGD(lr, momentum=0.9)."
        )


def _is_replayable(estimator: Estimator) -> bool:
    """Whether its gradient is seeded, along directions that are the same ones in every estimate: what directions
    depend on the weights or on the past are settled to is another one each time."""
    while isinstance(estimator, Accumulated | Clipped):
        estimator = estimator.estimator
    if not isinstance(estimator, Probing):
        return False
    return isinstance(estimator.directions, Directions) and not isinstance(estimator.combine, Sign)
