"""Compute the cost of backpropagation under any checkpointing schedule from simulations of short schedules.

A step is a sequence of visits of blocks (`planning.visits`). Visits with equal labels have equal segments: equal
allocations and equal operators. Each label is learned from a simulation of a short schedule on a copy of the model
with few blocks. A long schedule is then a sum of known segments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gradcost.checkpointing.policies import Blocks, Everything, Saving, Schedule, Segments
from gradcost.checkpointing.schedules import Items, schedule_length, uniform
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.reverse import Reverse
from gradcost.instruments.flops import Counts, Operation
from gradcost.instruments.memory import Memory
from gradcost.planning.forecast import Forecast, Simulation
from gradcost.planning.repeated_blocks import Repeated
from gradcost.planning.segments import Bytes, Cut, Irregular, Peak, Places, Segment
from gradcost.planning.visits import Label, labels, shortened, visits

_FEWEST = 3, 4  # numbers of blocks: the bytes before the steps of two copies give those of any number of blocks

Simulate = Callable[[Items], tuple[Simulation, Repeated]]  # of a schedule


def schedule_of(estimator: Estimator, blocks: int) -> tuple[Items, int] | None:
    """Return the schedule of an estimator on these blocks, and its micro-batches; None for another estimator."""
    if isinstance(estimator, Accumulated):
        inner = schedule_of(estimator.estimator, blocks)
        return None if inner is None else (inner[0], inner[1] * estimator.parts)
    items = _items(estimator.saving, blocks) if isinstance(estimator, Reverse) else None
    return None if items is None or schedule_length(items) != blocks else (items, 1)


def _items(saving: Saving, blocks: int) -> Items | None:
    match saving:
        case Everything():
            return (blocks,)
        case Blocks():
            return ((1,),) * blocks
        case Segments(count=count) if count <= blocks:
            return uniform(blocks, count)
        case Schedule(items=items):
            return items
    return None


@dataclass
class Learned:
    """The segments and operators of visits, by label, and the bytes before the step, by number of blocks.

    starts: as in `visits.visits`. True once a simulation had the visits of its schedule only with it.
    failed: whether a simulation did not have the visits, or not the equal segments, that its schedule predicts.
    """

    segments: dict[Label, Segment] = field(default_factory=dict)
    work: dict[Label, Counts] = field(default_factory=dict)
    bases: dict[int, tuple[Bytes, int, int]] = field(default_factory=dict)  # blocks -> bytes, kept, message
    starts: bool = False
    failed: bool = False


@dataclass
class Growth:
    """Per block: the bytes before a step by purpose, those of the kept states, and those of the message.

    They depend on the model and the optimizer, not on the batch or the schedule. None until they are known.
    """

    per_block: tuple[int, ...] | None = None


@dataclass(frozen=True)
class BySchedule:
    """Computes steps with one number of micro-batches, one batch and one optimizer.

    Args:
        simulate: simulates a schedule on a copy of the model with as many blocks as it has.
        parts: the number of micro-batches of the step.
        growth: what is the same for other batches; it is learned here if it is unknown.
    """

    simulate: Simulate
    parts: int
    growth: Growth
    learned: Learned = field(default_factory=Learned)

    def forecast(
        self, estimator: Estimator, items: Items, part: Repeated, forward: int, device: str, more: int = 0
    ) -> Forecast:
        """Return the forecast of a step.

        Args:
            estimator: the estimator of the forecast.
            items: its schedule.
            part: the blocks of the whole model.
            forward: FLOPs of one forward pass of the whole model.
            device: the type of device.
            more: the number of further micro-batches, which cost as much as those between the first and the last.
                They need no more memory.
        Raises:
            Irregular: the step does not follow from short schedules.
        """
        if self.learned.failed:
            raise Irregular
        try:
            memory, counts, (kept, message) = self._composed(items, part, more)
        except Irregular:
            self.learned.failed = True
            raise
        return Forecast(estimator, device, memory, counts, forward, kept, message)

    def _composed(self, items: Items, part: Repeated, more: int) -> tuple[Memory, Counts, tuple[int, int]]:
        while missing := set(self._labels(items)) - self.learned.segments.keys():
            self._learn(shortened(items, self.parts, missing, self.learned.starts))
        for count in _FEWEST:
            if self.growth.per_block is None and len(self.learned.bases) < 2 and count not in self.learned.bases:
                self._learn((count,))
        count = schedule_length(items)
        base, kept, message = self._base(count)
        peak, work = Peak(base, (part,)), self.learned.work
        start = self._labels(items)[0]
        peak.visit(self.learned.segments[start])
        total = [(Counter({0: 1}), work[start])]
        blocks: dict[Label, Counter[int]] = {}
        for visit in visits(items, self.parts, self.learned.starts):
            peak.visit(self.learned.segments[visit.label], (0, visit.block))
        for visit in visits(items, self.parts + more, self.learned.starts):
            blocks.setdefault(visit.label, Counter())[visit.block] += 1
        total += [(times, work[label]) for label, times in blocks.items()]
        return peak.memory(), _sum(total, part), (kept, message)

    def _base(self, count: int) -> tuple[Bytes, int, int]:
        """Return the bytes before the step, those of the kept states, and those of the message."""
        values = {blocks: (*base, kept, message) for blocks, (base, kept, message) in self.learned.bases.items()}
        low, high = min(values), max(values)
        if self.growth.per_block is None:
            pairs = zip(values[low], values[high], strict=True)
            self.growth.per_block = tuple((y - x) // (high - low) for x, y in pairs)
        growth = self.growth.per_block

        def at(blocks: int) -> tuple[int, ...]:
            return tuple(x + (blocks - low) * more for x, more in zip(values[low], growth, strict=True))

        if any(at(blocks) != known for blocks, known in values.items()):
            raise Irregular
        *base, kept, message = at(count)
        return tuple(base), kept, message

    def _learn(self, items: Items) -> None:
        """Simulate a schedule, and store the segments of its visits."""
        simulation, part = self.simulate(items)
        cut, work = Cut(simulation, (part,)), _work(simulation.operations, part)
        self.learned.starts |= not self._has_visits(items, cut, work)
        if not self._has_visits(items, cut, work):
            raise Irregular
        found = simulation.forecast
        self.learned.bases[schedule_length(items)] = cut.base, found.kept, found.message
        for label, segment, (_, counts) in zip(self._labels(items), cut.segments, work, strict=True):
            if self.learned.segments.setdefault(label, segment) != segment:
                raise Irregular
            if self.learned.work.setdefault(label, counts) != counts:
                raise Irregular

    def _has_visits(self, items: Items, cut: Cut, work: Sequence[tuple[int | None, Counts]]) -> bool:
        """Return whether a simulation visited the blocks as its schedule predicts."""
        blocks = [visit.block for visit in visits(items, self.parts, self.learned.starts)]
        return [block for _, block in cut.visits] == blocks and [block for block, _ in work[1:]] == blocks

    def _labels(self, items: Items) -> list[Label]:
        return labels(items, self.parts, self.learned.starts)


def _work(operations: Sequence[Operation], part: Repeated) -> list[tuple[int | None, Counts]]:
    """Return the counts before the first visit, and those of each visit with its block.

    The names of modules in a block are relative to the block, after "/".
    """
    places, current = Places((part,)), None
    result: list[tuple[int | None, Counts]] = [(None, Counts())]
    for operation in operations:
        place, name = places.of(operation.module)
        if place is not None and place != current:
            result.append((place[1], Counts()))
        current = place
        result[-1][1].add(operation if place is None else operation._replace(module=f"/{name}"))
    return result


def _sum(terms: Sequence[tuple[Counter[int], Counts]], part: Repeated) -> Counts:
    """Return the sum of counts. Each term is how often each block has these counts, and the counts."""
    result = Counts()
    for times, counts in terms:
        number = times.total()
        result.flops += number * counts.flops
        result.matmuls += number * counts.matmuls
        result.elementwise += number * counts.elementwise
        result.moved += number * counts.moved
        for name, value in counts.uncounted.items():
            result.uncounted[name] += number * value
        for pair, value in counts.work.items():
            result.work[pair] += number * value
        for target, source in (
            (result.flops_by_module, counts.flops_by_module),
            (result.matmuls_by_module, counts.matmuls_by_module),
        ):
            for name, value in source.items():
                for block, often in times.items():
                    target[part.module(block, name[1:]) if name.startswith("/") else name] += often * value
    return result
