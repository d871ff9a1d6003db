"""Optimal activation checkpointing of a chain of blocks: the Pareto frontier of peak memory and recomputed FLOPs.

A chain is a sequence of blocks and an epilogue (the head and the loss), which is always recorded.
`checkpointing.schedules` defines schedules of the blocks.

Law of memory. M(S, g) is the peak in bytes of the forward and the backward pass of schedule S, without the input of
S. g is the bytes of a gradient that is in memory during that forward pass: in a rerun the gradient of the region's
output; in the first forward pass g = 0. R is S without its first item; x_k is field x of `Stage` k. By first item:

    recorded block s            max(g + recorded_s, saved_s + output_s + M(R, g), saved_s + backward_s)
    region s..e, schedule I     max(g + dropped_k + output_{k-1} for k in s..e [output_{s-1} counts as 0],
                                    output_e + M(R, g), M(I, output_e))
    epilogue                    max(recorded, saved + backward)

The last item of a rerun has other terms. A recorded block has max(g + recorded, saved + backward): its forward pass
stops at its last saved tensor. A block in parts has its peak in `Stage.parts`. A region has M(I, g): its items
replace it, as it would otherwise run twice in a row.

Law of work. The first forward pass is not counted. A rerun costs the FLOPs of its blocks plus the reruns of its inner
regions, with exceptions at its end: a recorded last block costs `stopped`, or the FLOPs in `Stage.parts`; a last
region costs its rerun alone.

Source: Herrmann, Beaumont, Eyraud-Dubois, Hermann, Joly and Shilova, "Optimal checkpointing for heterogeneous
chains" (arXiv 1911.13214). Their dynamic program solves one memory budget, rounded to slots; this one solves all
budgets. In both, a saved tensor stays until its backward pass (*persistent* schedules). If blocks are equal and no
two can be recorded at once, Griewank and Walther solve it: "Algorithm 799: Revolve" (ACM TOMS 26, 2000).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import NamedTuple, TypeAlias

from gradcost.checkpointing.schedules import Items, check_items, joined, parts_of, schedule_length
from gradcost.core.errors import BadInput


@dataclass(frozen=True)
class Stage:
    """One block of a chain.

    Args:
        output: bytes of the block's output, which is the next block's input.
        saved: bytes that a recorded forward saves for the backward, without input and output.
        dropped: peak bytes of a forward that saves nothing, without the input, with the output.
        recorded: peak bytes of a recorded forward, without the input, with the output.
        backward: peak bytes of the backward, without the input and `saved`, with the gradient of the output.
        flops: FLOPs of one forward.
        stopped: FLOPs of a forward that stops at its last saved tensor.
        parts: for 2, 3, ... parts, the peak bytes of the block's rerun and backward, without the input, and the FLOPs
            of the rerun. Empty: the block has no schedule in parts.
    Raises:
        BadInput: a number is negative, or `stopped` exceeds `flops`.
    """

    output: int
    saved: int
    dropped: int
    recorded: int
    backward: int
    flops: int
    stopped: int
    parts: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        _check_not_negative(self)
        if self.stopped > self.flops:
            raise BadInput(
                f"stopped={self.stopped} is more than flops={self.flops}: `stopped` is the FLOPs of a forward up to "
                "its last saved tensor."
            )


@dataclass(frozen=True)
class Epilogue:
    """The head and the loss, after the last block.

    Args:
        recorded: peak bytes of the forward, without the input.
        saved: bytes that the forward saves for the backward, without the input.
        backward: peak bytes of the backward, without the input and `saved`.
    Raises:
        BadInput: a number is negative.
    """

    recorded: int
    saved: int
    backward: int

    def __post_init__(self) -> None:
        _check_not_negative(self)


def _check_not_negative(counts: Stage | Epilogue) -> None:
    for field in fields(counts):
        value = getattr(counts, field.name)
        for number in chain.from_iterable(value) if isinstance(value, tuple) else (value,):
            if number < 0:
                name = f"{field.name} of {type(counts).__name__}"
                raise BadInput(f"{name} is a count of bytes or FLOPs, not {number}: give 0 or more.")


class Point(NamedTuple):
    """A schedule with its peak memory in bytes and its recomputed FLOPs."""

    peak: int
    flops: int
    items: Items


# ---- peak and FLOPs of one schedule


def peak(items: Items, stages: Sequence[Stage], epilogue: Epilogue) -> int:
    """Return the peak bytes of a schedule: M(items, 0) of the law of memory at the head of this file.

    Raises:
        BadInput: items is not a schedule of len(stages) blocks.
    """
    _check_schedule(items, stages)
    return _peak(items, stages, 0, _epilogue_peak(epilogue))


def recomputed(items: Items, stages: Sequence[Stage]) -> int:
    """Return the FLOPs of all reruns, by the law of work at the head of this file. Raises: as `peak`."""
    _check_schedule(items, stages)
    return sum(_rerun_flops(item, part) for item, part in _parts(items, stages) if not isinstance(item, int))


def _peak(items: Items, stages: Sequence[Stage], g: int, rest: int | None) -> int:
    """Return M(items, g). rest: M of the items that follow `items`, or None if a rerun ends there."""
    in_parts = parts_of(items)
    for item, part in reversed(list(_parts(items, stages))):
        if isinstance(item, int):
            for stage in reversed(part):
                own = _recorded_peak(stage, g) if rest is not None or in_parts == 1 else _in_parts(stage, in_parts)[0]
                rest = own if rest is None else max(own, stage.saved + stage.output + rest)
        else:
            output = part[-1].output
            inner = _peak(item, part, output, None)
            *_, (forward, _) = _unrecorded(part)
            rest = inner if rest is None else max(g + forward, output + rest, inner)
    assert rest is not None
    return rest


def _rerun_flops(items: Items, stages: Sequence[Stage]) -> int:
    """Return the FLOPs of one rerun, including the reruns of its inner regions."""
    parts = list(_parts(items, stages))
    inner = sum(_rerun_flops(item, part) for item, part in parts if not isinstance(item, int))
    last, part = parts[-1]
    in_parts = parts_of(items)
    at_end = part[-1].stopped if in_parts == 1 else _in_parts(part[-1], in_parts)[1]
    end = sum(stage.flops for stage in part[:-1]) + at_end if isinstance(last, int) else 0
    return inner + end + sum(stage.flops for _, part in parts[:-1] for stage in part)


def _parts(items: Items, stages: Sequence[Stage]) -> Iterator[tuple[int | Items, Sequence[Stage]]]:
    """Yield each item with the stages of its blocks."""
    start = 0
    for item in items:
        end = start + schedule_length(item)
        yield item, stages[start:end]
        start = end


def _check_schedule(items: Items, stages: Sequence[Stage]) -> None:
    check_items(items)
    blocks = schedule_length(items)
    if blocks != len(stages):
        raise BadInput(f"{items} is a schedule of {blocks} blocks and the chain has {len(stages)}: cover each once.")


# ---- terms of the two laws


def _recorded_peak(stage: Stage, g: int) -> int:
    """Return the peak of a recorded block's own forward and backward, without the blocks after it."""
    return max(g + stage.recorded, stage.saved + stage.backward)


