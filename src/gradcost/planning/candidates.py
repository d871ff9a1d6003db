"""The estimators that a plan considers by default, and one-line names for estimators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from typing import Any, cast

from gradcost.checkpointing.policies import Offloaded, Schedule, Segments, Selective
from gradcost.core.blocks import find_blocks
from gradcost.core.objective import Objective
from gradcost.core.units import size
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import backprop, checkpointed, forward_gradient, mezo, spsa
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.planning.within import Within
from gradcost.slopes.slope import Jvp

PROBES = (1, 4, 16)
PARTS = (2, 4, 8)


def options(
    objective: Objective, examples: int, budget: int, device: str, probes: Sequence[int] = PROBES
) -> Iterator[Estimator]:
    """Yield the estimators of a default plan: exact gradients, roughly by falling memory, then the others.

    `Within(budget)` has beside=0, which `plan` replaces by the computed value. For a model of n blocks, Segments(n)
    equals checkpointed() and is skipped.
    """
    blocks = len(find_blocks(objective.model))
    yield backprop()
    if device != "cpu":
        yield Reverse(Offloaded())
    if blocks:
        yield Reverse(Selective())
        yield checkpointed()
        yield from (Reverse(Segments(count)) for count in _powers_of_two(blocks - 1))
        yield Reverse(Within(budget))
    inner_estimator = checkpointed() if blocks else backprop()
    yield from (Accumulated(inner_estimator, parts) for parts in PARTS if parts <= examples)
    yield from map(forward_gradient, probes)
    yield from (forward_gradient(count, together=1) for count in probes if count > 1)
    yield from (mezo(probes=count) for count in probes)
    yield from (spsa(probes=count) for count in probes)


def _powers_of_two(largest: int) -> Iterator[int]:
    power = 1
    while power <= largest:
        yield power
        power *= 2


def label(estimator: Estimator) -> str:
    """Return the shortest expression that parses back to an equal estimator."""
    if isinstance(estimator, Probing):
        for preset, name in ((forward_gradient, "forward_gradient"), (mezo, "mezo"), (spsa, "spsa")):
            if estimator == preset(probes=estimator.probes):
                return f"{name}({'' if estimator.probes == 1 else f'probes={estimator.probes}'})"
        if isinstance(estimator.slope, Jvp):
            probes, together = estimator.probes, estimator.slope.together
            if estimator == forward_gradient(probes, together):
                return f"forward_gradient(probes={probes}, together={together})"
    for preset in (backprop, checkpointed):
        if estimator == preset():
            return f"{preset.__name__}()"
    return terse(estimator)


def terse(value: Any) -> str:
    """Return the shortest repr: default fields are omitted. Parses back to an equal value."""
    if isinstance(value, Estimator) and value in (backprop(), checkpointed()):
        return label(value)
    if not hasattr(value, "__dataclass_fields__"):
        return repr(value)
    arguments, needs_keyword = [], False  # a keyword is needed after an omitted field
    for field in fields(cast(Any, value)):
        argument = getattr(value, field.name)
        if field.default is not MISSING and argument == field.default:
            needs_keyword = True
            continue
        arguments.append(f"{field.name}={terse(argument)}" if needs_keyword else terse(argument))
    return f"{type(value).__name__}({', '.join(arguments)})"


def described(estimator: Estimator) -> str:
    """Return a short name: the label, or words for nested schedules and `Within`, whose labels are long."""
    match estimator:
        case Reverse(Schedule()):
            return "nested checkpointing"
        case Reverse(Within(bytes=budget)):
            return f"Within({size(budget).replace(' ', '')})"
        case Accumulated(inner, parts) if described(inner) != label(inner):
            return f"{described(inner)}, {parts} micro-batches"
    return label(estimator)
