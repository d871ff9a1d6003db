"""Convergence bounds of SGD on L-smooth losses, convex or not."""

from __future__ import annotations

from gradcost.core.errors import BadInput
from gradcost.directions import Directions, Gaussian, StatefulDirections
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.combine import Mean
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.probing import Probing
from gradcost.estimators.structure import find, unwrapped
from gradcost.slopes.slope import CentralDifference, ForwardDifference
from gradcost.theory.moments import second_moment


def gradient_bound(
    estimator: Estimator,
    dimension: int,
    *,
    smoothness: float,
    gap: float,
    lr: float,
    steps: int,
    batch_variance: float = 0.0,
) -> float:
    """Return an upper bound on min over t < T of E|grad f(x_t)|^2, for T steps of SGD with this estimator.

    Notation:
    - a step is x_{t+1} = x_t - lr g, with the estimate g at x_t;
    - L = `smoothness`, d = `dimension`, T = `steps`;
    - m = `second_moment(estimator, d)`: 1 for backprop, 1 + (d + 1)/n for n Gaussian directions.

    Assumptions:
    - f and the loss of each batch are L-smooth: their gradients are L-Lipschitz. f need not be convex.
    - A batch's gradient h is unbiased, E h = grad f, and E|h - grad f|^2 <= batch_variance.
    - gap = f(x_0) - inf f.

    Law for exact slopes (backprop, forward gradients), if lr < 2/(L m):
        bound = [gap/T + L lr^2 m batch_variance/2] / (lr (1 - L m lr/2)).
    At lr = 1/(L m) the bound is 2 L m gap/T + batch_variance.
    Derivation: use f(x - lr g) <= f - lr <grad, g> + L lr^2 |g|^2/2, E g = grad and
    E|g|^2 <= m (|grad|^2 + batch_variance). Sum over t and telescope.

    Law for finite differences with step eps and the `Mean` of n directions z, if lr < 1/(2 L m):
        B2 = L^2 eps^2 E|z|^6 / 4,
        bound = [gap/T + lr B2/2 + L lr^2 (m batch_variance + B2)] / (lr (1/2 - L m lr)).
    Derivation: by L-smoothness, the error of a slope is at most L eps |z|^2/2, for forward and central differences.
    So g = g_0 + b, where g_0 is the estimate with exact slopes and E|b|^2 <= B2 (Jensen's inequality). Then
        <grad, E g> >= |grad|^2/2 - B2/2   and   |g|^2 <= 2 |g_0|^2 + 2 |b|^2.
    E|z|^6 = d (d + 2)(d + 4) for Gaussian directions, and d^3 for directions of length sqrt(d). Rounding errors are
    not included.

    Args:
        estimator: how the gradient is obtained. Its finite differences need a fixed eps.
        dimension: d, the number of trainable weights, 1 or more.
        smoothness: L, in loss per weight^2, above 0.
        gap: f(x_0) - inf f, 0 or more.
        lr: constant learning rate, above 0.
        steps: T, 1 or more.
        batch_variance: upper bound on E|h - grad f|^2; 0 if every batch is the full data set.
    Returns:
        The bound, in units of |grad f|^2.
    Raises:
        BadInput: a number is out of its range, lr is too large for the law, or no formula is known for the
            estimator.
    Source: the argument follows Ghadimi and Lan (2013, arXiv 1309.5549, theorems 2.1 and 3.2) and Nesterov and
    Spokoiny (2017, section 7). Panchal et al. (2025, arXiv 2506.21833) have the same orders in d, n and T. The
    constants are derived here.
    """
    if not (smoothness > 0 and gap >= 0 and lr > 0 and steps >= 1 and batch_variance >= 0):
        raise BadInput(
            "smoothness and lr must be above 0, steps 1 or more, gap and batch_variance not negative; they are "
            f"{smoothness}, {lr}, {steps}, {gap} and {batch_variance}."
        )
    moment = second_moment(estimator, dimension)
    if moment is None:
        raise BadInput(f"no second moment is known for {estimator}, so no bound: use Mean() over Gaussian().")
    squared_bias = _squared_bias(estimator, smoothness, dimension)
    limit = (2 if squared_bias is None else 0.5) / (smoothness * moment)
    if lr >= limit:
        raise BadInput(f"lr is {lr}, but the bound needs one below {limit:.3g}.")
    noise = smoothness * lr * lr * moment * batch_variance
    if squared_bias is None:
        return (gap / steps + noise / 2) / (lr * (1 - smoothness * moment * lr / 2))
    bias = lr * squared_bias / 2 + smoothness * lr * lr * squared_bias
    return (gap / steps + bias + noise) / (lr * (0.5 - smoothness * moment * lr))


def _squared_bias(estimator: Estimator, smoothness: float, dimension: int) -> float | None:
    """Return B2 of `gradient_bound`; None if slopes are exact."""
    if find(estimator, Clipped):
        raise BadInput("no bound is known for the bias of Clipped: remove it.")
    match unwrapped(estimator):
        case Probing(slope=CentralDifference(None) | ForwardDifference(None)):
            raise BadInput("eps=None chooses a step that the bound does not know: give eps a number.")
        case Probing(slope=CentralDifference(eps) | ForwardDifference(eps), directions=directions, combine=Mean()):
            assert eps is not None
            return (smoothness * eps) ** 2 * _sixth_moment(directions, dimension) / 4
        case Probing(slope=CentralDifference() | ForwardDifference(), combine=combine):
            raise BadInput(f"no bound is known for the bias of a finite difference under {combine}: use Mean().")
    return None


def _sixth_moment(directions: Directions | StatefulDirections, dimension: int) -> float:
    """Return E|z|^6. Non-Gaussian directions with a known second moment all have length sqrt(d)."""
    match directions:
        case Gaussian():
            return float(dimension * (dimension + 2) * (dimension + 4))
    return float(dimension**3)
