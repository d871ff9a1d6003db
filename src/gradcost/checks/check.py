"""`check`: whether an estimator is correct on one model and one batch, and how good its estimates are."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

from gradcost.checks.agreement import gradient_line, slope_lines, uses_forward_mode
from gradcost.checks.model_state import disturbed_by, disturbed_by_raising
from gradcost.checks.quality import draw, quality_lines
from gradcost.checks.reference import CLOSE, Reference
from gradcost.checks.report import CheckLine, CheckReport, format_number
from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective, loss_errors
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.reverse import Reverse
from gradcost.estimators.structure import find, micro_batches
from gradcost.slopes.slope import Slope

DRAWS = 16
USABLE = "usable with this model and batch"


def _no_progress(what: str) -> None:
    pass


def check(
    estimator: Estimator,
    objective: Objective,
    batch: Any,
    key: Key = Key(0),  # noqa: B008 (a key is an immutable value)
    draws: int = DRAWS,
    on_progress: Callable[[str], None] = _no_progress,
    reference: Reference | None = None,
) -> CheckReport:
    """Check an estimator against backpropagation on one model and batch: one line per question.

    - Laws have the verdict "ok" or "failed": agreement with backprop, all state restored, one function for all
      evaluations, same estimate under the same key. An error with a known harmless cause is a "note".
    - Means have a verdict where theory gives their value. Other lines are figures ("note").

    Every estimate starts from the state of `init`. The check itself restores all state.

    Cost: about draws + 5 estimates, 20 forwards and one backpropagation (one per draw with random layers).
    Memory: the peak of the largest of these, plus one whole gradient.

    Args:
        estimator: what to check.
        objective: the model and its loss.
        batch: any pytree; passed to the loss as it is.
        key: the source of the directions and of the random layers.
        draws: the number of estimates per mean. A mean has a verdict from 8 draws on.
        on_progress: called with the name of each stage before it starts.
        reference: the `Reference` of an earlier check of the same model, batch and key, to save time. None makes a
            new one. Pass None for an estimator that splits the batch into micro-batches.
    Returns:
        CheckReport. Print it for the table; `report.failed` lists the failures.
    Raises:
        BadInput: draws < 1, or the loss cannot be evaluated on the batch.
    """
    if draws < 1:
        raise BadInput(f"draws is a number of estimates, at least 1, not {draws!r}.")
    if reference is None:
        reference = Reference(objective.in_micro_batches(micro_batches(estimator)), batch, key)
    on_progress("the loss")
    with loss_errors(reference.objective):
        loss = reference.loss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)  # the report has a line for each such warning
        lines = _lines(estimator, objective, reference, draws, on_progress)
    model = type(objective.model).__name__
    subject = f"{model}, {objective.dimension:,} trained weights, loss {format_number(loss)}"
    return CheckReport(estimator, subject, tuple(lines))


def _lines(
    estimator: Estimator, objective: Objective, reference: Reference, draws: int, on_progress: Callable[[str], None]
) -> list[CheckLine]:
    loss = reference.loss
    if not math.isfinite(loss):
        return [CheckLine("the loss is finite", format_number(loss), "failed", {"loss": loss})]
    objection = estimator.objection(objective, reference.batch)
    if objection is None:
        lines = _estimator_lines(estimator, objective, reference, draws, on_progress)
    else:
        lines = [CheckLine(USABLE, objection, "failed")]
    on_progress("the model")
    return lines + _model_lines(estimator, reference)


def _estimator_lines(
    estimator: Estimator, objective: Objective, reference: Reference, draws: int, on_progress: Callable[[str], None]
) -> list[CheckLine]:
    on_progress("side effects")
    # This runs first: only the first in-place update along a direction may change weights by rounding.
    side_effects = _undisturbed_lines(estimator, objective, reference)
    on_progress("agreement along one direction")
    slopes = find(estimator, Slope)
    lines: list[CheckLine] = []
    if reference.refusal is not None:
        lines.append(CheckLine("backpropagation", f"nothing to compare with: {reference.refusal}", "note"))
    elif not slopes and find(estimator, Reverse):
        lines.append(gradient_line(estimator, objective, reference))
    for slope in slopes:
        lines += slope_lines(slope, reference)
    lines += side_effects
    lines.append(_same_key_line(estimator, objective, reference))
    if reference.refusal is None:
        sample = []
        for number in range(draws):
            on_progress(f"estimate {number + 1} of {draws}")
            sample.append(draw(estimator, objective, reference, number))
        lines += quality_lines(estimator, objective.dimension, sample)
    return lines


def _undisturbed_lines(estimator: Estimator, objective: Objective, reference: Reference) -> list[CheckLine]:
    def work() -> object:
        return estimator.estimate(objective, reference.batch, reference.key)

    changes = {
        "nothing disturbed after an estimate": disturbed_by(objective, work),
        "nothing disturbed after the model raises": disturbed_by_raising(objective, work),
    }
    return [
        CheckLine(what, f"changed: {', '.join(names[:5])}" if names else "bitwise", "failed" if names else "ok")
        for what, names in changes.items()
    ]


def _same_key_line(estimator: Estimator, objective: Objective, reference: Reference) -> CheckLine:
    """Compare two estimates under the same key, tensor by tensor."""
    one, other = (estimator.estimate(objective, reference.batch, reference.key).gradient for _ in range(2))
    gap = scale = 0.0
    for (_, a), (_, b) in zip(one.leaves(), other.leaves(), strict=True):
        gap += float((a.double() - b.double()).square().sum())
        scale += float(a.double().square().sum())
    distance = math.sqrt(gap / scale) if scale else math.sqrt(gap)
    what = "the same key gives the same estimate"
    if distance == 0:
        return CheckLine(what, "bitwise", "ok", {"apart": distance})
    difference = f"relative difference {format_number(distance)}"
    if distance <= reference.tolerance:
        return CheckLine(what, f"{difference}: nondeterministic kernels", "note", {"apart": distance})
    return CheckLine(what, f"{difference}: randomness outside the key", "failed", {"apart": distance})


def _model_lines(estimator: Estimator, reference: Reference) -> list[CheckLine]:
    """Return lines on what the model supports; a missing feature fails only if this estimator needs it."""
    lines = [_path_line(reference)] if reference.refusal is None else []
    needs_tangents = uses_forward_mode(find(estimator, Slope))
    what = "forward-mode differentiation"
    if not reference.blocked:
        lines.append(CheckLine(what, "every module", "ok", {"blocked": 0.0}))
    numbers = {"blocked": float(len(reference.blocked))}
    for blocked in reference.blocked:
        where = "the loss" if blocked.module is None else blocked.module or type(reference.objective.model).__name__
        text = f"not {where}, at `{blocked.line}`: {blocked.reason}"
        lines.append(CheckLine(what, text, "failed" if needs_tangents else "note", numbers))
    if needs_tangents and reference.fused_attention:
        text = "uses the math kernel during a slope: fused kernels have no forward-mode rule"
        lines.append(CheckLine("attention", text, "note"))
    return lines


def _path_line(reference: Reference) -> CheckLine:
    """Compare backprop with a finite difference: they disagree if .detach() or similar cuts the gradient."""
    what, mismatch = "backprop agrees with a difference of losses", reference.mismatch
    numbers = {"error": mismatch}
    if mismatch <= max(CLOSE, 4 * reference.tolerance):
        return CheckLine(what, f"{format_number(mismatch)} relative", "ok", numbers)
    why = ".data, .detach(), .item(), a straight-through estimator or a discontinuity cuts the path"
    zero = ", ".join(reference.zero_gradients[:3])
    parameters = f" (gradient exactly 0: {zero})" if zero else ""
    return CheckLine(what, f"{format_number(mismatch)} relative: {why}{parameters}", "failed", numbers)
