"""The estimators that a plan considers by default, and one-line names for estimators."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from itertools import combinations
from typing import Any, cast

from gradcost.checkpointing.policies import Offloaded, Schedule, Segments, Selective
from gradcost.core.blocks import find_blocks
from gradcost.core.errors import GradcostError
from gradcost.core.objective import Objective
from gradcost.core.units import size
from gradcost.estimators import presets
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import backprop, checkpointed, forward_gradient, mezo, spsa
from gradcost.estimators.reverse import Reverse
from gradcost.estimators.structure import micro_batches
from gradcost.planning.within import Within

PROBES = (1, 4, 16)
PARTS = (2, 4, 8)
_PRESETS: tuple[Callable[..., Estimator], ...] = tuple(
    thing for thing in vars(presets).values() if inspect.isfunction(thing) and thing.__module__ == presets.__name__
)


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


def splits_mixed(estimator: Estimator, mixing: str | None) -> bool:
    """Return whether the estimator splits a batch whose examples a layer mixes, so that its gradient differs.

    Args:
        estimator: the estimator.
        mixing: the layer, as in `mixing_layer`; None if there is none.
    """
    return mixing is not None and micro_batches(estimator) > 1


def _powers_of_two(largest: int) -> Iterator[int]:
    power = 1
    while power <= largest:
        yield power
        power *= 2


def label(estimator: Estimator) -> str:
    """Return the shortest expression that parses back to an equal estimator, such as `Clipped(mezo(), 1.0)`."""
    return terse(estimator)


def terse(value: Any) -> str:
    """Return the shortest expression: a preset, or the repr without default fields. Parses back to an equal value."""
    if isinstance(value, Estimator) and (preset := _as_preset(value)) is not None:
        return preset
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


def _as_preset(estimator: Estimator) -> str | None:
    """Return the call of a preset that returns an equal estimator, with the fewest arguments; None if none does."""
    values = dict(_values(estimator))
    for preset in _PRESETS:
        parameters = inspect.signature(preset).parameters.values()
        required = {p.name for p in parameters if p.default is p.empty}
        names = [p.name for p in parameters if p.name in values]
        for count in range(len(names) + 1):
            for given in combinations(names, count):
                arguments = {name: values[name] for name in given}
                with suppress(GradcostError, TypeError):  # a field of this name may mean something else
                    if required <= set(given) and preset(**arguments) == estimator:
                        return f"{preset.__name__}({', '.join(f'{name}={x!r}' for name, x in arguments.items())})"
    return None


def _values(part: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and value of each field of an estimator and of its parts, the outermost last."""
    for field in fields(part):
        inner = getattr(part, field.name)
        if is_dataclass(inner):
            yield from _values(inner)
    for field in fields(part):
        yield field.name, getattr(part, field.name)


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
