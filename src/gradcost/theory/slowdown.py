"""Formulas for the extra steps that an estimate needs compared with gradient descent, and for its learning rate."""

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
    """Return the ratio of two worst-case guarantees: steps with an estimate g from n directions / gradient descent.

    It bounds no ratio of measured steps, because either method may do better than its guarantee.

    Law: the ratio is m = E|g|^2/|grad|^2 (`second_moment`), which is 1 + (d + 1)/n for Gaussian directions.
    Derivation: on an L-smooth loss f, the step x - lr g with an unbiased g decreases E f by at least
        lr |grad|^2 (1 - L m lr/2).
    This is largest at lr = 1/(L m). It is then m times smaller than for gradient descent with lr = 1/L.

    Assumptions: both methods use the learning rate with the largest guaranteed decrease, and batches add no noise. A
    loss with curvature along only a few of its d directions has a smaller ratio: see `effective_slowdown`.

    Args:
        dimension: d, the number of trainable weights, 1 or more.
        probes: n, 1 or more.
        directions: distribution of the directions.
        combine: how the probes are combined.
    Returns:
        The ratio; None if no formula is known.
    Raises:
        BadInput: dimension or probes is below 1.
    Source: Nesterov and Spokoiny 2017, equation 55; Ghadimi and Lan 2013 (arXiv 1309.5549), corollary 3.3.
    """
    return second_moment(Probing(Jvp(), directions, probes, combine), dimension)


def effective_slowdown(trace: float, smoothness: float, probes: int) -> float:
    """Return the ratio of steps of `slowdown` for a Hessian with a known trace: 1 + (r + 1)/n.

    Law: r = tr(H)/L is the effective rank of the Hessian H. For an estimate g from n Gaussian directions
        E g'Hg = (1 + 1/n) grad'H grad + tr(H) |grad|^2/n <= L (1 + (r + 1)/n) |grad|^2,
    so 1 + (r + 1)/n replaces m in `slowdown`. Rademacher and Sphere directions have at most this ratio if no diagonal
    entry of H is negative.

    Assumption: H bounds the curvature along the step. On a quadratic, H is the curvature.

    Accuracy on a quadratic: the formula is near the ratio of the largest stable learning rates. It underestimates the
    ratio of steps from the exact `expected_losses` by a tenth to a third (docs/theory.md).

    Args:
        trace: tr(H), 0 or more.
        smoothness: L, the largest curvature, above 0.
        probes: n, 1 or more.
    Returns:
        The ratio.
    Raises:
        BadInput: an argument is out of its range.
    Source: Malladi et al. 2023 (arXiv 2305.17333), theorem 1.
    """
    if not (trace >= 0 and smoothness > 0 and probes >= 1):
        raise BadInput(
            f"trace must be 0 or more, smoothness above 0 and probes 1 or more; they are {trace}, {smoothness} and "
            f"{probes}."
        )
    return 1 + (trace / smoothness + 1) / probes


def stable_step(estimator: Estimator, smoothness: float, dimension: int) -> float | None:
    """Return 1/(L m), the learning rate with the largest guaranteed decrease of an L-smooth loss f.

    Law: m = `second_moment(estimator, dimension)`. E f decreases at every learning rate below 2/(L m). For n Gaussian
    directions 1/(L m) = 1/(L (1 + (d + 1)/n)).

    Args:
        estimator: how the gradient is obtained.
        smoothness: L, the largest curvature, in loss per weight^2, above 0.
        dimension: d, the number of trainable weights, 1 or more.
    Returns:
        The learning rate; None if no second moment is known.
    Raises:
        BadInput: smoothness is not above 0 or dimension is below 1.
    Source: Ghadimi and Lan 2013 (arXiv 1309.5549), equation 2.5 and corollary 3.3.
    """
    if not smoothness > 0:
        raise BadInput(f"smoothness, the largest curvature of the loss, must be above 0, not {smoothness}.")
    moment = second_moment(estimator, dimension)
    return None if moment is None else 1 / (smoothness * moment)


def probes_to_match(cosine: float, dimension: int, directions: Directions = GAUSSIAN, combine: Combine = MEAN) -> int:
    """Return the smallest number of probes n whose estimate has at least this expected cosine with the gradient.

    Law: n is the smallest number with `expected_cosine` >= cosine. n is near d cosine^2 / (1 - cosine^2) for Mean of
    Gaussian directions, and near d cosine^2 for Projection.

    Args:
        cosine: the cosine to reach, above 0 and at most 1.
        dimension: d, the number of trainable weights, 1 or more.
        directions: distribution of the directions.
        combine: how the probes are combined.
    Returns:
        The number of probes.
    Raises:
        BadInput: an argument is out of its range, no formula is known, or no number of probes is enough (the cosine
            of Sign() is at most c of `expected_cosine`, near 0.80; that of Mean() is below 1).
    """

    def enough(probes: int) -> bool:
        expected = expected_cosine(Probing(Jvp(), directions, probes, combine), dimension)
        if expected is None:
            raise BadInput(f"no formula is known for the cosine of {combine} over {directions}: measure it instead.")
        return expected >= cosine

    if not 0 < cosine <= 1:
        raise BadInput(f"cosine must be above 0 and at most 1, not {cosine}.")
    high = 1
    while not enough(high):
        high *= 2
        if high > dimension << 20:  # a million probes per weight: more probes do not reach `cosine`
            raise BadInput(
                f"no number of probes gives {combine} over {directions} a cosine of {cosine}: lower it, or use "
                "Projection(), whose cosine is 1 with as many probes as weights."
            )
    low = high // 2  # not enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
