"""Variance reduction by a snapshot of the parameters (SVRG)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.memory_events import tag
from gradcost.core.objective import Objective
from gradcost.core.pytree import batch_size
from gradcost.core.value import value
from gradcost.estimators.estimator import Estimate, Estimator, Facts, LeafConsumer, State
from gradcost.estimators.gradient import Dense, Gradient, Seeded, Sum
from gradcost.estimators.probing import replayed


class Snapshot(NamedTuple):
    """The parameters and the full gradient at the last snapshot, as copies, by parameter name.

    step: the number of estimates so far. inner: the state of the wrapped estimator.
    """

    step: int
    weights: Mapping[str, Tensor]
    gradient: Mapping[str, Tensor]
    inner: State | None


@value
class VarianceReduced(Estimator):
    """SVRG: g = ghat(theta) - ghat(snapshot) + mu, where mu is the full gradient at a snapshot of the parameters.

    Both ghat are estimates of `estimator` on the same batch with the same key, so they share directions and dropout
    masks. mu is the mean of the estimates of `anchor` over `Objective.data`, weighted by the number of examples.
    Every `every`-th estimate takes a new snapshot.

    Law (13): if the parameters are those of the snapshot, the gradient is mu, bit for bit. The variance of
    `estimator` cancels there and returns in proportion to the distance from the snapshot. The variance of mu remains.
    Unbiased if both estimators are, over the randomness of mu too.

    Cost per step: two estimates, and 1/every of a pass over the data by the anchor. Memory: the parameters and mu, 2d
    numbers, and both twice while a new snapshot replaces an old one. The mean mu is accumulated in float32 or better.
    Directions that depend on the parameters may differ between both points and then reduce the variance less.

    Args:
        estimator: the estimator whose variance is reduced.
        every: estimates from one snapshot to the next.
        anchor: the estimator of the full gradient; None for `estimator` itself. Reverse() makes mu exact.
    Raises:
        BadInput: every < 1, or the objective has no data.
    Source: Johnson and Zhang 2013 (NIPS 26), figure 1; with finite differences Liu et al., arXiv 1805.10367,
        algorithm 2, and MeZO-SVRG, arXiv 2404.08080.
    """

    estimator: Estimator
    every: int = 100
    anchor: Estimator | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise BadInput(f"every is the number of estimates between snapshots, 1 or more, not {self.every!r}.")

    @property
    def facts(self) -> Facts:
        anchor = self.anchor or self.estimator
        return Facts(inner=self.estimator, unbiased=self.estimator.unbiased and anchor.unbiased)

    def init(self, objective: Objective) -> Snapshot:
        return Snapshot(0, {}, {}, self.estimator.init(objective))

    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        at: Snapshot = self.init(objective) if state is None else state
        if at.step % self.every == 0:
            at = self._new_snapshot(objective, key, at)
        here = self.estimator.estimate(objective, batch, key, at.inner)
        with objective.at_weights(at.weights):
            there = self.estimator.estimate(objective, batch, key, at.inner)
        gradient = _corrected(objective, here.gradient, there.gradient, at)
        following = at._replace(step=at.step + 1, inner=here.state)
        return Estimate(here.loss, gradient, here.slopes, following, here.clipped)

    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        return replayed(self.estimate(objective, batch, key, state), use)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        if objective.data is None:
            return _no_data()
        reason = self.estimator.objection(objective, batch)
        return self.anchor.objection(objective, batch) if reason is None and self.anchor is not None else reason

    def _new_snapshot(self, objective: Objective, key: Key, before: Snapshot) -> Snapshot:
        """A snapshot of the present parameters and the full gradient there."""
        gradient = full_gradient(self.anchor or self.estimator, objective, key)
        weights = {leaf.name: leaf.parameter.detach().clone() for leaf in objective.leaves}
        return before._replace(weights=weights, gradient=gradient)


def full_gradient(estimator: Estimator, objective: Objective, key: Key) -> dict[str, Tensor]:
    """Return the mean of the estimates on the batches of `Objective.data`, weighted by their numbers of examples.

    Batch number b uses the key `key.fold("anchor", b)`, so its directions are independent. One parameter's gradient
    of a batch exists at a time beside the running mean. The mean is in float32 for half-precision parameters: in half
    precision the mean of some hundred batches would stop changing.
    """
    if objective.data is None:
        raise BadInput(_no_data())
    mean: dict[str, Tensor] = {}
    for leaf in objective.leaves:
        dtype = leaf.parameter.dtype if leaf.parameter.itemsize >= 4 else torch.float32
        mean[leaf.name] = tag("gradients", torch.zeros_like(leaf.parameter, dtype=dtype, requires_grad=False))
    total = 0
    for number, batch in enumerate(objective.data()):
        count = batch_size(batch)
        total += count
        share = count / total

        def gather(name: str, gradient: Tensor, share: float = share) -> None:
            mean[name].mul_(1 - share).add_(gradient, alpha=share)

        estimator.stream(objective, batch, key.fold("anchor", number), gather)
    if total == 0:
        raise BadInput(
            "Objective.data yielded no batch, so there is no full gradient: it must yield all of the data once."
        )
    return {leaf.name: mean.pop(leaf.name).to(leaf.parameter.dtype) for leaf in objective.leaves}


def _corrected(objective: Objective, here: Gradient, there: Gradient, at: Snapshot) -> Sum:
    """here - there + mu; for two seeded gradients along the same directions, by the differences of coefficients."""
    full = Dense(objective, at.gradient)
    if isinstance(here, Seeded) and isinstance(there, Seeded) and _alike(here, there):
        coefficients = tuple(c - before for c, before in zip(here.coefficients, there.coefficients, strict=True))
        moved = Seeded(objective, here.directions, here.seeds, coefficients)
        return Sum(objective, (moved, full), (1.0, 1.0))
    return Sum(objective, (here, _There(there, at.weights), full), (1.0, -1.0, 1.0))


@dataclass(frozen=True, eq=False)
class _There(Gradient):
    """A gradient replayed at the weights where it was found, on which its directions may depend."""

    of: Gradient
    weights: Mapping[str, Tensor]

    @property
    def objective(self) -> Objective:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.of.objective

    def leaves(self) -> Iterator[tuple[str, Tensor]]:
        replay = self.of.leaves()
        for _ in self.objective.leaves:
            with self.objective.at_weights(self.weights):
                found = next(replay)
            yield found
            del found  # before the next one is made

    @property
    def nbytes(self) -> int:
        return self.of.nbytes


def _alike(one: Seeded, other: Seeded) -> bool:
    return one.seeds == other.seeds and one.directions == other.directions


def _no_data() -> str:
    return (
        "variance reduction passes over all of the data, and this objective has none: give Objective(..., data=...), "
        "a function that gives the batches once through, or use the estimator that it wraps."
    )
