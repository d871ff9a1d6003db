"""The ways of getting a gradient that a plan looks at, and how each is written in a line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields, replace
from typing import Any, cast

from gradcost.checkpointing.policies import Offloaded, Schedule, Segments, Selective
from gradcost.core.blocks import find_blocks
from gradcost.core.objective import Objective
from gradcost.core.units import size
from gradcost.directions import Gaussian
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import backprop, checkpointed, forward_gradient, mezo, spsa
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.planning.within import Within
from gradcost.slopes.slope import Jvp

PROBES = (1, 4, 16)
PARTS = (2, 4, 8)


def options(objective: Objective, examples: int, budget: int, device: str) -> Iterator[Estimator]:
    """Exact gradients from the one that saves most, then what avoids backpropagation.

    Within is to be told what lies beside. As many segments as there are blocks is checkpointed(), not said twice.
    """
    blocks = len(find_blocks(objective.model))
    yield backprop()
    if device != "cpu":
        yield Reverse(Offloaded())
    if blocks:
        yield Reverse(Selective())
        yield checkpointed()
        yield from (Reverse(Segments(count)) for count in _twos(blocks - 1))
        yield Reverse(Within(budget))
    cheaper = checkpointed() if blocks else backprop()
    yield from (Accumulated(cheaper, parts) for parts in PARTS if parts <= examples)
    yield from (forward_gradient(probes) for probes in PROBES)
    yield from (Probing(Jvp(together=probes), Gaussian(), probes) for probes in PROBES[1:])
    yield from (mezo(probes=probes) for probes in PROBES)
    yield from (spsa(probes=probes) for probes in PROBES)


def _twos(most: int) -> Iterator[int]:
    power = 1
    while power <= most:
        yield power
        power *= 2


def label(estimator: Estimator) -> str:
    """The shortest expression that the command line reads back as the same estimator."""
    if isinstance(estimator, Probing):
        for made, name in ((forward_gradient, "forward_gradient"), (mezo, "mezo"), (spsa, "spsa")):
            if replace(estimator, probes=1) == made():
                return f"{name}({'' if estimator.probes == 1 else f'probes={estimator.probes}'})"
    for made in (backprop, checkpointed):
        if estimator == made():
            return f"{made.__name__}()"
    return terse(estimator)


def terse(made: Any) -> str:
    """A value without what goes without saying: it reads back as the same."""
    if isinstance(made, Estimator) and made in (backprop(), checkpointed()):
        return label(made)
    if not hasattr(made, "__dataclass_fields__"):
        return repr(made)
    said, named = [], False
    for field in fields(cast(Any, made)):
        held = getattr(made, field.name)
        if field.default is not MISSING and held == field.default:
            named = True
            continue
        said.append(f"{field.name}={terse(held)}" if named else terse(held))
    return f"{type(made).__name__}({', '.join(said)})"


def described(estimator: Estimator) -> str:
    """The label in words, where the expression is too long to be read."""
    match estimator:
        case Reverse(Schedule()):
            return "nested checkpointing"
        case Reverse(Within(bytes=budget)):
            return f"Within({size(budget).replace(' ', '')})"
        case Accumulated(inner, parts) if described(inner) != label(inner):
            return f"{described(inner)}, {parts} micro-batches"
    return label(estimator)
