"""A test of the mean of a random quantity by its samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def assert_mean(samples: Tensor | Sequence[float], expected: float, errors: float = 5.0) -> None:
    """The mean of the samples (first dimension) is `expected`, within `errors` standard errors, everywhere.

    A deviation beyond five standard errors has probability 6e-7. Seeds are fixed, so a test that passes always does.
    """
    drawn = torch.as_tensor(samples, dtype=torch.float64)
    error = drawn.std(0) / len(drawn) ** 0.5
    away = (drawn.mean(0) - expected).abs()
    assert bool((away <= errors * error).all()), f"mean {drawn.mean(0)} is not {expected} within {errors} x {error}"
