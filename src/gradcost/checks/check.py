"""`check`: whether an estimator is correct on one model and one batch, and how good its estimates are."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from gradcost.checks.accumulation import WHAT, accumulation_lines
from gradcost.checks.agreement import AGREES, gradient_line, slope_lines, uses_forward_mode
from gradcost.checks.model_state import disturbed_by, disturbed_by_raising
from gradcost.checks.quality import draw, quality_lines
from gradcost.checks.reference import CLOSE, Reference, dot
from gradcost.checks.report import CheckLine, CheckReport, format_number
from gradcost.core.errors import BadInput, GradcostError, Unsupported, brief
from gradcost.core.interrupts import interruptible
from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective, loss_errors
from gradcost.estimators.estimator import Estimator, require_estimator, require_objective
from gradcost.estimators.reverse import Reverse
from gradcost.estimators.structure import find, micro_batches
from gradcost.slopes.slope import Slope

DRAWS = 16
USABLE = "usable with this model and batch"
UNDISTURBED = "nothing disturbed after an estimate"
SAME_KEY = "the same key gives the same estimate"
PATH = "backprop agrees with a difference of losses"
FORWARD = "forward-mode differentiation"
_SETTLED = 4.0  # backprop fails only if its error exceeds this many times the spread of the differences


def _no_progress(what: str) -> None:
    pass


@interruptible
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

    - Lines on laws are "ok" or "failed": agreement with backprop, all state restored, one function for all
      evaluations, same estimate under the same key. An error with a known harmless cause is a "note".
    - Lines on means over estimates are "ok" or "failed" if theory gives mean and spread. Other lines are a "note".

    Every estimate starts from the state of `init`. The check itself restores all state. A question that raises an
    exception is a failed line with the exception.

    Cost: about draws + 5 estimates, 20 forwards and one backpropagation (one per draw with random layers).
    Memory: the peak of the largest of these, plus one whole gradient, or one copy of the weights.

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
    require_estimator(estimator)
    require_objective(objective)
    if draws < 1:
        raise BadInput(f"draws is a number of estimates, at least 1, not {draws!r}.")
    if reference is None:
        reference = Reference(objective.in_micro_batches(micro_batches(estimator)), batch, key)
    on_progress("the loss")
    subject = f"{type(objective.model).__name__}, {objective.dimension:,} trained weights"
    try:
        with loss_errors(reference.objective):
            subject += f", loss {format_number(reference.loss)}"
    except Unsupported as error:
        return CheckReport(estimator, subject, (CheckLine(USABLE, str(error), "failed"),))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)  # the report has a line for each such warning
        lines = _lines(estimator, objective, reference, draws, on_progress)
    return CheckReport(estimator, subject, tuple(lines))


def _lines(
    estimator: Estimator, objective: Objective, reference: Reference, draws: int, on_progress: Callable[[str], None]
) -> list[CheckLine]:
    loss = reference.loss
    if not math.isfinite(loss):
        return [CheckLine("the loss is finite", format_number(loss), "failed", {"loss": loss})]
    objections: list[str] = []

    def usable_line() -> list[CheckLine]:
        objections.extend(filter(None, [estimator.objection(objective, reference.batch)]))
        return [CheckLine(USABLE, objection, "failed") for objection in objections]

    lines = _answered(USABLE, usable_line)
    if not lines:
        lines = _estimator_lines(estimator, objective, reference, draws, on_progress)
    on_progress("the model")
    return lines + _model_lines(estimator, reference)


def _answered(what: str, answer: Callable[[], Sequence[CheckLine]]) -> list[CheckLine]:
    """Return the lines of `answer`. If it raises, return a failed line on the question `what`."""
    try:
        return list(answer())
    except GradcostError as error:
        return [CheckLine(what, str(error), "failed")]
    except Exception as error:
        return [CheckLine(what, brief(error), "failed")]


def _estimator_lines(
    estimator: Estimator, objective: Objective, reference: Reference, draws: int, on_progress: Callable[[str], None]
) -> list[CheckLine]:
    batch, key = reference.batch, reference.key
    on_progress("side effects")
    # Run this first: an in-place update may change weights by rounding, but the same update again may not.
    side_effects = _answered(UNDISTURBED, lambda: _undisturbed_lines(estimator, objective, reference))
    on_progress("agreement along one direction")
    slopes = find(estimator, Slope)
    lines: list[CheckLine] = []
    if reference.refusal is not None:
        lines.append(CheckLine("backpropagation", f"nothing to compare with: {reference.refusal}", "note"))
    elif not slopes and find(estimator, Reverse):
        lines += _answered(AGREES, lambda: [gradient_line(estimator, objective, reference)])
    for slope in slopes:
        lines += _answered(AGREES, lambda slope=slope: slope_lines(slope, reference))
    parts = micro_batches(estimator)
    if reference.refusal is None:
        tolerance = reference.tolerance
        lines += _answered(WHAT, lambda: accumulation_lines(objective, parts, batch, key, tolerance))
    lines += side_effects
    lines += _answered(SAME_KEY, lambda: [_same_key_line(estimator, objective, reference)])
    if reference.refusal is None:

        def quality() -> list[CheckLine]:
            sample = []
            for number in range(draws):
                on_progress(f"estimate {number + 1} of {draws}")
                sample.append(draw(estimator, objective, reference, number))
            return quality_lines(estimator, objective.dimension, sample)

        lines += _answered("cosine to the true gradient", quality)
    return lines


def _undisturbed_lines(estimator: Estimator, objective: Objective, reference: Reference) -> list[CheckLine]:
    def work() -> object:
        return estimator.estimate(objective, reference.batch, reference.key)

    batch = reference.batch
    changes = {
        UNDISTURBED: disturbed_by(objective, work, batch),
        "nothing disturbed after the model raises": disturbed_by_raising(objective, work, batch),
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
        gap += float(dot(a - b, a - b))
        scale += float(dot(a, a))
    distance = math.sqrt(gap / scale) if scale else math.sqrt(gap)
    if distance == 0:
        return CheckLine(SAME_KEY, "bitwise", "ok", {"apart": distance})
    difference = f"relative difference {format_number(distance)}"
    if distance <= reference.tolerance:
        return CheckLine(SAME_KEY, f"{difference}: nondeterministic kernels", "note", {"apart": distance})
    return CheckLine(SAME_KEY, f"{difference}: randomness outside the key", "failed", {"apart": distance})


def _model_lines(estimator: Estimator, reference: Reference) -> list[CheckLine]:
    """Return lines on what the model supports; a missing feature fails only if this estimator needs it."""
    lines = _answered(PATH, lambda: [_path_line(reference)]) if reference.refusal is None else []
    needs_tangents = uses_forward_mode(find(estimator, Slope))
    forward = _answered(FORWARD, lambda: _forward_mode_lines(needs_tangents, reference))
    return lines + [line if needs_tangents or line.verdict != "failed" else _noted(line) for line in forward]


def _noted(line: CheckLine) -> CheckLine:
    return replace(line, verdict="note")


def _forward_mode_lines(needs_tangents: bool, reference: Reference) -> list[CheckLine]:
    lines = []
    if not reference.blocked:
        lines.append(CheckLine(FORWARD, "every module", "ok", {"blocked": 0.0}))
    numbers = {"blocked": float(len(reference.blocked))}
    for blocked in reference.blocked:
        where = "the loss" if blocked.module is None else blocked.module or type(reference.objective.model).__name__
        text = f"not {where}, at `{blocked.line}`: {blocked.reason}"
        lines.append(CheckLine(FORWARD, text, "failed", numbers))
    if needs_tangents and reference.fused_attention:
        text = "no fused kernel has a forward-mode rule: slopes use blocks of queries, with dropout the math kernel"
        lines.append(CheckLine("attention", text, "note"))
    return lines


def _path_line(reference: Reference) -> CheckLine:
    """Compare backprop with a finite difference: they disagree if .detach() or similar cuts the gradient."""
    error, spread = reference.mismatch
    numbers = {"error": error, "spread": spread}
    if error <= max(CLOSE, 4 * reference.tolerance):
        return CheckLine(PATH, f"{format_number(error)} relative", "ok", numbers)
    if error <= _SETTLED * spread:
        why = f"not settled: differences at two eps differ by {format_number(spread)}, as the loss is coarse or jumps"
        return CheckLine(PATH, f"{format_number(error)} relative: {why}", "note", numbers)
    why = ".data, .detach(), .item(), a straight-through estimator or a discontinuity cuts the path"
    zero = ", ".join(reference.zero_gradients[:3])
    parameters = f" (gradient exactly 0: {zero})" if zero else ""
    return CheckLine(PATH, f"{format_number(error)} relative: {why}{parameters}", "failed", numbers)