def _in_parts(stage: Stage, parts: int) -> tuple[int, int]:
    """Return the peak bytes and the FLOPs of a block that runs again in 2 parts or more."""
    if parts - 2 >= len(stage.parts):
        raise BadInput(f"the figures of a block in {parts} parts are not known: use {len(stage.parts) + 1} or fewer.")
    return stage.parts[parts - 2]


def _epilogue_peak(epilogue: Epilogue) -> int:
    return max(epilogue.recorded, epilogue.saved + epilogue.backward)


def _unrecorded(stages: Sequence[Stage]) -> Iterator[tuple[int, int]]:
    """Yield the peak and the FLOPs of a forward pass that saves nothing, through the first 1, 2, ... stages."""
    peak_bytes = flops = previous_output = 0
    for stage in stages:
        peak_bytes, flops = max(peak_bytes, previous_output + stage.dropped), flops + stage.flops
        yield peak_bytes, flops
        previous_output = stage.output


# ---- all schedules


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
        The points in ascending order of peak and strictly descending order of FLOPs.
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
    tables = [_Table([(_epilogue_peak(epilogue), 0, 0, 0, 0)], [()], [], [])]
    for start in reversed(range(count)):
        end = min([place for place in breaks if place > start], default=count)
        reruns = [rerun(start, cut) for cut in range(start + 1, end + 1)]
        tables.insert(0, _table(stages[start:], 0, tables[:], reruns, step))
    first_forward = sum(stage.flops for stage in stages)
    table = tables[0]
    return [Point(table.memory[i], table.cost[i] - first_forward, table.items(i)) for i in range(len(table.cost))]


