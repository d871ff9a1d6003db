"""How good the estimates are: cosine, length, bias and second moment against backpropagation, beside the theory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from gradcost.checks.reference import Reference, products
from gradcost.checks.report import Line, Verdict, short
from gradcost.core.errors import GradcostError
from gradcost.directions import Directions, Gaussian, Rademacher, Sphere, StatefulDirections
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.probing import Probing
from gradcost.estimators.structure import within
from gradcost.theory.cosines import expected_cosine
from gradcost.theory.moments import second_moment
from gradcost.theory.slowdown import probes_to_match

ERRORS = 5.0  # standard errors: passed by chance once in two million looks
_ENOUGH = 8  # draws from which a verdict on a mean is ventured


@dataclass(frozen=True)
class Draw:
    """One estimate g beside the gradient: cos(g, grad), |g| / |grad|, and <g, grad> / |grad|^2, its share of it."""

    cosine: float
    ratio: float
    projection: float
    probes: int
    clipped: bool


def draw(estimator: Estimator, objective: Any, reference: Reference, number: int, state: Any = None) -> Draw:
    """An estimate under a key of its own, beside the gradient of the function that the loss is under that key."""
    key = reference.key.fold("draw", number)
    found = estimator.estimate(objective, reference.batch, key, state)
    dot, square, exact = products(found.gradient, reference.gradient(key))
    length, norm = math.sqrt(square), math.sqrt(exact)
    return Draw(
        cosine=dot / (length * norm) if length * norm else 0.0,
        ratio=length / norm if norm else math.nan,
        projection=dot / exact if exact else math.nan,
        probes=0 if found.slopes is None else len(found.slopes),
        clipped=bool(found.clipped),
    )


def mean_and_error(sample: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error: NaN where a number is not finite, the error also of one number."""
    if not all(map(math.isfinite, sample)):
        return math.nan, math.nan
    return fmean(sample), stdev(sample) / len(sample) ** 0.5 if len(sample) > 1 else math.nan


def quality_lines(estimator: Estimator, dimension: int, drawn: Sequence[Draw]) -> list[Line]:
    """What the draws say, with a verdict where theory knows what it should be."""
    moment = None if any(one.clipped for one in drawn) else second_moment(estimator, dimension)
    share = _share(estimator, moment, drawn[0].probes)
    parts = [one.projection for one in drawn]
    squares = [one.ratio**2 for one in drawn]
    whole = None if moment is None else 1.0
    return [
        _cosine(estimator, dimension, drawn),
        _mean("length |g| / |grad|", [one.ratio for one in drawn], None, None),
        _mean("bias: <mean g, grad> / |grad|^2", parts, whole, share),
        _mean("second moment E|g|^2 / |grad|^2", squares, moment, None if share is None else share * (moment or 1)),
        *_probes_needed(estimator, dimension),
    ]


def _share(estimator: Estimator, moment: float | None, probes: int) -> float | None:
    """The standard deviation of <g, grad> / |grad|^2 that theory expects, None where it does not know.

    For n independent directions with E z_i^4 <= 3 it is at most sqrt(2/n): <grad, z>^2 is close to a chi-square.
    """
    if moment == 1.0:
        return 0.0
    kinds = within(estimator, Directions) + within(estimator, StatefulDirections)
    known = moment is not None and all(isinstance(kind, Gaussian | Rademacher | Sphere) for kind in kinds)
    return math.sqrt(2 / probes) if known and probes else None


def _mean(what: str, sample: Sequence[float], expected: float | None, spread: float | None) -> Line:
    """The sample's mean; a verdict where its expectation and its spread are known, for few draws tell neither."""
    mean, error = mean_and_error(sample)
    numbers = {"mean": mean, "standard error": error}
    found = f"{short(mean)} +- {short(error)}" if error == error else short(mean)
    if expected is None:
        return Line(what, found, "note", numbers)
    numbers["theory"] = expected
    found += f"   theory {short(expected)}"
    if spread is None or len(sample) < _ENOUGH:
        return Line(what, found, "note", numbers)
    allowed = ERRORS * max(error, spread / len(sample) ** 0.5) + 0.01 * expected  # of eps, and of rounding
    verdict: Verdict = "ok" if abs(mean - expected) <= allowed else "failed"
    return Line(what, found, verdict, numbers)


def _cosine(estimator: Estimator, dimension: int, drawn: Sequence[Draw]) -> Line:
    line = _mean("cosine to the true gradient", [one.cosine for one in drawn], None, None)
    expected = expected_cosine(estimator, dimension)
    if expected is None:
        return line
    n = f", n = {drawn[0].probes}" if drawn[0].probes else ""
    found = f"{line.found}   theory {short(expected)} for d = {dimension:,}{n}"
    return Line(line.what, found, "note", {**line.numbers, "theory": expected})


def _probes_needed(estimator: Estimator, dimension: int) -> list[Line]:
    """How many probes of this kind point within 60 degrees of the gradient, where theory knows the kind."""
    kinds = within(estimator, Probing)
    if len(kinds) != 1 or not isinstance(kinds[0].directions, Directions):
        return []
    try:
        needed = probes_to_match(0.5, dimension, kinds[0].directions, kinds[0].combine)
    except GradcostError:  # it says that no formula is known, or that no number of probes is enough
        return []
    return [Line("to reach cosine 0.5 you would need", f"{needed:,} probes", "note", {"probes": float(needed)})]
