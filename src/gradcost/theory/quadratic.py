"""What forward gradients do on a quadratic, exactly: the expected loss after every step."""

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
    """E f(x_t) of f(x) = 1/2 sum_i lambda_i x_i^2 after t = 0, 1, 2, ... steps x <- x - lr g, without end.

    g is the mean of `probes` Gaussian directions with exact slopes; None is gradient descent. start: the
    coordinates of x_0 along the eigenvectors, one an eigenvalue.

    Law: y_i = E x_i^2 obeys
        y_i <- (1 - 2 lr lambda_i + lr^2 lambda_i^2 (1 + 1/n)) y_i + (lr^2/n) sum_j lambda_j^2 y_j,
    because E g_i^2 = (1 + 1/n) grad_i^2 + |grad|^2/n. Exact: nothing is bounded.

    Source: derived here from Isserlis's theorem. Raises: ValueError when the lengths differ, an eigenvalue is
    negative, lr is not above 0 or probes < 1.
    """
    curvature, squares = np.asarray(eigenvalues, dtype=np.float64), np.asarray(start, dtype=np.float64) ** 2
    if curvature.shape != squares.shape or curvature.ndim != 1 or (curvature < 0).any():
        raise BadInput("a quadratic has one eigenvalue, of 0 or more, for each coordinate of its start.")
    if not lr > 0 or (probes is not None and probes < 1):
        raise BadInput(f"a learning rate above 0 and 1 probe or more are needed, not {lr} and {probes}.")
    share = 0.0 if probes is None else 1 / probes
    return _losses(curvature, squares, 1 - 2 * lr * curvature + (1 + share) * (lr * curvature) ** 2, share * lr * lr)


def _losses(curvature: np.ndarray, squares: np.ndarray, kept: np.ndarray, scattered: float) -> Iterator[float]:
    slopes = curvature**2
    while True:
        with np.errstate(over="ignore", invalid="ignore"):  # with too long a step it grows without end
            loss, noise = float(curvature @ squares) / 2, scattered * float(slopes @ squares)
            squares = kept * squares + noise
        yield loss


def steps_to_reach(losses: Iterator[float], ratio: float, most: int = 1_000_000) -> int | None:
    """After how many steps a loss is at most `ratio` times the first; None when not within `most` steps, or when it
    has grown a thousandfold.

    Raises: ValueError when ratio is not between 0 and 1.
    """
    if not 0 < ratio < 1:
        raise BadInput(f"a loss is to fall to a share between 0 and 1 of the first, not {ratio}.")
    first = next(losses)
    for step, loss in zip(range(1, most + 1), losses, strict=False):
        if loss <= ratio * first:
            return step
        if not loss < 1000 * first:
            return None
    return None
