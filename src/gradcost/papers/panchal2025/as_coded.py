"""What public code computes under the name of a method, as estimators, so that each difference can be measured.

These estimators are for comparison only: each breaks a law that the method of its name has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.objective import Leaf, Objective
from gradcost.core.value import value
from gradcost.directions import Directions
from gradcost.estimators.estimator import Estimate, Estimator, Facts, LeafConsumer, State
from gradcost.estimators.gradient import Dense, Sum
from gradcost.estimators.probing import replayed
from gradcost.estimators.variance_reduced import Snapshot, VarianceReduced, full_gradient


@value
class Scaled(Estimator):
    """g = factor * ghat, where ghat is the estimate by `estimator`.

    With factor = eps it is a finite difference that updates along eps z instead of z. With factor = k it is
    accumulation that sums over k micro-batches instead of averaging. Adam hides a constant factor, SGD does not.

    Args:
        estimator: the estimator of ghat.
        factor: the factor, not 0.
    """

    estimator: Estimator
    factor: float

    def __post_init__(self) -> None:
        if self.factor == 0:
            raise BadInput("factor of Scaled is 0, so no weight would move: choose another number.")

    @property
    def facts(self) -> Facts:
        return Facts(inner=self.estimator, unbiased=self.estimator.unbiased and self.factor == 1)

    def init(self, objective: Objective) -> State | None:
        return self.estimator.init(objective)

    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        found = self.estimator.estimate(objective, batch, key, state)
        return replace(found, gradient=Sum(objective, (found.gradient,), (self.factor,)))

    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        return self.estimator.stream(objective, batch, key, lambda name, part: use(name, part * self.factor), state)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return self.estimator.objection(objective, batch)


@value
class Repeated(Directions):
    """One direction for all probes of an estimate: the seed is fixed inside the loop over probes.

    Law: the mean over n probes is the estimate along one direction: E|g|^2 does not depend on n, and n slopes are
    paid for one.

    Args:
        directions: the distribution of the direction.
    """

    directions: Directions

    def __post_init__(self) -> None:
        for fact in ("unbiased", "elementwise"):
            object.__setattr__(self, fact, getattr(self.directions, fact))

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return self.directions.seeds(key, 1, dimension) * probes

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        return self.directions.add(base, leaf, seeds, scales, in_place)


class Step(NamedTuple):
    """The state of `FirstStep`: the number of estimates so far, and the states of both estimators."""

    number: int
    first: State | None
    later: State | None


@value
class FirstStep(Estimator):
    """The estimate by `first` at the first training step, and by `later` at all other steps.

    Args:
        first: the estimator of the first step.
        later: the estimator of all later steps.
    """

    first: Estimator
    later: Estimator

    @property
    def facts(self) -> Facts:
        return Facts(unbiased=self.first.unbiased and self.later.unbiased)

    def init(self, objective: Objective) -> Step:
        return Step(0, self.first.init(objective), self.later.init(objective))

    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        step: Step = self.init(objective) if state is None else state
        if step.number == 0:
            found = self.first.estimate(objective, batch, key, step.first)
            return replace(found, state=Step(1, found.state, step.later))
        found = self.later.estimate(objective, batch, key, step.later)
        return replace(found, state=Step(step.number + 1, step.first, found.state))

    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        return replayed(self.estimate(objective, batch, key, state), use)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return self.first.objection(objective, batch) or self.later.objection(objective, batch)


@value
class StaleGradient(VarianceReduced):
    """g = mu, the full gradient at the latest snapshot: SVRG without its correction.

    The public code estimates the correction with an empty snapshot. Both slopes are therefore at the same weights:

    - Without dropout their difference is exactly 0.
    - With dropout the code draws other masks for each of the two slopes, so their difference is noise of mean 0. This
      estimator leaves that noise out.

    Law: between two snapshots g does not depend on the batch or the weights. Cost per step: two estimates, as for
    SVRG, and 1/every of a pass over the data.

    Args:
        estimator: the estimator of mu, and of the two estimates whose difference is not computed.
        every: number of estimates from one snapshot to the next.
        anchor: the estimator of mu; None uses `estimator`.
    Raises:
        BadInput: every < 1, or the objective has no data.
    """

    @property
    def facts(self) -> Facts:
        return Facts(inner=self.estimator)

    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        snapshot: Snapshot = self.init(objective) if state is None else state
        if snapshot.step % self.every == 0:
            snapshot = snapshot._replace(gradient=full_gradient(self.anchor or self.estimator, objective, key))
        self.estimator.estimate(objective, batch, key, snapshot.inner)  # "at the snapshot": paid for, and not used
        found = self.estimator.estimate(objective, batch, key, snapshot.inner)
        next_state = snapshot._replace(step=snapshot.step + 1, inner=found.state)
        return replace(found, gradient=Dense(objective, snapshot.gradient), state=next_state)


@value
class Unpaired(VarianceReduced):
    """SVRG with other directions at the snapshot: g = ghat(theta; z) - ghat(snapshot; u) + mu.

    z is drawn at every estimate, u once per snapshot. u depends on the number of the snapshot only, as in the public
    code, where the seed of u is the number of the epoch. So u is the same in runs with different seeds.

    Law: the mean of g over z is grad(theta) - ghat(snapshot; u) + mu. For one batch the last two terms are constant
    until the next snapshot: a bias whose norm is about sqrt(d) times that of the gradient at the snapshot, for d
    weights. Cost per step: as `VarianceReduced`.

    Args:
        estimator: the estimator of ghat.
        every: number of estimates from one snapshot to the next.
        anchor: the estimator of mu, the full gradient at the snapshot; None uses `estimator`.
    Raises:
        BadInput: every < 1, or the objective has no data.
    """

    @property
    def facts(self) -> Facts:
        return Facts(inner=self.estimator)

    def _key_at_snapshot(self, key: Key, step: int) -> Key:
        return Key(0).fold("snapshot", step // self.every)
