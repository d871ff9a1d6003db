"""How long an estimate is: its second moment, in units of the gradient's."""

from __future__ import annotations

from gradcost.core.errors import BadInput
from gradcost.directions import Coordinates, Directions, Gaussian, Rademacher, Sphere, StatefulDirections
from gradcost.directions.orthogonal import Orthogonal
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.combine import Mean, Projection
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse


def second_moment(estimator: Estimator, dimension: int) -> float | None:
    """E|g|^2 / |grad|^2 of an unbiased estimate g of the gradient in `dimension` weights; None where unknown.

    Law (4), n probes in d weights:
    - the mean of Gaussian directions: 1 + (d + 1)/n; of Rademacher ones and of those on the sphere: 1 + (d - 1)/n;
    - the mean of directions that are orthogonal and as long as each other (Orthogonal; Coordinates, dealt
      without replacement): d/n for n <= d;
    - the projection on the span of any of these: d/n for n <= d, and 1 beyond (of signs: where they are linearly
      independent, as all but a share of about n^2/2^d of their draws are);
    - backpropagation: 1.
    All hold for every gradient, however its weight is spread. A difference of losses adds O(eps^2).
    Accumulated(e) is e; Clipped(e) is e as long as it cuts nothing. Sign and Normalized have no length to compare.

    It is also the ratio of steps: see `slowdown`.

    Source: Nesterov and Spokoiny 2017 (Random gradient-free minimization of convex functions), theorem 4 and
    equation 55; Baydin et al. 2022 (arXiv 2202.08587), section 3; for the projection Fluegel et al. 2024 (arXiv
    2410.17764). Raises: ValueError when dimension < 1.
    """
    check_dimension(dimension)
    match estimator:
        case Accumulated(inner) | Clipped(inner):
            return second_moment(inner, dimension)
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
    """Raises: ValueError when there are no weights."""
    if dimension < 1:
        raise BadInput(f"a gradient has 1 dimension or more, not {dimension}.")


def _of_the_mean(directions: Directions | StatefulDirections, probes: int, dimension: int) -> float | None:
    match directions:
        case Gaussian():
            return 1 + (dimension + 1) / probes
        case Rademacher() | Sphere():
            return 1 + (dimension - 1) / probes
        case Coordinates() | Orthogonal():
            # Whole rounds give the gradient itself, and r more cards of a new deal r d |grad|^2 / d on average.
            rounds, rest = divmod(probes, dimension)
            whole = rounds * dimension
            return (whole * whole + 2 * whole * rest + rest * dimension) / probes**2
    return None
