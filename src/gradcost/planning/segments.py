"""Cut the allocations of a step into segments: one per visit of a block, with the work after it outside of blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeAlias

from gradcost.instruments.memory import PURPOSES, Memory
from gradcost.planning.forecast import Evaluation, Simulation
from gradcost.planning.repeated_blocks import Repeated

Bytes: TypeAlias = tuple[int, ...]  # bytes by purpose, in the order of PURPOSES
Place: TypeAlias = tuple[int, int]  # (index of the repeated part, block)


class Irregular(Exception):
    """A step has another structure than equal blocks that run one after the other: simulate the whole model."""


@dataclass(frozen=True)
class Segment:
    """The allocations of one visit of a block.

    Args:
        change: bytes at the end less bytes at the start.
        rise: bytes at the highest total less bytes at the start.
        operator: the operator that reaches this total.
        module: its module; in a block, the name relative to the block.
        in_block: whether the module is in the block.
        inside: the highest total with the bound of a workspace, less the total at the start; 0 without workspaces.
        kernel: the operator with this workspace.
    """

    change: Bytes
    rise: Bytes
    operator: str
    module: str
    in_block: bool
    inside: int = 0
    kernel: str = ""


def affine(values: Mapping[int, Bytes], count: int) -> Bytes:
    """Extrapolate bytes, given for two or more numbers of blocks, to `count` blocks.

    Raises:
        Irregular: they are not affine in the number of blocks.
    """
    (low, x), (high, y), *_ = sorted(values.items())
    growth = [divmod(b - a, high - low) for a, b in zip(x, y, strict=True)]

    def at(blocks: int) -> Bytes:
        return tuple(a + (blocks - low) * more for a, (more, _) in zip(x, growth, strict=True))

    if any(rest for _, rest in growth) or any(at(blocks) != known for blocks, known in values.items()):
        raise Irregular
    return at(count)


def affine_segment(segments: Mapping[int, Segment], count: int) -> Segment:
    """Extrapolate a segment. Raises: as `affine`, also if its peak is at another operator or module."""
    if len({(one.operator, one.module, one.in_block, one.kernel) for one in segments.values()}) > 1:
        raise Irregular
    change = affine({blocks: one.change for blocks, one in segments.items()}, count)
    rise = affine({blocks: one.rise for blocks, one in segments.items()}, count)
    (inside,) = affine({blocks: (one.inside,) for blocks, one in segments.items()}, count)
    return replace(next(iter(segments.values())), change=change, rise=rise, inside=inside)


class Cut:
    """The segments of a simulated step.

    Args:
        simulation: the step, or the forward pass.
        parts: the repeated parts of its model.

    base: the bytes before the step.
    visits: the place of each visited block, in order.
    segments: the segment before the first visit, then one per visit.
    """

    def __init__(self, simulation: Simulation | Evaluation, parts: Sequence[Repeated]) -> None:
        events, places = simulation.events, Places(parts)
        bounds = [simulation.start]
        self.visits: list[Place] = []
        current: Place | None = None
        for index in range(simulation.start, len(events)):
            if events[index].operator:
                here = places.of(events[index].module)[0]
                if here is not None and here != current:
                    bounds.append(index)
                    self.visits.append(here)
                current = here
        self.segments = list(_segments(simulation, [*bounds, len(events)], places))
        base = Total()
        for event in events[: simulation.start]:
            base.add(event.purpose, event.size)
        self.base = base.bytes()


def _segments(simulation: Simulation | Evaluation, bounds: Sequence[int], places: Places) -> Iterator[Segment]:
    events, workspaces = simulation.events, iter(simulation.workspaces)
    workspace = next(workspaces, None)
    for start, end in pairwise(bounds):
        total, best, rise = Total(), None, Total().bytes()
        inside: tuple[int, str] | None = None
        for index in range(start, end + 1):
            while workspace is not None and workspace.moment <= index and (index < end or end == len(events)):
                # Its memory is in use after the events before `moment`.
                level = total.sum + workspace.bound, workspace.operator
                inside = level if inside is None else max(inside, level)
                workspace = next(workspaces, None)
            if index == end:
                break
            event = events[index]
            total.add(event.purpose, event.size)
            if event.operator and (best is None or total.sum > sum(rise)):
                best, rise = event, total.bytes()
        unit, module = (None, "") if best is None else places.of(best.module)
        operator = "" if best is None else best.operator
        yield Segment(total.bytes(), rise, operator, module, unit is not None, *(inside or (0, "")))


class Total:
    """Bytes by purpose."""

    def __init__(self) -> None:
        self.by_purpose = dict.fromkeys(PURPOSES, 0)
        self.sum = 0

    def add(self, purpose: Any, size: int) -> None:
        self.by_purpose[purpose] += size
        self.sum += size

    def bytes(self) -> Bytes:
        return tuple(self.by_purpose.values())


class Places:
    """The block of each module, with a cache: ((part, block), name relative to the block), or (None, name)."""

    def __init__(self, parts: Sequence[Repeated]) -> None:
        self._parts, self._known = parts, dict[str, tuple[tuple[int, int] | None, str]]()

    def of(self, module: str) -> tuple[tuple[int, int] | None, str]:
        if module not in self._known:
            self._known[module] = None, module
            for number, part in enumerate(self._parts):
                if (unit := part.unit(module)) is not None:
                    self._known[module] = (number, unit[0]), unit[1]
        return self._known[module]


class Peak:
    """Finds the peak of a step from its segments.

    Args:
        base: the bytes before the step.
        parts: the repeated parts of the model.
    """

    def __init__(self, base: Bytes, parts: Sequence[Repeated]) -> None:
        self._total = self._peak = base
        self._parts = parts
        self._operator = self._module = ""
        self._inside = (0, "")

    def visit(self, segment: Segment, place: Place = (0, 0)) -> None:
        """Add the segment of a visit of a block."""
        total = sum(self._total)
        if total + sum(segment.rise) > sum(self._peak):
            self._peak = tuple(map(sum, zip(self._total, segment.rise, strict=True)))
            self._operator, self._module = segment.operator, segment.module
            if segment.in_block:
                self._module = self._parts[place[0]].module(place[1], segment.module)
        self._inside = max(self._inside, (total + segment.inside if segment.kernel else 0, segment.kernel))
        self._total = tuple(map(sum, zip(self._total, segment.change, strict=True)))

    def memory(self) -> Memory:
        """Return the peak, without a timeline."""
        peak, more = self._peak, self._inside[0] - sum(self._peak)
        within = (more, self._inside[1]) if more > 0 else (0, "")
        return Memory(sum(peak), dict(zip(PURPOSES, peak, strict=True)), self._operator, self._module, (), *within)
