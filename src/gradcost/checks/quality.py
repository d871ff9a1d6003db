"""The quality of estimates: cosine, length, bias and second moment against backpropagation and theory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from gradcost.checks.reference import Reference, products
from gradcost.checks.report import CheckLine, Verdict, format_number
from gradcost.core.errors import GradcostError
from gradcost.core.objective import Objective
from gradcost.directions import Directions, Gaussian, Rademacher, Sphere, StatefulDirections
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.probing import Probing
from gradcost.estimators.structure import find
from gradcost.theory.cosines import expected_cosine
from gradcost.theory.moments import second_moment
from gradcost.theory.slowdown import probes_to_match

ERRORS = 5.0  # standard errors that a mean may deviate; chance alone exceeds them once in two million checks
_MIN_DRAWS = 8  # with fewer draws a mean has no verdict


@dataclass(frozen=True)
class Draw:
    """One estimate g compared with the gradient.

    Args:
        cosine: cos(g, grad).
        ratio: |g| / |grad|.
        projection: <g, grad> / |grad|^2.
        probes: the number of slopes; 0 without slopes.
        clipped: whether `Clipped` cut a slope.
    """

    cosine: float
    ratio: float
    projection: float
    probes: int
    clipped: bool


def draw(estimator: Estimator, objective: Objective, reference: Reference, number: int, state: Any = None) -> Draw:
    """Compute estimate `number` under its own key, and compare it with the gradient under that key."""
    key = reference.key.fold("draw", number)
    estimate = estimator.estimate(objective, reference.batch, key, state)
    dot, square, gradient_square = products(estimate.gradient, reference.gradient(key))
    length, norm = math.sqrt(square), math.sqrt(gradient_square)
    return Draw(
        cosine=dot / (length * norm) if length * norm else 0.0,
        ratio=length / norm if norm else math.nan,
        projection=dot / gradient_square if gradient_square else math.nan,
        probes=0 if estimate.slopes is None else len(estimate.slopes),
        clipped=bool(estimate.clipped),
    )


def mean_and_error(sample: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error. Both are NaN if a number is not finite; one number has error NaN."""
    if not all(map(math.isfinite, sample)):
        return math.nan, math.nan
    return fmean(sample), stdev(sample) / len(sample) ** 0.5 if len(sample) > 1 else math.nan


def quality_lines(estimator: Estimator, dimension: int, sample: Sequence[Draw]) -> list[CheckLine]:
    """Return lines on cosine, length, bias and second moment, with a verdict where theory has a formula."""
    moment = None if any(one.clipped for one in sample) else second_moment(estimator, dimension)
    spread = _spread(estimator, moment, sample[0].probes)
    projections = [one.projection for one in sample]
    squares = [one.ratio**2 for one in sample]
    expected_projection = None if moment is None else 1.0
    moment_spread = None if spread is None else spread * (moment or 1)
    return [
        _cosine_line(estimator, dimension, sample),
        _mean_line("length |g| / |grad|", [one.ratio for one in sample], None, None),
        _mean_line("bias: <mean g, grad> / |grad|^2", projections, expected_projection, spread),
        _mean_line("second moment E|g|^2 / |grad|^2", squares, moment, moment_spread),
        *_probes_lines(estimator, dimension),
    ]


def _spread(estimator: Estimator, moment: float | None, probes: int) -> float | None:
    """Return the standard deviation of <g, grad> / |grad|^2 in theory; None if no formula is known.

    For n independent directions z with E z_i^4 <= 3 it is at most sqrt(2/n), as var(<grad, z>^2) <= 2 |grad|^4.
    """
    if moment == 1.0:
        return 0.0
    kinds = find(estimator, Directions) + find(estimator, StatefulDirections)
    is_known = moment is not None and all(isinstance(kind, Gaussian | Rademacher | Sphere) for kind in kinds)
    return math.sqrt(2 / probes) if is_known and probes else None


def _mean_line(what: str, sample: Sequence[float], expected: float | None, spread: float | None) -> CheckLine:
    """Return a line on a mean, with a verdict if expected value and spread are known and there are enough draws."""
    mean, error = mean_and_error(sample)
    numbers = {"mean": mean, "standard error": error}
    text = f"{format_number(mean)} +- {format_number(error)}" if error == error else format_number(mean)
    if expected is None:
        return CheckLine(what, text, "note", numbers)
    numbers["theory"] = expected
    text += f"   theory {format_number(expected)}"
    if spread is None or len(sample) < _MIN_DRAWS:
        return CheckLine(what, text, "note", numbers)
    # The 1% allows for the bias of a finite difference and for rounding.
    allowed = ERRORS * max(error, spread / len(sample) ** 0.5) + 0.01 * expected
    verdict: Verdict = "ok" if abs(mean - expected) <= allowed else "failed"
    return CheckLine(what, text, verdict, numbers)


def _cosine_line(estimator: Estimator, dimension: int, sample: Sequence[Draw]) -> CheckLine:
    line = _mean_line("cosine to the true gradient", [one.cosine for one in sample], None, None)
    expected = expected_cosine(estimator, dimension)
    if expected is None:
        return line
    n = f", n = {sample[0].probes}" if sample[0].probes else ""
    text = f"{line.found}   theory {format_number(expected)} for d = {dimension:,}{n}"
    return CheckLine(line.what, text, "note", {**line.numbers, "theory": expected})


def _probes_lines(estimator: Estimator, dimension: int) -> list[CheckLine]:
    """Return a line on how many probes reach cosine 0.5 in theory; empty if no formula is known."""
    probing = find(estimator, Probing)
    if len(probing) != 1 or not isinstance(probing[0].directions, Directions):
        return []
    try:
        probes = probes_to_match(0.5, dimension, probing[0].directions, probing[0].combine)
    except GradcostError:  # no formula is known, or no number of probes is enough
        return []
    return [CheckLine("to reach cosine 0.5 you would need", f"{probes:,} probes", "note", {"probes": float(probes)})]