def cheapest(points: Sequence[Point], budget: int) -> Point | None:
    """Return the point with the fewest FLOPs among those with a peak of at most `budget` bytes, or None."""
    fitting = bisect_right(points, budget, key=lambda point: point.peak)
    return points[fitting - 1] if fitting else None


_INFINITE = 1 << 100  # bytes; a sentinel at the end of every list of memories
# (memory, cost, length of a first region or 0 for a recorded block, index in the rest's table, in the rerun's table)
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
            items.append(table.reruns[length - 1].items(rerun) if length else 1)
            table, index = table.rests[max(length, 1) - 1], rest
        return joined((*items, *table.last[index]))


_EMPTY = _Table([(0, 0, 0, 0, 0)], [()], [], [])


def _rerun_table(stages: Sequence[Stage], rests: list[_Table], reruns: list[_Table], step: int) -> _Table:
    last = stages[-1]
    if not rests:
        whole = _recorded_peak(last, last.output), last.stopped
        points = sorted((*figures, number) for number, figures in enumerate((whole, *last.parts)))
        points = [point for i, point in enumerate(points) if all(point[1] < other[1] for other in points[:i])]
        return _Table([(*point[:2], 0, 0, 0) for point in points], [(*(0,) * p[2], 1) for p in points], [], [])
    return _table(stages, last.output, rests, reruns, step)


def _table(stages: Sequence[Stage], g: int, rests: list[_Table], reruns: list[_Table], step: int) -> _Table:
    """Return the frontier over all choices of the first item: a recorded block, or a region of 1, 2, ... blocks."""
    first = stages[0]
    choices = _combinations(rests[0], _EMPTY, _recorded_peak(first, g), first.saved + first.output, first.flops, 0)
    for n, (rest, rerun, (forward, flops)) in enumerate(zip(rests, reruns, _unrecorded(stages), strict=False), 1):
        choices += _combinations(rest, rerun, g + forward, stages[n - 1].output, flops, n)
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


def _combinations(rest: _Table, rerun: _Table, floor: int, shift: int, flops: int, length: int) -> list[_Choice]:
    """Return the frontier of: memory max(floor, shift + rest's memory, rerun's memory), cost flops + both costs."""
    rests, reruns, rest_costs, rerun_costs = rest.memory, rerun.memory, rest.cost, rerun.cost
    memory = max(floor, shift + rests[0], reruns[0])
    i, k = bisect_right(rests, memory - shift) - 1, bisect_right(reruns, memory) - 1
    joined: list[_Choice] = []
    # The next memory is the least one that fits a cheaper schedule of `rest` or `rerun`.
    while memory < _INFINITE:
        joined.append((memory, flops + rest_costs[i] + rerun_costs[k], length, i, k))
        memory, rerun_memory = shift + rests[i + 1], reruns[k + 1]
        if memory <= rerun_memory:
            i += 1
        if rerun_memory <= memory:
            memory = rerun_memory
            k += 1
    return joined
