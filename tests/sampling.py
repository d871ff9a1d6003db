"""What a random quantity's samples say about its mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def assert_mean(samples: Tensor | Sequence[float], expected: float, errors: float = 5.0) -> None:
    """The mean of the samples (first dimension) is `expected`, within `errors` standard errors, everywhere.

    Five standard errors are passed by chance once in two million looks; the seeds are fixed, so never twice.
    """
    drawn = torch.as_tensor(samples, dtype=torch.float64)
    error = drawn.std(0) / len(drawn) ** 0.5
    away = (drawn.mean(0) - expected).abs()
    assert bool((away <= errors * error).all()), f"mean {drawn.mean(0)} is not {expected} within {errors} x {error}"
