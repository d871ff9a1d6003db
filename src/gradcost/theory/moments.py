"""The second moment of a gradient estimate, as a ratio to the squared norm of the gradient."""

from __future__ import annotations

from gradcost.core.errors import BadInput
from gradcost.directions import Coordinates, Directions, Gaussian, Rademacher, Sphere, StatefulDirections
from gradcost.directions.orthogonal import Orthogonal
from gradcost.estimators.combine import Mean, Projection
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.estimators.structure import unwrapped


def second_moment(estimator: Estimator, dimension: int) -> float | None:
    """Return E|g|^2 / |grad|^2 of an unbiased estimate g from n probes of a loss with d trainable weights.

    Law 4 (`tests/laws`), for every gradient:
    - Mean of Gaussian directions: 1 + (d + 1)/n.
    - Mean of Rademacher or Sphere directions: 1 + (d - 1)/n.
    - Mean of Orthogonal or Coordinates directions, r = n mod d: 1 + r (d - r)/n^2. This is d/n for n <= d.
    - Projection on the span of any of these directions: d/n for n <= d, 1 for n > d.
    - Backprop: 1.

    Assumptions and exceptions:
    - Projection: n <= d Rademacher directions are linearly independent, which fails with probability about n^2/2^d.
    - Finite differences add O(eps^2).
    - Accumulated(e) and Clipped(e) have the formula of e; for Clipped, only if no slope is clipped.
    - Sign and Normalized change the length of g, and have no formula.

    Compared with gradient descent, the guaranteed number of steps grows by this factor: see `slowdown`.

    Args:
        estimator: the gradient estimator.
        dimension: d, the number of trainable weights, 1 or more.
    Returns:
        The ratio; None if no formula is known.
    Raises:
        BadInput: dimension is below 1.
    Source: Nesterov and Spokoiny 2017 (Random gradient-free minimization of convex functions), theorem 4 and
    equation 55; Baydin et al. 2022 (arXiv 2202.08587), section 3; for the projection Fluegel et al. 2024 (arXiv
    2410.17764).
    """
    check_dimension(dimension)
    match unwrapped(estimator):  # removes Accumulated and Clipped
        case Reverse():  # backprop
            return 1.0
        case Probing(directions=directions, probes=probes, combine=Mean()):
            return _second_moment_of_mean(directions, probes, dimension)
        case Probing(
            directions=Gaussian() | Rademacher() | Sphere() | Coordinates() | Orthogonal(),
            probes=probes,
            combine=Projection(),
        ):
            return dimension / min(probes, dimension)
    return None


def check_dimension(dimension: int) -> None:
    """Raise BadInput if the dimension is below 1."""
    if dimension < 1:
        raise BadInput(f"dimension, the number of trainable weights, must be 1 or more, not {dimension}.")


def _second_moment_of_mean(directions: Directions | StatefulDirections, probes: int, dimension: int) -> float | None:
    match directions:
        case Gaussian():
            return 1 + (dimension + 1) / probes
        case Rademacher() | Sphere():
            return 1 + (dimension - 1) / probes
        case Coordinates() | Orthogonal():
            # Complete rounds of d directions sum to full * grad. The sum of the other `rest` has the mean rest * grad
            # and the mean squared norm rest * d * |grad|^2.
            rest = probes % dimension
            full = probes - rest
            return (full * full + 2 * full * rest + rest * dimension) / probes**2
    return None
