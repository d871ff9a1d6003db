"""Compare an estimator with backpropagation along one direction, and state how precise its slope can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradcost.checks.reference import CLOSE, Reference, dot
from gradcost.checks.report import CheckLine, Verdict, format_number
from gradcost.core.key import Key
from gradcost.core.objective import Leaf, Objective
from gradcost.directions import Directions, Rademacher
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.gradient import Gradient
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp, Slope

AGREES = "agrees with backprop along one direction"
_FEW_ULPS = 8  # in ulps: accepted difference between two sums of the same numbers in different orders


class _ZeroDirection(Directions):
    """The direction z = 0: both ends of a finite difference are the same point and must have the same loss."""

    unbiased = False

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return (0,) * probes

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        return base if in_place else base.clone()


def slope_lines(slope: Slope, reference: Reference) -> list[CheckLine]:
    """Return the lines about a slope: agreement with backprop, same function, precision of a finite difference."""
    lines = []
    if reference.refusal is None:
        lines.append(_exact_line(slope, reference) if slope.exact else _difference_line(slope, reference))
    lines.append(_same_function_line(slope, reference))
    eps = _eps(slope, reference)
    return lines if eps is None else lines + _precision_lines(slope, eps, reference)


def _eps(slope: Slope, reference: Reference) -> float | None:
    """Return the eps of a finite difference; None for any other slope."""
    return slope.step(reference.objective) if isinstance(slope, CentralDifference | ForwardDifference) else None


def gradient_line(estimator: Estimator, objective: Objective, reference: Reference) -> CheckLine:
    """Return a line that compares <g, z> with <grad, z> along one direction z, for an estimator without slopes."""
    gradient = estimator.estimate(objective, reference.batch, reference.key).gradient
    error = abs(_product(gradient, 0) - reference.slope(0)) / reference.norm
    return _agreement(error, "ok" if error <= reference.tolerance else "failed")


def _product(gradient: Gradient, seed: int) -> float:
    """Return <g, z> in float64, where z is the Rademacher direction of `seed`."""
    leaves = {leaf.name: leaf for leaf in gradient.objective.leaves}
    return sum(float(dot(g, Rademacher().draw(leaves[name], [seed], [1.0]))) for name, g in gradient.leaves())


def _agreement(error: float, verdict: Verdict, why: str = "") -> CheckLine:
    return CheckLine(AGREES, f"{format_number(error)} relative{why}", verdict, {"error": error})


def _measure(
    slope: Slope, reference: Reference, directions: Directions, seeds: Sequence[int]
) -> tuple[float, Tensor]:
    loss, slopes = slope.measure(reference.objective, reference.batch, reference.key, directions, seeds)
    return float(loss), slopes.double().cpu()


def _exact_line(slope: Slope, reference: Reference) -> CheckLine:
    seeds = range(min(getattr(slope, "together", 1), 2))
    _, slopes = _measure(slope, reference, Rademacher(), seeds)
    expected = torch.tensor([reference.slope(seed) for seed in seeds], dtype=torch.float64)
    error = float((slopes - expected).abs().max()) / reference.norm
    return _agreement(error, "ok" if error <= reference.tolerance else "failed")


def _difference_line(slope: Slope, reference: Reference) -> CheckLine:
    """Compare a finite difference with backprop. Curvature (eps too large) and rounding (too small) give a note."""
    measured = float(_measure(slope, reference, Rademacher(), [0])[1])
    error = abs(measured - reference.slope(0)) / reference.norm
    eps = _eps(slope, reference)
    if error <= CLOSE or eps is None:
        return _agreement(error, "ok" if error <= CLOSE else "failed")
    wider = replace(slope, eps=2 * eps)  # type: ignore[type-var]
    curvature = abs(float(_measure(wider, reference, Rademacher(), [0])[1]) - measured) / reference.norm
    rounding = _FEW_ULPS * reference.resolution + reference.noise + reference.rounding
    rounding = rounding / (2 * eps) / reference.norm
    if error > 4 * max(curvature, rounding):
        return _agreement(error, "failed")
    if curvature > rounding:
        return _agreement(error, "note", f": eps={eps:g} is too large (curvature). Use a smaller eps")
    return _agreement(error, "note", f": eps={eps:g} is too small (rounding). Use a larger eps")


def _same_function_line(slope: Slope, reference: Reference) -> CheckLine:
    """Check along z = 0 that all evaluations use one function: the difference is 0 and the loss is unchanged."""
    loss, slopes = _measure(slope, reference, _ZeroDirection(), [0])
    eps = _eps(slope, reference)
    if eps is None:
        what, gap = "the same function as a plain evaluation", abs(loss - reference.loss)
        # A JVP may use other kernels than a plain evaluation, and these round differently.
        allowed = reference.tolerance * max(abs(reference.loss), reference.resolution)
    else:
        what, gap = "the same function at both ends", abs(float(slopes)) * 2 * eps
        allowed = _FEW_ULPS * reference.resolution
    layers = "no random layers" if reference.key_difference == 0 else "random layers included"
    numbers = {"gap": gap, "another key": reference.key_difference}
    if gap <= allowed:
        difference = "" if gap == 0 else f", difference {format_number(gap)}"
        return CheckLine(what, layers + difference, "ok", numbers)
    why = "a layer uses its own generator or counts its calls"
    text = f"the loss differs by {format_number(gap)} at one point under one key: {why}"
    return CheckLine(what, text, "failed", numbers)


def _precision_lines(slope: Slope, eps: float, reference: Reference) -> list[CheckLine]:
    """Return two lines: the slope errors that the noise and the resolution of the loss cause."""
    loss_difference = abs(float(_measure(slope, reference, Rademacher(), [0])[1])) * 2 * eps

    def line(what: str, gap: float, text: str) -> CheckLine:
        error = gap / (2 * eps)
        relative = format_number(error) if reference.refusal else f"{format_number(error / reference.norm)} |grad|"
        is_fine = reference.refusal is not None or error <= CLOSE * reference.norm
        effect = f"slope error {relative}" if gap else "two evaluations agree bitwise"
        advice = "" if is_fine else f". eps={eps:g} is too small"
        numbers = {"gap": gap, "slope error": error, "difference": loss_difference, "eps": eps}
        return CheckLine(what, f"{text}: {effect}{advice}", "ok" if is_fine else "note", numbers)

    noise, resolution = format_number(reference.noise), format_number(reference.resolution)
    return [
        line("noise of the loss at one point", reference.noise, noise),
        line(
            "resolution of the loss",
            reference.resolution,
            f"{resolution}, |L+ - L-| {format_number(loss_difference)}",
        ),
    ]


def uses_forward_mode(slopes: Sequence[Slope]) -> bool:
    """Return whether one of the slopes is a Jvp."""
    return any(isinstance(slope, Jvp) for slope in slopes)
