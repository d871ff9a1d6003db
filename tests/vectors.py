"""Gradients and directions as one flat float64 vector, for the laws that speak of inner products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradcost.directions import Directions
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import backprop
from gradcost.gradient import Gradient, Seeded
from gradcost.key import Key
from gradcost.objective import Objective


def flat(gradient: Gradient) -> Tensor:
    """All leaves in a row."""
    return torch.cat([leaf.detach().double().flatten() for _, leaf in gradient.leaves()])


def estimated(estimator: Estimator, objective: Objective, batch: Any, key: Key) -> Tensor:
    return flat(estimator.estimate(objective, batch, key).gradient)


def true_gradient(objective: Objective, batch: Any, key: Key) -> Tensor:
    return estimated(backprop(), objective, batch, key)


def direction(objective: Objective, directions: Directions, seed: int) -> Tensor:
    return flat(Seeded(objective, directions, (seed,), (1.0,)))


def matrix(objective: Objective, directions: Directions, seeds: Sequence[int]) -> Tensor:
    """One direction a row."""
    return torch.stack([direction(objective, directions, seed) for seed in seeds])
