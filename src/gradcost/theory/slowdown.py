"""How many steps an estimate takes where the gradient itself takes one."""

from __future__ import annotations

from gradcost.combine import Mean
from gradcost.directions import Coordinates, Directions, Gaussian, Rademacher, Situated, Sphere
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse


def second_moment(estimator: Estimator, dimension: int) -> float | None:
    """E|g|^2 / |grad|^2 of an unbiased estimate g of the gradient in `dimension` weights; None where unknown.

    Law (4): for n probes and their mean, 1 + (d + 1)/n with Gaussian directions, 1 + (d - 1)/n with Rademacher
    ones and on the sphere, d/n with n <= d coordinates dealt without replacement, and 1 for backpropagation. A
    difference of losses adds O(eps^2). Accumulated(e) is e; Clipped(e) is e as long as it cuts nothing.

    It is also the ratio of steps: on an L-smooth loss the step lr = 1/(L m) of an unbiased g with second moment m
    makes E f fall by |grad|^2 / (2 L m) at least, m times less than gradient descent with 1/L does. So m times the
    steps are expected, where noise from drawing batches does not hide the difference.

    Source: Nesterov and Spokoiny 2017 (Random gradient-free minimization of convex functions), theorem 4 and
    equation 55; Baydin et al. 2022 (arXiv 2202.08587), section 3; Ghadimi and Lan 2013 (arXiv 1309.5549) for the
    step. Raises: ValueError when dimension < 1.
    """
    if dimension < 1:
        raise ValueError(f"a gradient has 1 dimension or more, not {dimension}.")
    match estimator:
        case Accumulated(inner) | Clipped(inner):
            return second_moment(inner, dimension)
        case Reverse():
            return 1.0
        case Probing(directions=directions, probes=probes, combine=Mean()):
            return _of_probes(directions, probes, dimension)
    return None


def _of_probes(directions: Directions | Situated, probes: int, dimension: int) -> float | None:
    match directions:
        case Gaussian():
            return 1 + (dimension + 1) / probes
        case Rademacher() | Sphere():
            return 1 + (dimension - 1) / probes
        case Coordinates():
            # Whole rounds give the gradient itself, and r more cards of a new deal r d |grad|^2 / d on average.
            rounds, rest = divmod(probes, dimension)
            whole = rounds * dimension
            return (whole * whole + 2 * whole * rest + rest * dimension) / probes**2
    return None
