"""Compute the forecast of a deep model from simulations with 3 and 4 (and 5) of its equal blocks.

The allocations of a step are cut into *segments*: one per visit of a block (its forward or backward pass), with the
work outside of the blocks that follows. A *sweep* is a sequence of visits of all blocks, ascending or descending. The
segments of all inner blocks of a sweep must be equal, byte for byte. Then a step with more blocks has more of these
segments. A segment that depends on the number of blocks, such as the loop of the optimizer over the parameters, must
be affine in it: this is tested with 5 blocks.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gradcost.instruments.flops import Counts
from gradcost.instruments.memory import Memory
from gradcost.planning.forecast import Evaluation, Forecast, Simulation
from gradcost.planning.repeated_blocks import Repeated
from gradcost.planning.segments import Bytes, Cut, Irregular, Peak, Places, Segment, affine, affine_segment

SMALL = 3, 4, 5  # the numbers of blocks that are simulated; 5 only if needed
_MOST_VISITS = 4  # of a block in a row


@dataclass(frozen=True)
class Sweep:
    """The segments of one sweep: some per block, such as recomputation and backward pass, in the order of the blocks.

    part: index of the repeated part.
    """

    part: int
    descending: bool
    segments: tuple[tuple[Segment, ...], ...]

    @property
    def kind(self) -> tuple[int, bool, int]:
        return self.part, self.descending, len(self.segments[0])

    @property
    def roles(self) -> tuple[tuple[Segment, ...], ...]:
        """The segments of the first, an inner and the last block."""
        return self.segments[0], self.segments[1], self.segments[-1]


@dataclass(frozen=True)
class Step:
    """The allocations of a step: the bytes before it, the segment before the first sweep, and the sweeps."""

    base: Bytes
    prefix: Segment
    sweeps: tuple[Sweep, ...]


def extrapolated(
    simulated: Callable[[int], Simulation], parts: Sequence[Sequence[Repeated]], count: int
) -> tuple[Forecast, Counts]:
    """Return the forecast of a step of a model with `count` equal blocks, and the counts of its forward pass.

    Args:
        simulated: returns the simulation of the model with 3, 4 or 5 blocks.
        parts: the repeated parts of the models with 3, 4 and 5 blocks.
        count: the number of blocks.
    Raises:
        Irregular: the figures do not follow from the simulations.
    """
    simulated = functools.cache(simulated)
    three, four = simulated(3), simulated(4)
    memory = extrapolated_memory(simulated, parts, count)
    more = count - 4
    counts = extrapolated_counts(three.forecast.counts, four.forecast.counts, parts, count)
    forward = extrapolated_counts(three.forward, four.forward, parts, count)
    before, last = three.forecast, four.forecast
    kept, message = (y + more * (y - x) for x, y in ((before.kept, last.kept), (before.message, last.message)))
    result = replace(last, memory=memory, counts=counts, forward=forward.flops, kept=kept, message=message, cuda=None)
    return result, forward


def extrapolated_memory(
    simulated: Callable[[int], Simulation | Evaluation], parts: Sequence[Sequence[Repeated]], count: int
) -> Memory:
    """Return the memory of a step, or of a forward pass, with `count` equal blocks, without a timeline.

    Arguments and errors: as `extrapolated`.
    """
    steps = [_step(simulated(blocks), of) for blocks, of in zip(SMALL[:2], parts, strict=False)]
    if _needs_check(*steps):
        steps.append(_step(simulated(5), parts[2]))
        if steps[2].sweeps and [s.kind for s in steps[2].sweeps] != [s.kind for s in steps[1].sweeps]:
            raise Irregular
    return _composed(steps, parts[0], count)


def _step(simulation: Simulation | Evaluation, parts: Sequence[Repeated]) -> Step:
    """Divide the segments of a simulation into sweeps."""
    cut, blocks = Cut(simulation, parts), parts[0].count
    visits, segments = cut.visits, cut.segments
    sweeps, at = [], 0
    while at < len(visits):
        times, order = _first_sweep(visits[at:], blocks)
        end = at + times * blocks
        of_blocks = [tuple(segments[1 + i : 1 + i + times]) for i in range(at, end, times)]
        descending = order[0] > 0
        sweeps.append(Sweep(visits[at][0], descending, tuple(of_blocks[::-1] if descending else of_blocks)))
        at = end
    if not sweeps or any(set(sweep.segments[1:-1]) != {sweep.segments[1]} for sweep in sweeps):
        raise Irregular
    return Step(cut.base, segments[0], tuple(sweeps))


def _first_sweep(visits: Sequence[tuple[int, int]], blocks: int) -> tuple[int, list[int]]:
    """Return how often each block is visited in a row in the first sweep, and the order of the blocks."""
    for times in range(1, _MOST_VISITS + 1):
        for order in ([*range(blocks)], [*reversed(range(blocks))]):
            if list(visits[: times * blocks]) == [(visits[0][0], block) for block in order for _ in range(times)]:
                return times, order
    raise Irregular


def _needs_check(three: Step, four: Step) -> bool:
    """Return whether a segment depends on the number of blocks.

    Raises:
        Irregular: the steps have different sweeps.
    """
    if [sweep.kind for sweep in three.sweeps] != [sweep.kind for sweep in four.sweeps]:
        raise Irregular
    pairs = zip(three.sweeps, four.sweeps, strict=True)
    return three.prefix != four.prefix or any(one.roles != other.roles for one, other in pairs)


def _composed(steps: Sequence[Step], parts: Sequence[Repeated], count: int) -> Memory:
    """Return the peak of a step with `count` blocks."""

    def at(versions: Iterable[Segment]) -> Segment:
        return affine_segment(dict(zip(SMALL, versions, strict=False)), count)

    peak = Peak(affine(dict(zip(SMALL, [step.base for step in steps], strict=False)), count), parts)
    peak.visit(at(step.prefix for step in steps))
    for sweeps in zip(*(step.sweeps for step in steps), strict=True):
        first, inner, last = (
            [at(versions) for versions in zip(*of_role, strict=True)]
            for of_role in zip(*(sweep.roles for sweep in sweeps), strict=True)
        )
        order = [first, *[inner] * (count - 2), last]
        for block in reversed(range(count)) if sweeps[0].descending else range(count):
            for segment in order[block]:
                peak.visit(segment, (sweeps[0].part, block))
    return peak.memory()


def extrapolated_counts(three: Counts, four: Counts, parts: Sequence[Sequence[Repeated]], count: int) -> Counts:
    """Extrapolate counts: affine in the number of blocks; those by module are equal for all inner blocks."""
    found = four.extrapolated(three, count - 4)
    return replace(
        found,
        flops_by_module=_by_module(three.flops_by_module, four.flops_by_module, parts, count),
        matmuls_by_module=_by_module(three.matmuls_by_module, four.matmuls_by_module, parts, count),
        uncounted=+found.uncounted,
        work=+found.work,
    )


def _by_module(three: Counter[str], four: Counter[str], parts: Sequence[Sequence[Repeated]], count: int) -> Any:
    result: Counter[str] = Counter()
    for name in {**three, **four}:
        unit = Places(parts[1]).of(name)[0]
        if unit is None:
            result[name] = four[name] + (count - 4) * (four[name] - three[name])
            continue
        (number, block), relative = unit, Places(parts[1]).of(name)[1]
        part = parts[1][number]
        if block == 2 and four[name] != four[part.module(1, relative)]:
            raise Irregular
        targets = {0: [0], 1: range(1, count - 1), 2: [], 3: [count - 1]}[block]
        for target in targets:
            result[part.module(target, relative)] = four[name]
    return result
