"""How many steps an estimate takes where the gradient itself takes one."""

from __future__ import annotations

from gradcost.core.errors import BadInput
from gradcost.directions import Directions, Gaussian
from gradcost.estimators.combine import Combine, Mean
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.probing import Probing
from gradcost.slopes.slope import Jvp
from gradcost.theory.cosines import expected_cosine
from gradcost.theory.moments import second_moment

GAUSSIAN, MEAN = Gaussian(), Mean()


def slowdown(dimension: int, probes: int, directions: Directions = GAUSSIAN, combine: Combine = MEAN) -> float | None:
    """Steps with a step of descent by n = `probes` directions to those of gradient descent; None where unknown.

    Law: the second moment m = E|g|^2/|grad|^2 (`second_moment`), 1 + (d + 1)/n for Gaussian directions. On an
    L-smooth loss a step lr along an unbiased g makes E f fall by lr |grad|^2 (1 - L m lr/2) at least; lr = 1/(L m)
    is best, and m times less of a fall than gradient descent's with lr = 1/L.

    It compares guarantees, each with the step that its guarantee allows, where no noise from drawing batches hides
    the difference. A loss that curves in few of its d directions is faster: see `effective_slowdown`.

    Source: Nesterov and Spokoiny 2017, equation 55; Ghadimi and Lan 2013 (arXiv 1309.5549), corollary 3.3.
    Raises: ValueError when dimension or probes is below 1.
    """
    return second_moment(Probing(Jvp(), directions, probes, combine), dimension)


def effective_slowdown(trace: float, smoothness: float, probes: int) -> float:
    """The same where the Hessian's trace is known: 1 + (r + 1)/n with r = trace/L, its effective rank, for d.

    Law: for Gaussian directions E g'Hg = (1 + 1/n) grad'H grad + tr(H) |grad|^2/n, which is at most
    L (1 + (r + 1)/n) |grad|^2. It takes m's place in `slowdown` where H bounds the curvature along the way (and
    exactly so on a quadratic). Sign directions and the sphere do no worse where H has no negative diagonal.

    On a quadratic it is near the ratio of the longest stable steps, and of the steps taken it is an underestimate,
    by a tenth to a third where `expected_losses`, which is exact, was run (docs/theory.md).

    Source: Malladi et al. 2023 (arXiv 2305.17333), theorem 1. Raises: ValueError when the trace is negative,
    smoothness is not above 0 or probes is below 1.
    """
    if not (trace >= 0 and smoothness > 0 and probes >= 1):
        raise BadInput(
            f"a trace of 0 or more, a smoothness above 0 and 1 probe or more are needed, not {trace}, "
            f"{smoothness} and {probes}."
        )
    return 1 + (trace / smoothness + 1) / probes


def stable_step(estimator: Estimator, smoothness: float, dimension: int) -> float | None:
    """The learning rate 1/(L m) that falls fastest for sure on a loss of this smoothness L; None where unknown.

    Law: with m = `second_moment(estimator, dimension)`, E f falls with every step up to twice this one. With n
    Gaussian directions 1/(L (1 + (d + 1)/n)). smoothness: the largest curvature, in loss per weight^2.

    Source: Ghadimi and Lan 2013 (arXiv 1309.5549), equation 2.5 and corollary 3.3. Raises: ValueError when
    smoothness is not above 0, or dimension < 1.
    """
    if not smoothness > 0:
        raise BadInput(f"smoothness is the largest curvature of the loss, above 0, not {smoothness}.")
    moment = second_moment(estimator, dimension)
    return None if moment is None else 1 / (smoothness * moment)


def probes_to_match(cosine: float, dimension: int, directions: Directions = GAUSSIAN, combine: Combine = MEAN) -> int:
    """The fewest probes whose estimate has at least this expected cosine with the gradient.

    Law: the least n with `expected_cosine` of n probes >= cosine; near d cosine^2 / (1 - cosine^2) for the mean of
    Gaussian directions and d cosine^2 for a projection.

    Raises: ValueError when cosine is not between 0 and 1, dimension < 1, no number of probes gives it (signs have
    0.80 at most, the mean never 1), or nothing is known of these directions and this combination.
    """

    def enough(probes: int) -> bool:
        found = expected_cosine(Probing(Jvp(), directions, probes, combine), dimension)
        if found is None:
            raise BadInput(f"no formula is known for the cosine of {combine} over {directions}: measure it instead.")
        return found >= cosine

    if not 0 < cosine <= 1:
        raise BadInput(f"a cosine to reach is above 0 and at most 1, not {cosine}.")
    high = 1
    while not enough(high):
        high *= 2
        if high > dimension << 20:  # a million looks a weight are no estimate of a gradient any more
            raise BadInput(
                f"no number of probes gives {combine} over {directions} a cosine of {cosine}: ask for less, or take "
                "Projection(), which reaches 1 with as many probes as weights."
            )
    low = high // 2  # not enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
