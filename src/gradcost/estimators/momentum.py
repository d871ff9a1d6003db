"""Momentum for seeded gradients: past gradients are stored as seeds and coefficients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.value import value
from gradcost.estimators.estimator import Estimate, Estimator, Facts, LeafConsumer, State
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.probing import replayed

# The seeds and the coefficients of one estimate. The state is a tuple of these, the newest estimate first.
Past = tuple[tuple[int, ...], tuple[float, ...]]


@value
class Momentum(Estimator):
    """g_t = sum_j decay^j ghat_(t-j) / sum_j decay^j over the last w = min(t + 1, window) estimates of `estimator`.

    t is the number of earlier estimates and ghat_t the newest estimate. g_t is the exponential moving average of
    heavy-ball momentum (Polyak 1964), truncated after `window` estimates and normalised: if the gradient is constant,
    E g_t is that gradient from the first step on.

    Memory: the state has 16 bytes per probe and estimate (a seed and a coefficient), instead of a tensor as large as
    the parameters. Each reading of g_t regenerates the directions of all w estimates.

    Unbiased as long as the parameters do not change. After a change, the older estimates belong to older parameters,
    as in every momentum method. `Estimate.slopes` are those of the newest estimate.

    Args:
        estimator: an estimator with `replayable` gradients.
        decay: the factor by which an estimate's weight shrinks per step, in [0, 1].
        window: the largest number of estimates that are averaged.
    Raises:
        BadInput: decay is not in [0, 1], or window < 1.
        Unsupported: the gradients of `estimator` are not replayable.
    """

    estimator: Estimator
    decay: float = 0.9
    window: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise BadInput(f"decay is the factor on an older estimate's weight, 0 to 1, not {self.decay!r}.")
        if self.window < 1:
            raise BadInput(f"window is the number of estimates averaged, 1 or more, not {self.window!r}.")

    @property
    def facts(self) -> Facts:
        return Facts(inner=self.estimator, unbiased=self.estimator.unbiased)

    def init(self, objective: Objective) -> tuple[Past, ...]:
        return ()

    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        if not self.estimator.replayable:
            raise Unsupported(self._refusal())
        newest = self.estimator.estimate(objective, batch, key)
        gradient = newest.gradient
        assert isinstance(gradient, Seeded)
        past: tuple[Past, ...] = ((gradient.seeds, gradient.coefficients), *(state or ()))[: self.window]
        weights = [self.decay**age for age in range(len(past))]
        total = sum(weights)
        seeds = tuple(seed for old_seeds, _ in past for seed in old_seeds)
        coefficients = tuple(w / total * c for w, (_, old) in zip(weights, past, strict=True) for c in old)
        return replace(newest, gradient=Seeded(objective, gradient.directions, seeds, coefficients), state=past)

    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        return replayed(self.estimate(objective, batch, key, state), use)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return self.estimator.objection(objective, batch) if self.estimator.replayable else self._refusal()

    def _refusal(self) -> str:
        return (
            f"the gradients of {self.estimator} cannot be reconstructed later from seeds and coefficients alone: use "
            "the momentum of an optimizer, as in SGD(lr, momentum=0.9)."
        )
