"""Variance reduction by a snapshot of the parameters (SVRG)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradcost.core.batching.micro_batches import at_most
from gradcost.core.errors import BadInput
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.memory_events import tag
from gradcost.core.objective import Objective
from gradcost.core.pytree import batch_size
from gradcost.core.value import value
from gradcost.estimators.estimator import Estimate, Estimator, Facts, LeafConsumer, State
from gradcost.estimators.gradient import Dense, Gradient, Seeded, Sum
from gradcost.estimators.probing import replayed

_END = object()


class Snapshot(NamedTuple):
    """The state of VarianceReduced: copies of the parameters and of the full gradient at the latest snapshot."""

    step: int  # the number of estimates so far
    weights: Mapping[str, Tensor]  # by parameter name
    gradient: Mapping[str, Tensor]  # by parameter name
    inner: State | None  # the state of the wrapped estimator


@value
class VarianceReduced(Estimator):
    """SVRG: g = ghat(theta) - ghat(snapshot) + mu, where mu is the full gradient at a snapshot of the parameters.

    ghat(theta) is the estimate by `estimator` at the parameters theta. Both ghat use the same batch and the same key,
    and therefore the same directions and dropout masks. mu is the mean of the estimates by `anchor` on all batches of
    `Objective.data`, weighted by the number of examples. A new snapshot is taken once in `every` estimates.

    Law (13): if theta is the snapshot, g is mu, bit for bit. The variance of `estimator` cancels at the snapshot and
    grows in proportion to the distance from it. The variance of mu remains. g is unbiased if `estimator` and `anchor`
    are (the mean includes the randomness of mu).

    Cost per step: two estimates, and 1/every of a pass of `anchor` over the data. Memory: the snapshot and mu, 2d
    numbers for d weights; twice as many while a new snapshot replaces an old one. mu is accumulated in float32 or
    better. Directions that depend on the parameters may differ between theta and the snapshot. The variance is then
    reduced less.

    Args:
        estimator: the estimator whose variance is reduced.
        every: number of estimates from one snapshot to the next.
        anchor: the estimator of the full gradient mu; None uses `estimator`. Reverse() makes mu exact.
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
        snapshot: Snapshot = self.init(objective) if state is None else state
        if snapshot.step % self.every == 0:
            snapshot = self._new_snapshot(objective, key, snapshot)
        current = self.estimator.estimate(objective, batch, key, snapshot.inner)
        past_key = self._key_at_snapshot(key, snapshot.step)
        with objective.at_weights(snapshot.weights):
            past = self.estimator.estimate(objective, batch, past_key, snapshot.inner)
        gradient = _corrected(objective, current.gradient, past.gradient, snapshot)
        next_state = snapshot._replace(step=snapshot.step + 1, inner=current.state)
        return Estimate(current.loss, gradient, current.slopes, next_state, current.clipped)

    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        return replayed(self.estimate(objective, batch, key, state), use)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        if objective.data is None:
            return _no_data()
        reason = self.estimator.objection(objective, batch)
        return self.anchor.objection(objective, batch) if reason is None and self.anchor is not None else reason

    def _new_snapshot(self, objective: Objective, key: Key, old: Snapshot) -> Snapshot:
        """Return `old` with the present parameters and their full gradient."""
        gradient = full_gradient(self.anchor or self.estimator, objective, key)
        weights = {leaf.name: leaf.parameter.detach().clone() for leaf in objective.leaves}
        return old._replace(weights=weights, gradient=gradient)

    def _key_at_snapshot(self, key: Key, step: int) -> Key:
        """Return the key of the estimate at the snapshot, in the step with this key and number."""
        return key


def full_gradient(estimator: Estimator, objective: Objective, key: Key) -> dict[str, Tensor]:
    """Return the mean of the estimates on the batches of `Objective.data`, weighted by their numbers of examples.

    Batch number b uses the key `key.fold("anchor", b)`, so the directions of different batches are independent. It is
    drawn with the default generators seeded from `key.fold("data", b)`.
    Memory: the running mean, and one parameter's gradient of a batch at a time. For half-precision parameters the
    mean is in float32: in half precision it would stop changing after some hundred batches.
    """
    if objective.data is None:
        raise BadInput(_no_data())
    mean: dict[str, Tensor] = {}
    for leaf in objective.leaves:
        dtype = leaf.parameter.dtype if leaf.parameter.itemsize >= 4 else torch.float32
        mean[leaf.name] = tag("gradients", torch.zeros_like(leaf.parameter, dtype=dtype, requires_grad=False))
    total = 0
    for number, batch in enumerate(_drawn(objective.data, key)):
        count = batch_size(batch)
        total += count
        share = count / total

        def add_to_mean(name: str, gradient: Tensor, share: float = share) -> None:
            mean[name].mul_(1 - share).add_(gradient, alpha=share)

        in_parts = replace(objective, parts=at_most(objective.parts, batch))
        estimator.stream(in_parts, batch, key.fold("anchor", number), add_to_mean)
    if total == 0:
        raise BadInput(
            "Objective.data yielded no batch, so there is no full gradient: it must yield all of the data once."
        )
    return {leaf.name: mean.pop(leaf.name).to(leaf.parameter.dtype) for leaf in objective.leaves}


def _drawn(data: Callable[[], Iterable[Any]], key: Key) -> Iterator[Any]:
    """Yield the batches of `data`. The default generators are seeded around each draw, and restored after it."""
    batches = None
    for number in itertools.count():
        with seeded_generators(key.fold("data", number)):
            batches = iter(data()) if batches is None else batches
            batch = next(batches, _END)
        if batch is _END:
            return
        yield batch


def _corrected(objective: Objective, current: Gradient, past: Gradient, snapshot: Snapshot) -> Sum:
    """Return current - past + mu. Two seeded gradients with equal directions subtract by their coefficients."""
    mu = Dense(objective, snapshot.gradient)
    if isinstance(current, Seeded) and isinstance(past, Seeded) and _have_equal_directions(current, past):
        coefficients = tuple(c - old for c, old in zip(current.coefficients, past.coefficients, strict=True))
        difference = Seeded(objective, current.directions, current.seeds, coefficients)
        return Sum(objective, (difference, mu), (1.0, 1.0))
    return Sum(objective, (current, _There(past, snapshot.weights), mu), (1.0, -1.0, 1.0))


@dataclass(frozen=True, eq=False)
class _There(Gradient):
    """A gradient that is regenerated at the snapshot's weights, because its directions may depend on them."""

    of: Gradient
    weights: Mapping[str, Tensor]

    @property
    def objective(self) -> Objective:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.of.objective

    def leaves(self) -> Iterator[tuple[str, Tensor]]:
        leaves = self.of.leaves()
        for _ in self.objective.leaves:
            with self.objective.at_weights(self.weights):
                leaf = next(leaves)
            yield leaf
            del leaf  # before the next one is allocated

    @property
    def nbytes(self) -> int:
        return self.of.nbytes


def _have_equal_directions(one: Seeded, other: Seeded) -> bool:
    return one.seeds == other.seeds and one.directions == other.directions


def _no_data() -> str:
    return (
        "variance reduction passes over all of the data, and this objective has none: set Objective(..., data=...) "
        "to a function that yields each batch once, or use an estimator without variance reduction."
    )
