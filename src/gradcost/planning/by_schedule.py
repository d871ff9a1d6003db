"""Compute the cost of backpropagation under any checkpointing schedule from simulations of short schedules.

A step is a sequence of visits of blocks (`planning.visits`). Visits with equal labels have equal segments: equal
allocations and equal operators. Each label is learned from simulations of short schedules on copies of the model with
few blocks. A long schedule is then a sum of known segments. Some depend on the number of blocks, such as the one in
which autocast frees its casts of all weights: they must be affine in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gradcost.checkpointing.policies import Blocks, Everything, Saving, Schedule, Segments
from gradcost.checkpointing.schedules import Items, schedule_length, uniform
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.reverse import Reverse
from gradcost.instruments.flops import Counts, Operation
from gradcost.instruments.memory import Memory
from gradcost.planning.forecast import Forecast, Simulation
from gradcost.planning.repeated_blocks import Repeated
from gradcost.planning.segments import Bytes, Cut, Irregular, Peak, Places, Segment, affine, affine_segment
from gradcost.planning.visits import COPIES, Label, has_regions, labels, lengthened, shortened, visits

_FEWEST = 3, 4  # numbers of blocks: the bytes before the steps of two copies give those of any number of blocks
_MOST_LENGTHS = 3  # numbers of blocks with which a label is simulated
_V = TypeVar("_V")

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
    """The segments and operators of visits, by label and number of blocks, and the bytes before the step.

    visits: the most visits with a label in one simulation.
    steady: whether schedules with regions (True) and without had equal segments with two numbers of blocks.
    starts: as in `visits.visits`. True once a simulation had the visits of its schedule only with it.
    failed: whether a simulation did not have the visits, or not the equal segments, that its schedule predicts.
    """

    segments: dict[Label, dict[int, Segment]] = field(default_factory=dict)
    work: dict[Label, dict[int, Counts]] = field(default_factory=dict)
    visits: Counter[Label] = field(default_factory=Counter)
    bases: dict[int, tuple[Bytes, int, int]] = field(default_factory=dict)  # blocks -> bytes, kept, message
    steady: set[bool] = field(default_factory=set)
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
    ) -> Forecast | None:
        """Return the forecast of a step; None if there are no short schedules from which it follows.

        Args:
            estimator: the estimator of the forecast.
            items: its schedule.
            part: the blocks of the whole model.
            forward: FLOPs of one forward pass of the whole model.
            device: the type of device.
            more: the number of further micro-batches, which cost as much as those between the first and the last.
                They need no more memory.
        Raises:
            Irregular: no step of this model follows from short schedules.
        """
        if self.learned.failed:
            raise Irregular
        try:
            found = self._composed(items, part, more)
        except Irregular:
            self.learned.failed = True
            raise
        if found is None:
            return None
        memory, counts, (kept, message) = found
        return Forecast(estimator, device, memory, counts, forward, kept, message)

    def _composed(self, items: Items, part: Repeated, more: int) -> tuple[Memory, Counts, tuple[int, int]] | None:
        while missing := self._unknown(items):
            if not self._learn_labels(items, missing):
                return None
        for count in _FEWEST:
            if self.growth.per_block is None and len(self.learned.bases) < 2 and count not in self.learned.bases:
                self._learn((count,))
        count = schedule_length(items)
        base, kept, message = self._base(count)
        peak, start = Peak(base, (part,)), self._labels(items)[0]
        segments = {label: _at(self.learned.segments[label], count, affine_segment) for label in self._labels(items)}
        peak.visit(segments[start])
        blocks: dict[Label, Counter[int]] = {start: Counter({0: 1})}
        for visit in visits(items, self.parts, self.learned.starts):
            peak.visit(segments[visit.label], (0, visit.block))
        for visit in visits(items, self.parts + more, self.learned.starts):
            blocks.setdefault(visit.label, Counter())[visit.block] += 1
        total = [(times, _at(self.learned.work[label], count, _affine_counts)) for label, times in blocks.items()]
        return peak.memory(), _sum(total, part), (kept, message)

    def _unknown(self, items: Items) -> set[Label]:
        """Return the labels of a schedule whose segments do not follow from what is learned.

        A label is learned from two visits in one simulation, if the schedule has as many. Segments depend on the
        number of blocks in no schedule with regions, or in none without, if they do not in the first one: it is
        simulated with two numbers of blocks. If they depend on it, every schedule is simulated with three.
        """
        needed, count = Counter(self._labels(items)), schedule_length(items)
        least = 1 if has_regions(items) in self.learned.steady else 2
        return {
            label
            for label, times in needed.items()
            if self.learned.visits[label] < min(times, COPIES)
            or not _is_enough(self.learned.segments[label], count, least)
            or not _is_enough(self.learned.work[label], count, least)
        }

    def _learn_labels(self, items: Items, wanted: set[Label]) -> bool:
        """Simulate short schedules with labels of `items`. Return whether more of the schedule is known then."""
        starts, lengths = self.learned.starts, set[int]()
        short: Items | None = shortened(items, self.parts, wanted, starts)
        while short is not None and self.learned.starts == starts and self._unknown(items) & wanted:
            if len(lengths) == _MOST_LENGTHS:
                break
            self._learn(short)
            lengths.add(schedule_length(short))
            short = lengthened(short, items, self.parts, wanted, starts)
        if self.learned.starts != starts:
            return True
        learned = self.learned.segments, self.learned.work
        if len(lengths) > 1 and all(_is_constant(known[label]) for known in learned for label in wanted):
            self.learned.steady.add(has_regions(items))
        return not self._unknown(items) & wanted

    def _base(self, count: int) -> tuple[Bytes, int, int]:
        """Return the bytes before the step, those of the kept states, and those of the message."""
        values: dict[int, Bytes]
        values = {blocks: (*base, kept, message) for blocks, (base, kept, message) in self.learned.bases.items()}
        if self.growth.per_block is None:
            low, high = min(values), max(values)
            pairs = zip(values[low], values[high], strict=True)
            self.growth.per_block = tuple((y - x) // (high - low) for x, y in pairs)
        blocks, known = next(iter(values.items()))
        values[blocks + 1] = tuple(map(sum, zip(known, self.growth.per_block, strict=True)))
        *base, kept, message = affine(values, count)
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
        names, count = self._labels(items), schedule_length(items)
        self.learned.visits |= Counter(names)
        for label, segment, (_, counts) in zip(names, cut.segments, work, strict=True):
            if self.learned.segments.setdefault(label, {}).setdefault(count, segment) != segment:
                raise Irregular
            if self.learned.work.setdefault(label, {}).setdefault(count, counts) != counts:
                raise Irregular

    def _has_visits(self, items: Items, cut: Cut, work: Sequence[tuple[int | None, Counts]]) -> bool:
        """Return whether a simulation visited the blocks as its schedule predicts."""
        blocks = [visit.block for visit in visits(items, self.parts, self.learned.starts)]
        return [block for _, block in cut.visits] == blocks and [block for block, _ in work[1:]] == blocks

    def _labels(self, items: Items) -> list[Label]:
        return labels(items, self.parts, self.learned.starts)


def _is_enough(known: Mapping[int, Any], count: int, least: int) -> bool:
    """Return whether values for some numbers of blocks give that for `count` blocks, unless they are irregular.

    least: with how many numbers of blocks an equal value counts as constant.
    """
    return count in known or len(known) > 2 or (len(known) >= least and _is_constant(known))


def _is_constant(known: Mapping[int, Any]) -> bool:
    first, *others = known.values()
    return all(other == first for other in others)


def _at(known: Mapping[int, _V], count: int, extrapolate: Callable[[Mapping[int, _V], int], _V]) -> _V:
    """Return the value for `count` blocks."""
    if _is_constant(known):
        return next(iter(known.values()))
    return known[count] if count in known else extrapolate(known, count)


def _affine_counts(known: Mapping[int, Counts], count: int) -> Counts:
    """Extrapolate counts to `count` blocks. Raises: as `segments.affine`."""
    (low, x), (high, y), *_ = sorted(known.items())

    def at(blocks: int) -> Counts:
        more, rest = divmod(blocks - high, high - low)
        if rest:
            raise Irregular
        return y.extrapolated(x, more)

    if any(at(blocks) != counts for blocks, counts in known.items()):
        raise Irregular
    return at(count)


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
