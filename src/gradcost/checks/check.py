"""An estimator looked at on one model and one batch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

from gradcost.checks.agreement import gradient_line, slope_lines, uses_tangents
from gradcost.checks.model_state import disturbed_by, disturbed_by_raising
from gradcost.checks.quality import draw, quality_lines
from gradcost.checks.reference import CLOSE, Ground
from gradcost.checks.report import Diagnosis, Line, short
from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.reverse import Reverse
from gradcost.estimators.structure import micro_batches, within
from gradcost.slopes.slope import Slope

DRAWS = 16
SERVES = "can serve here"


def _silent(what: str) -> None:
    pass


def diagnose(
    estimator: Estimator,
    objective: Objective,
    batch: Any,
    key: Key = Key(0),  # noqa: B008 (a key is an immutable value)
    draws: int = DRAWS,
    told: Callable[[str], None] = _silent,
    ground: Ground | None = None,
) -> Diagnosis:
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
        raise ValueError(f"draws is how many estimates are looked at: 1 or more, not {draws!r}.")
    if ground is None:
        ground = Ground(objective.in_parts(micro_batches(estimator)), batch, key)
    told("the loss")
    _evaluated(ground)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)  # what a method would say of its slopes is a line here
        lines = _lines(estimator, objective, ground, draws, told)
    subject = f"{type(objective.model).__name__}, {objective.dimension:,} trained weights, loss {short(ground.loss)}"
    return Diagnosis(estimator, subject, tuple(lines))


def _lines(
    estimator: Estimator, objective: Objective, ground: Ground, draws: int, told: Callable[[str], None]
) -> list[Line]:
    if not math.isfinite(ground.loss):
        return [Line("the loss is finite", short(ground.loss), "failed", {"loss": ground.loss})]
    refusal = estimator.objection(objective, ground.batch)
    if refusal is None:
        lines = _looked_at(estimator, objective, ground, draws, told)
    else:
        lines = [Line(SERVES, refusal, "failed")]
    told("forward-mode differentiation")
    return lines + _model_lines(estimator, ground)


def _evaluated(ground: Ground) -> None:
    try:
        _ = ground.loss
    except ValueError:
        raise
    except Exception as error:
        told = str(error).strip().splitlines()
        raise ValueError(
            f"the loss of {type(ground.objective.model).__name__} cannot be evaluated on this batch: "
            f"{type(error).__name__}: {told[0] if told else 'no message'}"
        ) from error


def _looked_at(
    estimator: Estimator, objective: Objective, ground: Ground, draws: int, told: Callable[[str], None]
) -> list[Line]:
    told("what an estimate leaves behind")
    left = _undisturbed(estimator, objective, ground)  # first: a second walk there and back may find nothing to round
    told("the direction")
    slopes = within(estimator, Slope)
    lines: list[Line] = []
    if ground.refusal is not None:
        lines.append(Line("backpropagation", f"nothing to compare with: {ground.refusal}", "note"))
    elif not slopes and within(estimator, Reverse):
        lines.append(gradient_line(estimator, objective, ground))
    for slope in slopes:
        lines += slope_lines(slope, ground)
    lines += left
    lines.append(_same_key(estimator, objective, ground))
    if ground.refusal is None:
        drawn = []
        for number in range(draws):
            told(f"estimate {number + 1} of {draws}")
            drawn.append(draw(estimator, objective, ground, number))
        lines += quality_lines(estimator, objective.dimension, drawn)
    return lines


def _undisturbed(estimator: Estimator, objective: Objective, ground: Ground) -> list[Line]:
    def work() -> object:
        return estimator.estimate(objective, ground.batch, ground.key)

    left = {
        "nothing disturbed after an estimate": disturbed_by(objective, work),
        "nothing disturbed after the model raises": disturbed_by_raising(objective, work),
    }
    return [
        Line(what, f"changed: {', '.join(names[:5])}" if names else "bitwise", "failed" if names else "ok")
        for what, names in left.items()
    ]


def _same_key(estimator: Estimator, objective: Objective, ground: Ground) -> Line:
    """Two estimates under one key, compared leaf by leaf."""
    one, other = (estimator.estimate(objective, ground.batch, ground.key).gradient for _ in range(2))
    gap = scale = 0.0
    for (_, a), (_, b) in zip(one.leaves(), other.leaves(), strict=True):
        gap += float((a.double() - b.double()).square().sum())
        scale += float(a.double().square().sum())
    apart = math.sqrt(gap / scale) if scale else math.sqrt(gap)
    what = "the same key gives the same estimate"
    if apart == 0:
        return Line(what, "bitwise", "ok", {"apart": apart})
    if apart <= ground.rounding:
        return Line(what, f"{short(apart)} relative apart: nondeterministic kernels", "note", {"apart": apart})
    return Line(what, f"{short(apart)} relative apart: something draws outside the key", "failed", {"apart": apart})


def _model_lines(estimator: Estimator, ground: Ground) -> list[Line]:
    """What the model allows, whatever the estimator; a failure where this one needs it."""
    slopes = within(estimator, Slope)
    lines = []
    if ground.refusal is None:
        what, mismatch = "backprop agrees with a difference of losses", ground.mismatch
        if mismatch <= max(CLOSE, 4 * ground.rounding):
            lines.append(Line(what, f"{short(mismatch)} relative", "ok", {"error": mismatch}))
        else:
            zero = f" ({', '.join(ground.unmoved[:3])}: gradient exactly 0)" if ground.unmoved else ""
            why = ".data, .detach(), .item(), a straight-through estimator or a jump cuts the path"
            found = f"{short(mismatch)} relative: {why}{zero}"
            lines.append(Line(what, found, "failed", {"error": mismatch}))
    what = "forward-mode differentiation"
    if not ground.blocked:
        lines.append(Line(what, "every module", "ok", {"blocked": 0.0}))
    for here in ground.blocked:
        where = "the loss" if here.module is None else here.module or type(ground.objective.model).__name__
        found = f"not {where}, at `{here.line}`: {here.reason}"
        lines.append(
            Line(what, found, "failed" if uses_tangents(slopes) else "note", {"blocked": float(len(ground.blocked))})
        )
    if uses_tangents(slopes) and ground.attention:
        found = "on the math kernel during the slope: the fused ones have no forward rule"
        lines.append(Line("attention", found, "note"))
    return lines
