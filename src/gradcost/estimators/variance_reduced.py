"""SVRG: each estimate less what it was at a snapshot of the weights, plus the full gradient there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.memory_events import tag
from gradcost.core.objective import Objective, examples
from gradcost.core.value import value
from gradcost.estimators.estimator import Estimate, Estimator, LeafConsumer, State
from gradcost.estimators.gradient import Dense, Gradient, Seeded, Sum
from gradcost.estimators.probing import replayed


class Snapshot(NamedTuple):
    """Copies of the weights as they were at the last snapshot and the full gradient there, by the leaves' names.

    step: how many estimates have been made. inner: the state of the estimator within.
    """

    step: int
    weights: Mapping[str, Tensor]
    gradient: Mapping[str, Tensor]
    inner: State | None


@value
class VarianceReduced(Estimator):
    """g = ghat(theta) - ghat(snapshot) + mu, where both ghat are `estimator`'s on the same batch with the same key,
    so along the same directions under the same dropout masks, and mu is the full gradient at the snapshot.

    mu is the mean over `Objective.data`, weighted by the number of examples, of the estimates of `anchor`; None is
    `estimator` itself, and with Reverse() the full gradient is exact, by backprop once every `every` steps. The
    snapshot is made anew by every `every`-th estimate. Unbiased where both are (over the draw of mu too).

    Law (13): where the weights are the snapshot's, the gradient is mu, bit for bit: nothing of the scatter of
    `estimator` is left. It comes back in proportion to the distance from the snapshot, and mu keeps its own.

    Cost of a step: two estimates, and 1/every of a pass over the data by the anchor. Kept: the weights and mu, 2d
    numbers; both twice while a new snapshot takes an old one's place, whose mean is taken in float32 at least.
    Directions that depend on the weights (`StatefulDirections`) may differ between both points; they reduce less.

    Source: Johnson and Zhang 2013 (NIPS 26), figure 1; with differences Liu et al., arXiv 1805.10367, algorithm 2,
    and MeZO-SVRG, arXiv 2404.08080. Raises: ValueError when every < 1, or the objective has no data.
    """

    estimator: Estimator
    every: int = 100
    anchor: Estimator | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise BadInput(f"a snapshot is made every step or less often: every is 1 or more, not {self.every!r}.")

    def init(self, objective: Objective) -> Snapshot:
        return Snapshot(0, {}, {}, self.estimator.init(objective))

    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        at: Snapshot = self.init(objective) if state is None else state
        if at.step % self.every == 0:
            at = self._taken(objective, key, at)
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
        found = self.estimator.objection(objective, batch)
        return self.anchor.objection(objective, batch) if found is None and self.anchor is not None else found

    def _taken(self, objective: Objective, key: Key, before: Snapshot) -> Snapshot:
        """A snapshot of the present weights, with the full gradient at them."""
        gradient = full_gradient(self.anchor or self.estimator, objective, key)
        weights = {leaf.name: leaf.parameter.detach().clone() for leaf in objective.leaves}
        return before._replace(weights=weights, gradient=gradient)


def full_gradient(estimator: Estimator, objective: Objective, key: Key) -> dict[str, Tensor]:
    """The mean of the estimates on the batches of `Objective.data`, each weighted by its number of examples.

    Batch number b has the key `key.fold("anchor", b)`, so directions of its own. One leaf of a batch's gradient is
    alive beside the running mean, which is in float32 for halves: in their own precision a mean of some hundred
    would stand still. Raises: ValueError when the objective has no data.
    """
    if objective.data is None:
        raise BadInput(_no_data())
    mean: dict[str, Tensor] = {}
    for leaf in objective.leaves:
        dtype = leaf.parameter.dtype if leaf.parameter.itemsize >= 4 else torch.float32
        mean[leaf.name] = tag("gradients", torch.zeros_like(leaf.parameter, dtype=dtype, requires_grad=False))
    seen = 0
    for number, batch in enumerate(objective.data()):
        count = examples(batch)
        seen += count
        share = count / seen

        def gather(name: str, gradient: Tensor, share: float = share) -> None:
            mean[name].mul_(1 - share).add_(gradient, alpha=share)

        estimator.stream(objective, batch, key.fold("anchor", number), gather)
    if seen == 0:
        raise BadInput("Objective.data gave no batch, so there is no full gradient: give the data once through.")
    return {leaf.name: mean.pop(leaf.name).to(leaf.parameter.dtype) for leaf in objective.leaves}


def _corrected(objective: Objective, here: Gradient, there: Gradient, at: Snapshot) -> Sum:
    """here - there + mu: of two seeded ones along the same directions, their coefficients' differences."""
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
