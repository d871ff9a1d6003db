"""Along one direction: whether what an estimator measures is what backpropagation finds, and how finely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradcost.checks.reference import CLOSE, Reference
from gradcost.checks.report import Line, Verdict, short
from gradcost.core.key import Key
from gradcost.core.objective import Leaf
from gradcost.directions import Directions, Rademacher
from gradcost.directions.direction import combination
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.gradient import Gradient
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp, Slope

AGREES = "agrees with backprop along one direction"
_FEW_ULPS = 8  # that two sums of the same numbers in another order may lie apart


class _Nowhere(Directions):
    """z = 0: both ends of a difference are one point, and must have one loss."""

    unbiased = False

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return (0,) * probes

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        return base if in_place else base.clone()


def slope_lines(slope: Slope, reference: Reference) -> list[Line]:
    """What there is to say about one way of measuring a slope."""
    lines = [] if reference.refusal else [_exact(slope, reference) if slope.exact else _differenced(slope, reference)]
    lines.append(_same_function(slope, reference))
    eps = _step(slope, reference)
    return lines if eps is None else lines + _resolved(slope, eps, reference)


def _step(slope: Slope, reference: Reference) -> float | None:
    """How far a difference of losses goes along a direction; None for a slope that is none."""
    return slope.step(reference.objective) if isinstance(slope, CentralDifference | ForwardDifference) else None


def gradient_line(estimator: Estimator, objective: Any, reference: Reference) -> Line:
    """For a gradient that no slope was measured for: its product with one direction beside that of backprop's."""
    gradient = estimator.estimate(objective, reference.batch, reference.key).gradient
    error = abs(_along(gradient, 0) - reference.along(0)) / reference.norm
    return _agreement(error, "ok" if error <= reference.rounding else "failed")


def _along(gradient: Gradient, seed: int) -> float:
    leaves = {leaf.name: leaf for leaf in gradient.objective.leaves}
    return sum(
        float((g.double() * combination(Rademacher(), leaves[name], [seed], [1.0]).double()).sum())
        for name, g in gradient.leaves()
    )


def _agreement(error: float, verdict: Verdict, why: str = "") -> Line:
    return Line(AGREES, f"{short(error)} relative{why}", verdict, {"error": error})


def _measured(
    slope: Slope, reference: Reference, directions: Directions, seeds: Sequence[int]
) -> tuple[float, Tensor]:
    loss, slopes = slope.measure(reference.objective, reference.batch, reference.key, directions, seeds)
    return float(loss), slopes.double().cpu()


def _exact(slope: Slope, reference: Reference) -> Line:
    seeds = range(min(getattr(slope, "together", 1), 2))
    _, slopes = _measured(slope, reference, Rademacher(), seeds)
    expected = torch.tensor([reference.along(seed) for seed in seeds], dtype=torch.float64)
    error = float((slopes - expected).abs().max()) / reference.norm
    return _agreement(error, "ok" if error <= reference.rounding else "failed")


def _differenced(slope: Slope, reference: Reference) -> Line:
    """A difference has errors of its own: the curvature's, which grows with the step, and the rounding's."""
    found = float(_measured(slope, reference, Rademacher(), [0])[1])
    error = abs(found - reference.along(0)) / reference.norm
    eps = _step(slope, reference)
    if error <= CLOSE or eps is None:
        return _agreement(error, "ok" if error <= CLOSE else "failed")
    wider = replace(slope, eps=2 * eps)  # type: ignore[type-var]
    curvature = abs(float(_measured(wider, reference, Rademacher(), [0])[1]) - found) / reference.norm
    rounding = (_FEW_ULPS * reference.resolution + reference.floor) / (2 * eps) / reference.norm
    if error > 4 * max(curvature, rounding):
        return _agreement(error, "failed")
    advice = "smaller" if curvature > rounding else "larger"
    return _agreement(error, "note", f": eps={eps:g} is to blame, and a {advice} one is nearer")


def _same_function(slope: Slope, reference: Reference) -> Line:
    """Along no direction a difference is 0, and the loss is the plain one, if every evaluation sees one function."""
    loss, slopes = _measured(slope, reference, _Nowhere(), [0])
    eps = _step(slope, reference)
    if eps is None:
        what, gap, allowed = "the same function as a plain evaluation", abs(loss - reference.loss), reference.rounding
        allowed *= max(abs(reference.loss), reference.resolution)  # other kernels, other rounding
    else:
        what, gap = "the same function at both ends", abs(float(slopes)) * 2 * eps
        allowed = _FEW_ULPS * reference.resolution
    drawn = "no layer draws" if reference.random == 0 else "random layers included"
    numbers = {"gap": gap, "another key": reference.random}
    if gap <= allowed:
        return Line(what, drawn if gap == 0 else f"{drawn}, {short(gap)} apart", "ok", numbers)
    why = "a layer draws from a generator of its own, or counts its calls"
    return Line(what, f"the loss differs by {short(gap)} at one point under one key: {why}", "failed", numbers)


def _resolved(slope: Slope, eps: float, reference: Reference) -> list[Line]:
    """What the loss's own coarseness makes of a slope."""
    apart = abs(float(_measured(slope, reference, Rademacher(), [0])[1])) * 2 * eps

    def line(what: str, gap: float, found: str) -> Line:
        error = gap / (2 * eps)
        share = short(error) if reference.refusal else f"{short(error / reference.norm)} |grad|"
        fine = reference.refusal is not None or error <= CLOSE * reference.norm
        found += f": a slope is off by {share}" if gap else ": two evaluations agree bitwise"
        found += "" if fine else f". eps={eps:g} is too small"
        numbers = {"gap": gap, "slope error": error, "difference": apart, "eps": eps}
        return Line(what, found, "ok" if fine else "note", numbers)

    return [
        line("noise of the loss at one point", reference.floor, short(reference.floor)),
        line(
            "resolution of the loss", reference.resolution, f"{short(reference.resolution)}, |L+ - L-| {short(apart)}"
        ),
    ]


def uses_tangents(slopes: Sequence[Slope]) -> bool:
    """Whether forward-mode differentiation is among them."""
    return any(isinstance(slope, Jvp) for slope in slopes)
