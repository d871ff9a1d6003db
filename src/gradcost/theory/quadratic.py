"""The exact expected loss of a forward-gradient training run on a quadratic, after every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from gradcost.core.errors import BadInput


def expected_losses(
    eigenvalues: Sequence[float] | np.ndarray,
    start: Sequence[float] | np.ndarray,
    lr: float,
    probes: int | None = None,
) -> Iterator[float]:
    """Yield E f(x_t) for t = 0, 1, 2, ... without end, where f(x) = 1/2 sum_i lambda_i x_i^2.

    A step is x <- x - lr g. The forward gradient g is the mean over n Gaussian directions of slope times direction,
    with exact slopes. If probes is None, g is the exact gradient.

    Law: y_i = E x_i^2 obeys
        y_i <- (1 - 2 lr lambda_i + lr^2 lambda_i^2 (1 + 1/n)) y_i + (lr^2/n) sum_j lambda_j^2 y_j,
    because E g_i^2 = (1 + 1/n) grad_i^2 + |grad|^2/n. This law is exact, not a bound.

    Args:
        eigenvalues: lambda_i, the eigenvalues of the Hessian, each 0 or more.
        start: the coordinates of x_0 along the eigenvectors, one per eigenvalue.
        lr: learning rate, above 0.
        probes: n, 1 or more. None: gradient descent (1/n = 0 in the law).
    Yields:
        The expected loss E f(x_t).
    Raises:
        BadInput: the lengths differ, an eigenvalue is negative, lr is not above 0 or probes is below 1.
    Source: derived here from Isserlis's theorem.
    """
    curvature, second_moments = np.asarray(eigenvalues, dtype=np.float64), np.asarray(start, dtype=np.float64) ** 2
    if curvature.shape != second_moments.shape or curvature.ndim != 1 or (curvature < 0).any():
        raise BadInput("eigenvalues must be a list of numbers, 0 or more, as long as start.")
    if not lr > 0 or (probes is not None and probes < 1):
        raise BadInput(f"lr must be above 0 and probes 1 or more, not {lr} and {probes}.")
    inverse_n = 0.0 if probes is None else 1 / probes
    factor = 1 - 2 * lr * curvature + (1 + inverse_n) * (lr * curvature) ** 2
    return _losses(curvature, second_moments, factor, inverse_n * lr * lr)


def _losses(curvature: np.ndarray, y: np.ndarray, factor: np.ndarray, noise_factor: float) -> Iterator[float]:
    """Yield the losses of y_i <- factor_i y_i + noise_factor sum_j lambda_j^2 y_j, where y_i = E x_i^2."""
    squared_curvature = curvature**2
    while True:
        with np.errstate(over="ignore", invalid="ignore"):  # if lr is too large, y overflows
            loss, noise = float(curvature @ y) / 2, noise_factor * float(squared_curvature @ y)
            y = factor * y + noise
        yield loss


def steps_to_reach(losses: Iterator[float], ratio: float, most: int = 1_000_000) -> int | None:
    """Return the number of steps until the loss is at most `ratio` times the initial loss.

    Args:
        losses: the loss after 0, 1, 2, ... steps, such as `expected_losses(...)`.
        ratio: between 0 and 1.
        most: the largest number of steps to try.
    Returns:
        The number of steps. None if `most` steps are not enough, or if the loss exceeds 1000 times the initial loss.
    Raises:
        BadInput: ratio is not between 0 and 1.
    """
    if not 0 < ratio < 1:
        raise BadInput(f"ratio, the target loss / the initial loss, must be between 0 and 1, not {ratio}.")
    first = next(losses)
    for step, loss in zip(range(1, most + 1), losses, strict=False):
        if loss <= ratio * first:
            return step
        if not loss < 1000 * first:  # true for nan too
            return None
    return None
