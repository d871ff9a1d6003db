"""Gradients and directions as one flat float64 vector, for the laws about inner products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import Directions, Rademacher
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.gradient import Gradient, Seeded
from gradcost.estimators.presets import backprop
from gradcost.estimators.probing import Probing
from gradcost.slopes.slope import Slope


def flat(gradient: Gradient) -> Tensor:
    """All leaves in a row."""
    return torch.cat([leaf.detach().double().flatten() for _, leaf in gradient.leaves()])


def estimated(estimator: Estimator, objective: Objective, batch: Any, key: Key) -> Tensor:
    return flat(estimator.estimate(objective, batch, key).gradient)


def true_gradient(objective: Objective, batch: Any, key: Key) -> Tensor:
    return estimated(backprop(), objective, batch, key)


def assert_same_estimate(
    one: Estimator, other: Estimator, objective: Objective, batch: Any, key: Key
) -> list[Tensor]:
    """Loss and gradient of two estimators have the same bits. Returns the leaves of the gradient."""
    first, second = (estimator.estimate(objective, batch, key) for estimator in (one, other))
    assert torch.equal(first.loss, second.loss)
    leaves = list(zip(first.gradient.leaves(), second.gradient.leaves(), strict=True))
    assert [name for (name, a), (_, b) in leaves if not torch.equal(a, b)] == []
    return [leaf for (_, leaf), _ in leaves]


def direction(objective: Objective, directions: Directions, seed: int) -> Tensor:
    return flat(Seeded(objective, directions, (seed,), (1.0,)))


def matrix(objective: Objective, directions: Directions, seeds: Sequence[int]) -> Tensor:
    """One direction a row."""
    return torch.stack([direction(objective, directions, seed) for seed in seeds])


def assert_agrees(objective: Objective, batch: Any, slope: Slope, tolerance: float = 1e-10) -> None:
    """Each slope is <grad, z>, in float64."""
    key = Key(300)
    found = Probing(slope, Rademacher(), 3).estimate(objective, batch, key)
    assert isinstance(found.gradient, Seeded)
    assert found.slopes is not None
    grad = true_gradient(objective, batch, key)
    assert float(grad.norm()) > 1e-6
    expected = matrix(objective, Rademacher(), found.gradient.seeds) @ grad
    assert (found.slopes - expected).abs().max() <= tolerance * grad.norm()
