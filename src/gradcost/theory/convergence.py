"""How small a gradient becomes for sure: bounds for L-smooth losses that need not be convex."""

from __future__ import annotations

from gradcost.core.errors import BadInput
from gradcost.directions import Directions, Gaussian, StatefulDirections
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.combine import Mean
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.probing import Probing
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
    """A bound on min_t E|grad f(x_t)|^2 over t < T = `steps` steps x <- x - lr g of SGD with this estimator.

    Assumptions: f and the loss of every batch are L-smooth, L = `smoothness` (the gradient is L-Lipschitz; f need
    not be convex); gap = f(x_0) - inf f; a batch's gradient is unbiased for f's and E|it - grad f|^2 <=
    batch_variance, which is 0 for whole batches. d = `dimension`; m is `second_moment(estimator, d)`, which is 1 for
    backpropagation and 1 + (d + 1)/n for n Gaussian directions.

    Law, exact slopes (backpropagation; forward gradients), lr < 2/(L m):
        [gap/T + L lr^2 m batch_variance/2] / (lr (1 - L m lr/2)),
    which at lr = 1/(L m) is 2 L m gap/T + batch_variance. Derivation: f(x - lr g) <= f - lr <grad, g> +
    L lr^2 |g|^2/2; in expectation E g = grad and E|g|^2 <= m (|grad|^2 + batch_variance); sum over t and telescope.

    Law, differences with step eps (zero-order, `Mean` of n directions), lr < 1/(2 L m), B2 = L^2 eps^2 E|z|^6 / 4:
        [gap/T + lr B2/2 + L lr^2 (m batch_variance + B2)] / (lr (1/2 - L m lr)).
    Derivation: a slope is off by at most L eps |z|^2/2, by L-smoothness alone and for one side as for two, so
    g = g_0 + b with g_0 as above and E|b|^2 <= B2 (Jensen, over the mean); then <grad, E g> >= |grad|^2/2 - B2/2 and
    |g|^2 <= 2 |g_0|^2 + 2 |b|^2. E|z|^6 is d (d + 2)(d + 4) for Gaussian directions and d^3 for those of length
    sqrt(d). Round-off is not in it.

    Source: the argument is Ghadimi and Lan's (2013, arXiv 1309.5549, theorems 2.1 and 3.2) and Nesterov and
    Spokoiny's (2017, section 7); Panchal et al. (2025, arXiv 2506.21833) state the same orders in d, n and T. The
    constants are derived here. Raises: ValueError when a number is out of its range, lr is too long for the bound
    to hold, or the estimator has no known second moment.
    """
    if not (smoothness > 0 and gap >= 0 and lr > 0 and steps >= 1 and batch_variance >= 0):
        raise BadInput(
            "smoothness and lr must be above 0, steps 1 or more, gap and batch_variance not negative; they are "
            f"{smoothness}, {lr}, {steps}, {gap} and {batch_variance}."
        )
    moment = second_moment(estimator, dimension)
    if moment is None:
        raise BadInput(f"no second moment is known for {estimator}, so no bound: take Mean() over Gaussian().")
    bent = _squared_bias(estimator, smoothness, dimension)
    limit = (2 if bent is None else 0.5) / (smoothness * moment)
    if lr >= limit:
        raise BadInput(f"with a learning rate of {lr} nothing is sure: the bound needs one below {limit:.3g}.")
    noise = smoothness * lr * lr * moment * batch_variance
    if bent is None:
        return (gap / steps + noise / 2) / (lr * (1 - smoothness * moment * lr / 2))
    bias = lr * bent / 2 + smoothness * lr * lr * bent
    return (gap / steps + bias + noise) / (lr * (0.5 - smoothness * moment * lr))


def _squared_bias(estimator: Estimator, smoothness: float, dimension: int) -> float | None:
    """B2 above; None where slopes are exact."""
    match estimator:
        case Accumulated(inner):
            return _squared_bias(inner, smoothness, dimension)
        case Clipped():
            raise BadInput("a clip biases the estimate by an amount that is not bounded here: leave it off.")
        case Probing(slope=CentralDifference(None) | ForwardDifference(None)):
            raise BadInput("the eps that a difference chooses is known only where it is taken: give one.")
        case Probing(slope=CentralDifference(eps) | ForwardDifference(eps), directions=directions, combine=Mean()):
            assert eps is not None
            return (smoothness * eps) ** 2 * _sixth_moment(directions, dimension) / 4
        case Probing(slope=CentralDifference() | ForwardDifference(), combine=combine):
            raise BadInput(f"the bias of a difference under {combine} is not bounded here: take Mean().")
    return None


def _sixth_moment(directions: Directions | StatefulDirections, dimension: int) -> float:
    """E|z|^6. Only directions with a second moment come here: all but the Gaussian ones have length sqrt(d)."""
    match directions:
        case Gaussian():
            return float(dimension * (dimension + 2) * (dimension + 4))
    return float(dimension**3)
