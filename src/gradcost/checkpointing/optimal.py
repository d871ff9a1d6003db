"""Optimal activation checkpointing of a chain of blocks: the Pareto frontier of peak memory and recomputed FLOPs.

`checkpointing.schedule_cost` defines the peak and the FLOPs of a schedule.

Source: Herrmann, Beaumont, Eyraud-Dubois, Hermann, Joly and Shilova, "Optimal checkpointing for heterogeneous
chains" (arXiv 1911.13214). Their dynamic program solves one memory budget, rounded to slots; this one solves all
budgets. In both, a saved tensor stays until its backward pass (*persistent* schedules). If blocks are equal and no
two can be recorded at once, Griewank and Walther solve it: "Algorithm 799: Revolve" (ACM TOMS 26, 2000).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TypeAlias

from gradcost.checkpointing.schedule_cost import (
    Epilogue,
    Point,
    Stage,
    epilogue_peak,
    recorded_peak,
    selective,
    unrecorded,
)
from gradcost.checkpointing.schedules import Items, joined
from gradcost.core.errors import BadInput


def frontier(
    stages: Sequence[Stage], epilogue: Epilogue, resolution: int | None = None, breaks: Sequence[int] = ()
) -> list[Point]:
    """Return the Pareto frontier of schedules in peak memory and recomputed FLOPs.

    Law: for every schedule S there is a point with no greater peak and no more FLOPs than S. A point has
    peak = `peak(items, ...)` and flops = `recomputed(items, ...)`, exactly. With a resolution, the point's peak may
    exceed that of S by up to len(stages) * resolution; the least peak and the least FLOPs stay exact.

    Equal sequences of stages are solved once, so a chain of equal blocks is fast. With unequal blocks the frontier
    grows with the length of the chain: set a resolution. No schedule has a region at the end of a rerun.

    Args:
        stages: the blocks.
        epilogue: the head and the loss.
        resolution: bytes. Of all schedules of the same blocks whose peaks round up to the same multiple of
            `resolution`, only the cheapest is used. The schedule with the least peak is always used. None: exact.
        breaks: indices of stages whose input is not the output of the stage before: regions end there.
    Returns:
        The points in ascending order of peak and descending order of FLOPs; of equal FLOPs, the fewest selectively
        recorded blocks last.
    Raises:
        BadInput: resolution < 1.
    Source: the recursion of arXiv 1911.13214 over pairs of memory and cost instead of memory slots.
    """
    if resolution is not None and resolution < 1:
        raise BadInput(f"the resolution of peaks is 1 byte or more, not {resolution}: None is exact.")
    stages, step, count = tuple(stages), resolution or 1, len(stages)
    sequence = [stages.index(stage) for stage in stages]  # equal stages have equal numbers
    solved: dict[tuple[int, ...], _Table] = {}

    def rerun(start: int, end: int) -> _Table:
        return solved[tuple(sequence[start:end])]

    for length in range(1, count + 1):
        for start in range(count - length + 1):
            end = start + length
            if tuple(sequence[start:end]) not in solved:
                rests = [rerun(cut, end) for cut in range(start + 1, end)]
                reruns = [rerun(start, cut) for cut in range(start + 1, end)]
                solved[tuple(sequence[start:end])] = _rerun_table(stages[start:end], rests, reruns, step)
    # tables[0] is the frontier of the chain from block `start` on. Its costs include the first forward pass.
    tables = [_Table([(epilogue_peak(epilogue), 0, 0, 0, 0)], [()], [], [])]
    for start in reversed(range(count)):
        end = min([place for place in breaks if place > start], default=count)
        reruns = [rerun(start, cut) for cut in range(start + 1, end + 1)]
        tables.insert(0, _table(stages[start:], 0, tables[:], reruns, step, can_select=True))
    first_forward = sum(stage.flops for stage in stages)
    table = tables[0]
    flops = [cost // _COST - first_forward for cost in table.cost]
    return [Point(table.memory[i], flops[i], table.items(i)) for i in range(len(flops))]


def cheapest(points: Sequence[Point], budget: int) -> Point | None:
    """Return the point with the fewest FLOPs among those with a peak of at most `budget` bytes, or None."""
    fitting = bisect_right(points, budget, key=lambda point: point.peak)
    return points[fitting - 1] if fitting else None


_INFINITE = 1 << 200  # a sentinel at the end of every list of memories, and above every cost
_COST = 1 << 32  # of a FLOP. A selectively recorded block costs 1: of equal FLOPs, fewer of them are preferred
# (memory, cost, length of a first region, 0 for a recorded block or -1 for a selective one, index in the rest's
# table, in the rerun's table)
_Choice: TypeAlias = tuple[int, int, int, int, int]


class _Table:
    """The frontier of consecutive blocks: memory ascends, cost descends; `items(i)` is the schedule of point i."""

    def __init__(self, choices: list[_Choice], last: list[Items], rests: list[_Table], reruns: list[_Table]) -> None:
        self.memory = [choice[0] for choice in choices] + [_INFINITE]
        self.cost = [choice[1] for choice in choices]
        self.choices = [choice[2:] for choice in choices]
        self.last = last  # in a table without `rests`: the items of each point
        self.rests = rests  # tables of the blocks after the first 1, 2, ... blocks
        self.reruns = reruns  # tables of a rerun of the first 1, 2, ... blocks
        self.cache: dict[int, Items] = {}

    def items(self, index: int) -> Items:
        if index not in self.cache:
            self.cache[index] = self._build(index)
        return self.cache[index]

    def _build(self, index: int) -> Items:
        table = self
        items: list[int | Items] = []
        while table.rests:
            length, rest, rerun = table.choices[index]
            items.append(table.reruns[length - 1].items(rerun) if length > 0 else -1 if length else 1)
            table, index = table.rests[max(length, 1) - 1], rest
        return joined((*items, *table.last[index]))


_EMPTY = _Table([(0, 0, 0, 0, 0)], [()], [], [])


def _rerun_table(stages: Sequence[Stage], rests: list[_Table], reruns: list[_Table], step: int) -> _Table:
    last = stages[-1]
    if not rests:
        whole = recorded_peak(last, last.output), last.stopped
        points = sorted((*figures, number) for number, figures in enumerate((whole, *last.parts)))
        points = [point for i, point in enumerate(points) if all(point[1] < other[1] for other in points[:i])]
        choices = [(memory, flops * _COST, 0, 0, 0) for memory, flops, _ in points]
        return _Table(choices, [(*(0,) * zeros, 1) for *_, zeros in points], [], [])
    return _table(stages, last.output, rests, reruns, step)


def _table(
    stages: Sequence[Stage], g: int, rests: list[_Table], reruns: list[_Table], step: int, can_select: bool = False
) -> _Table:
    """Return the frontier over all choices of the first item: a recorded block, or a region of 1, 2, ... blocks.

    can_select: whether the block may be recorded selectively.
    """
    first = stages[0]
    cost = first.flops * _COST
    choices = _combinations(rests[0], _EMPTY, recorded_peak(first, g), first.saved + first.output, cost, 0)
    if can_select and first.selective is not None:
        kept, cost = selective(first), cost + first.selective[3] * _COST + 1
        choices += _combinations(rests[0], _EMPTY, recorded_peak(kept, g), kept.saved + kept.output, cost, -1)
    for n, (rest, rerun, (forward, flops)) in enumerate(zip(rests, reruns, unrecorded(stages), strict=False), 1):
        choices += _combinations(rest, rerun, g + forward, stages[n - 1].output, flops * _COST, n)
    choices.sort()
    envelope: list[_Choice] = []
    cost = _INFINITE
    for choice in choices:
        if choice[1] < cost:
            cost = choice[1]
            # Of equal rounded peaks, keep the last, which is the cheapest. Always keep the first, the least peak.
            if len(envelope) > 1 and -(-envelope[-1][0] // step) == -(-choice[0] // step):
                envelope.pop()
            envelope.append(choice)
    return _Table(envelope, [], rests, reruns)


def _combinations(rest: _Table, rerun: _Table, floor: int, shift: int, cost: int, length: int) -> list[_Choice]:
    """Return the frontier of: memory max(floor, shift + rest's memory, rerun's memory), cost + both costs."""
    rests, reruns, rest_costs, rerun_costs = rest.memory, rerun.memory, rest.cost, rerun.cost
    memory = max(floor, shift + rests[0], reruns[0])
    i, k = bisect_right(rests, memory - shift) - 1, bisect_right(reruns, memory) - 1
    found: list[_Choice] = []
    # The next memory is the least one that fits a cheaper schedule of `rest` or `rerun`.
    while memory < _INFINITE:
        found.append((memory, cost + rest_costs[i] + rerun_costs[k], length, i, k))
        memory, rerun_memory = shift + rests[i + 1], reruns[k + 1]
        if memory <= rerun_memory:
            i += 1
        if rerun_memory <= memory:
            memory = rerun_memory
            k += 1
    return found
