"""An estimator looked at on one model and one batch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

from gradcost.checks.agreement import gradient_line, slope_lines, uses_tangents
from gradcost.checks.model_state import disturbed_by, disturbed_by_raising
from gradcost.checks.quality import draw, quality_lines
from gradcost.checks.reference import CLOSE, Reference
from gradcost.checks.report import CheckReport, Line, short
from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective, loss_errors
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.reverse import Reverse
from gradcost.estimators.structure import micro_batches, within
from gradcost.slopes.slope import Slope

DRAWS = 16
SERVES = "can serve here"


def _silent(what: str) -> None:
    pass


def check(
    estimator: Estimator,
    objective: Objective,
    batch: Any,
    key: Key = Key(0),  # noqa: B008 (a key is an immutable value)
    draws: int = DRAWS,
    on_progress: Callable[[str], None] = _silent,
    reference: Reference | None = None,
) -> CheckReport:
    """Whether the estimator is right on this model and batch, and how good: one line a question.

    Backpropagation through the model as it is is what all is held against. The lines with a verdict are laws
    (agreement, nothing disturbed, one function, same key); the others are figures. Each draw is the estimator's
    first estimate, from the state of `init`, under a key of its own. `told` hears what is looked at next.
    `ground` keeps what is true whatever the estimator, for another estimator on the same model and batch.

    Costs about draws + 5 estimates, one backpropagation (one a draw where layers draw at random) and 20
    forwards; memory for the largest of these and one whole gradient. Nothing is disturbed. Raises: ValueError
    when draws < 1, or the loss cannot be evaluated on the batch.
    """
    if draws < 1:
        raise BadInput(f"draws is how many estimates are looked at: 1 or more, not {draws!r}.")
    if reference is None:
        reference = Reference(objective.in_parts(micro_batches(estimator)), batch, key)
    on_progress("the loss")
    _evaluated(reference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)  # what a method would say of its slopes is a line here
        lines = _lines(estimator, objective, reference, draws, on_progress)
    subject = (
        f"{type(objective.model).__name__}, {objective.dimension:,} trained weights, loss {short(reference.loss)}"
    )
    return CheckReport(estimator, subject, tuple(lines))


def _lines(
    estimator: Estimator, objective: Objective, reference: Reference, draws: int, on_progress: Callable[[str], None]
) -> list[Line]:
    if not math.isfinite(reference.loss):
        return [Line("the loss is finite", short(reference.loss), "failed", {"loss": reference.loss})]
    refusal = estimator.objection(objective, reference.batch)
    if refusal is None:
        lines = _looked_at(estimator, objective, reference, draws, on_progress)
    else:
        lines = [Line(SERVES, refusal, "failed")]
    on_progress("forward-mode differentiation")
    return lines + _model_lines(estimator, reference)


def _evaluated(reference: Reference) -> None:
    with loss_errors(reference.objective):
        _ = reference.loss


def _looked_at(
    estimator: Estimator, objective: Objective, reference: Reference, draws: int, on_progress: Callable[[str], None]
) -> list[Line]:
    on_progress("what an estimate leaves behind")
    left = _undisturbed(
        estimator, objective, reference
    )  # first: a second walk there and back may find nothing to round
    on_progress("the direction")
    slopes = within(estimator, Slope)
    lines: list[Line] = []
    if reference.refusal is not None:
        lines.append(Line("backpropagation", f"nothing to compare with: {reference.refusal}", "note"))
    elif not slopes and within(estimator, Reverse):
        lines.append(gradient_line(estimator, objective, reference))
    for slope in slopes:
        lines += slope_lines(slope, reference)
    lines += left
    lines.append(_same_key(estimator, objective, reference))
    if reference.refusal is None:
        drawn = []
        for number in range(draws):
            on_progress(f"estimate {number + 1} of {draws}")
            drawn.append(draw(estimator, objective, reference, number))
        lines += quality_lines(estimator, objective.dimension, drawn)
    return lines


def _undisturbed(estimator: Estimator, objective: Objective, reference: Reference) -> list[Line]:
    def work() -> object:
        return estimator.estimate(objective, reference.batch, reference.key)

    left = {
        "nothing disturbed after an estimate": disturbed_by(objective, work),
        "nothing disturbed after the model raises": disturbed_by_raising(objective, work),
    }
    return [
        Line(what, f"changed: {', '.join(names[:5])}" if names else "bitwise", "failed" if names else "ok")
        for what, names in left.items()
    ]


def _same_key(estimator: Estimator, objective: Objective, reference: Reference) -> Line:
    """Two estimates under one key, compared leaf by leaf."""
    one, other = (estimator.estimate(objective, reference.batch, reference.key).gradient for _ in range(2))
    gap = scale = 0.0
    for (_, a), (_, b) in zip(one.leaves(), other.leaves(), strict=True):
        gap += float((a.double() - b.double()).square().sum())
        scale += float(a.double().square().sum())
    apart = math.sqrt(gap / scale) if scale else math.sqrt(gap)
    what = "the same key gives the same estimate"
    if apart == 0:
        return Line(what, "bitwise", "ok", {"apart": apart})
    if apart <= reference.rounding:
        return Line(what, f"{short(apart)} relative apart: nondeterministic kernels", "note", {"apart": apart})
    return Line(what, f"{short(apart)} relative apart: something draws outside the key", "failed", {"apart": apart})


def _model_lines(estimator: Estimator, reference: Reference) -> list[Line]:
    """What the model allows, whatever the estimator; a failure where this one needs it."""
    slopes = within(estimator, Slope)
    lines = []
    if reference.refusal is None:
        what, mismatch = "backprop agrees with a difference of losses", reference.mismatch
        if mismatch <= max(CLOSE, 4 * reference.rounding):
            lines.append(Line(what, f"{short(mismatch)} relative", "ok", {"error": mismatch}))
        else:
            zero = f" ({', '.join(reference.unmoved[:3])}: gradient exactly 0)" if reference.unmoved else ""
            why = ".data, .detach(), .item(), a straight-through estimator or a jump cuts the path"
            found = f"{short(mismatch)} relative: {why}{zero}"
            lines.append(Line(what, found, "failed", {"error": mismatch}))
    what = "forward-mode differentiation"
    if not reference.blocked:
        lines.append(Line(what, "every module", "ok", {"blocked": 0.0}))
    for here in reference.blocked:
        where = "the loss" if here.module is None else here.module or type(reference.objective.model).__name__
        found = f"not {where}, at `{here.line}`: {here.reason}"
        lines.append(
            Line(
                what, found, "failed" if uses_tangents(slopes) else "note", {"blocked": float(len(reference.blocked))}
            )
        )
    if uses_tangents(slopes) and reference.attention:
        found = "on the math kernel during the slope: the fused ones have no forward rule"
        lines.append(Line("attention", found, "note"))
    return lines
