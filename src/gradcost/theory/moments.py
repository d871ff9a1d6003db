"""The second moment of an estimate, relative to the squared gradient."""

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
    """Return E|g|^2 / |grad|^2 of an unbiased estimate g from n probes in d weights.

    Law 4:
    - Mean of Gaussian directions: 1 + (d + 1)/n.
    - Mean of Rademacher or Sphere directions: 1 + (d - 1)/n.
    - Mean of orthogonal directions of equal length (Orthogonal; Coordinates, sampled without replacement): d/n for
      n <= d.
    - Projection on the span of any of these: d/n for n <= d, 1 for n > d. (Rademacher directions must be linearly
      independent, as all but a share of about n^2/2^d are.)
    - Backprop: 1.
    The law holds for every gradient. A finite difference adds O(eps^2). Accumulated(e) has the second moment of e.
    Clipped(e) has it if no slope is clipped. Sign and Normalized change the length of g: no formula.

    The second moment is also the ratio of steps: see `slowdown`.

    Args:
        estimator: how the gradient is obtained.
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
    match unwrapped(estimator):
        case Reverse():
            return 1.0
        case Probing(directions=directions, probes=probes, combine=Mean()):
            return _of_the_mean(directions, probes, dimension)
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


def _of_the_mean(directions: Directions | StatefulDirections, probes: int, dimension: int) -> float | None:
    match directions:
        case Gaussian():
            return 1 + (dimension + 1) / probes
        case Rademacher() | Sphere():
            return 1 + (dimension - 1) / probes
        case Coordinates() | Orthogonal():
            # A full round of d directions sums to d grad; `rest` directions have a mean square of rest d |grad|^2.
            rest = probes % dimension
            full = probes - rest
            return (full * full + 2 * full * rest + rest * dimension) / probes**2
    return None
