"""Optimal activation checkpointing of a chain of blocks: every best tradeoff of memory against recomputation.

A chain of blocks ends in an epilogue (the head and the loss), which is always recorded. A *schedule* of consecutive
blocks is a tuple of items. An item is one of:

- an int n: the next n blocks are recorded. All they save is kept until their backward pass.
- a tuple: its blocks are one *region*. Only the input of the first one is kept. When the backward pass reaches the
  last one, the region runs again from that input, under the schedule that the tuple is.

`(((2,), (3,), 1), (2,), 4)` is a schedule of twelve blocks.

Law of memory. M(S, g) is the peak in bytes while S runs forward and backward, beyond the input of its first block.
g is the gradient held while S runs forward: 0 the first time; in a rerun, the bytes of the output where it ends.
By the first item of S, with R the items after it:

    recorded block s            max(g + recorded_s, saved_s + output_s + M(R, g), saved_s + backward_s)
    region s..e, inner I        max(g + dropped_k + output_{k-1} for k in s..e [no output_{s-1}],
                                    output_e + M(R, g), M(I, output_e))
    epilogue                    max(recorded, saved + backward)

Nothing follows the end of a rerun. A last block stops when its last saved tensor is made, max(g + recorded,
saved + backward). A last region is expanded at once instead of running twice, M(I, g). The input of the whole chain
is held throughout and not counted.

Law of work. The first forward pass is free. A rerun costs the FLOPs of its blocks, recorded or not, plus the reruns
of its regions. Its last block costs `stopped` if it is recorded.

All numbers are bytes and FLOPs.

Source: Herrmann, Beaumont, Eyraud-Dubois, Hermann, Joly and Shilova, "Optimal checkpointing for heterogeneous
chains" (arXiv 1911.13214). Their dynamic program for persistent schedules (what is kept is kept until its backward,
as here) solves one budget in rounded slots of memory; this one solves every budget. For equal blocks, no two of which
can be recorded at once, the problem is that of Griewank and Walther, "Algorithm 799: Revolve" (ACM TOMS 26, 2000).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, TypeAlias

from gradcost.core.errors import BadInput

Items: TypeAlias = "tuple[int | Items, ...]"  # a schedule


def schedule_length(item: int | Items) -> int:
    """Return the number of blocks (or calls) that a schedule or one of its items covers."""
    return item if isinstance(item, int) else sum(map(schedule_length, item))


@dataclass(frozen=True)
class Stage:
    """One block of a chain.

    Args:
        output: bytes of its output, the next block's input.
        saved: bytes that a recorded forward keeps until its backward; input and output excluded.
        dropped: peak bytes of a forward that keeps nothing, beyond its input; output included.
        recorded: peak bytes of a recorded forward, beyond its input; output included.
        backward: peak bytes of its backward, beyond its input and `saved`; its output's gradient included.
        flops: FLOPs of one forward.
        stopped: FLOPs of a forward that ends when its last saved tensor is made.
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
        recorded: peak bytes of its forward, beyond its input.
        saved: bytes kept until its backward, beyond its input.
        backward: peak bytes of its backward, beyond its input and `saved`.
    Raises:
        BadInput: a number is negative.
    """

    recorded: int
    saved: int
    backward: int

    def __post_init__(self) -> None:
        _check_not_negative(self)


def _check_not_negative(figures: Stage | Epilogue) -> None:
    for field in fields(figures):
        if (number := getattr(figures, field.name)) < 0:
            name = f"{field.name} of {type(figures).__name__}"
            raise BadInput(f"{name} is a count of bytes or FLOPs, not {number}: give 0 or more.")


class Point(NamedTuple):
    """A schedule with its peak memory in bytes and its recomputed FLOPs."""

    peak: int
    flops: int
    items: Items


# ---- a given schedule


def peak(items: Items, stages: Sequence[Stage], epilogue: Epilogue) -> int:
    """Return M(items, 0) in bytes, by the law of memory at the head of this file.

    Raises:
        BadInput: items is not a schedule of len(stages) blocks.
    """
    _check_schedule(items, stages)
    return _peak(items, stages, 0, _ending(epilogue))


def recomputed(items: Items, stages: Sequence[Stage]) -> int:
    """Return the FLOPs of all reruns, by the law of work at the head of this file. Raises: as `peak`."""
    _check_schedule(items, stages)
    return sum(_rerun(item, under) for item, under in _walk(items, stages) if not isinstance(item, int))


def _peak(items: Items, stages: Sequence[Stage], held: int, rest: int | None) -> int:
    """Return M(items, held). `rest` is M of what follows the last item; None at the end of a rerun."""
    for item, under in reversed(list(_walk(items, stages))):
        if isinstance(item, int):
            for stage in reversed(under):
                alone = _alone(stage, held)
                rest = alone if rest is None else max(alone, stage.saved + stage.output + rest)
        else:
            end = under[-1].output
            inner = _peak(item, under, end, None)
            *_, (running, _) = _dropped(under)
            rest = inner if rest is None else max(held + running, end + rest, inner)
    assert rest is not None
    return rest


def _rerun(items: Items, stages: Sequence[Stage]) -> int:
    """Return the FLOPs of one rerun, the reruns inside it included."""
    walked = list(_walk(items, stages))
    inner = sum(_rerun(item, under) for item, under in walked if not isinstance(item, int))
    last, under = walked[-1]
    end = sum(stage.flops for stage in under[:-1]) + under[-1].stopped if isinstance(last, int) else 0
    return inner + end + sum(stage.flops for _, under in walked[:-1] for stage in under)


def _walk(items: Items, stages: Sequence[Stage]) -> Iterator[tuple[int | Items, Sequence[Stage]]]:
    """Yield each item with its stages."""
    start = 0
    for item in items:
        end = start + schedule_length(item)
        yield item, stages[start:end]
        start = end


def _check_schedule(items: Items, stages: Sequence[Stage]) -> None:
    def is_valid(item: int | Items) -> bool:
        return item >= 1 if isinstance(item, int) else bool(item) and all(map(is_valid, item))

    if not all(map(is_valid, items)):
        raise BadInput(
            f"an item is a count of 1 block or more or a tuple of 1 item or more; not every one of {items} is."
        )
    blocks = schedule_length(items)
    if blocks != len(stages):
        raise BadInput(f"{items} is a schedule of {blocks} blocks and the chain has {len(stages)}: cover each once.")


# ---- terms of the two laws


def _alone(stage: Stage, held: int) -> int:
    """Return the peak of a recorded block's own forward and backward."""
    return max(held + stage.recorded, stage.saved + stage.backward)


def _ending(epilogue: Epilogue) -> int:
    return max(epilogue.recorded, epilogue.saved + epilogue.backward)


def _dropped(stages: Sequence[Stage]) -> Iterator[tuple[int, int]]:
    """Yield peak and FLOPs of running the first 1, 2, ... stages with nothing kept."""
    most = flops = previous_output = 0
    for stage in stages:
        most, flops = max(most, previous_output + stage.dropped), flops + stage.flops
        yield most, flops
        previous_output = stage.output


# ---- all schedules


def frontier(stages: Sequence[Stage], epilogue: Epilogue, resolution: int | None = None) -> list[Point]:
    """Return the Pareto frontier of schedules in peak memory and recomputed FLOPs.

    Law: for every schedule there is a point with no greater peak and no more FLOPs. A point's peak and flops are
    `peak` and `recomputed` of its items. With a resolution, its peak may be greater by len(stages) * resolution;
    the points' own numbers, the least peak and the least FLOPs stay exact.

    Equal runs of stages are solved once: a chain of equal blocks is fast. The frontier of unequal blocks grows
    with the length of the chain: set a resolution there. A region that ends a rerun equals its items and is omitted.

    Args:
        stages: the blocks.
        epilogue: the head and the loss.
        resolution: bytes. Of the schedules of a run of blocks whose peaks round up to one multiple of it, only the
            cheapest is kept, and the one of least peak. None: exact.
    Returns:
        The points by ascending peak; their FLOPs descend strictly.
    Raises:
        BadInput: resolution < 1.
    Source: the recursion of arXiv 1911.13214 over pairs of memory and cost instead of memory slots.
    """
    if resolution is not None and resolution < 1:
        raise BadInput(f"peaks are rounded up to multiples of 1 byte or more, not {resolution}: None is exact.")
    stages, step, count = tuple(stages), resolution or 1, len(stages)
    numbers = {stage: number for number, stage in enumerate(stages)}
    names = [numbers[stage] for stage in stages]
    solved: dict[tuple[int, ...], _Table] = {}

    def rerun(start: int, end: int) -> _Table:
        return solved[tuple(names[start:end])]

    for length in range(1, count + 1):
        for start in range(count - length + 1):
            end = start + length
            if tuple(names[start:end]) not in solved:
                rests = [rerun(cut, end) for cut in range(start + 1, end)]
                reruns = [rerun(start, cut) for cut in range(start + 1, end)]
                solved[tuple(names[start:end])] = _rerun_table(stages[start:end], rests, reruns, step)
    # Last block to first: the frontier of the chain from each block on, its first forward included in the cost.
    tops = [_Table([(_ending(epilogue), 0, 0, 0, 0)], (), [], [])]
    for start in reversed(range(count)):
        reruns = [rerun(start, cut) for cut in range(start + 1, count + 1)]
        tops.insert(0, _table(stages[start:], 0, tops[:], reruns, step))
    free = sum(stage.flops for stage in stages)
    top = tops[0]
    return [Point(top.memory[i], top.cost[i] - free, top.items(i)) for i in range(len(top.cost))]


def cheapest(points: Sequence[Point], budget: int) -> Point | None:
    """Return the point of a frontier with the fewest FLOPs and a peak within the budget in bytes, or None."""
    within = bisect_right(points, budget, key=lambda point: point.peak)
    return points[within - 1] if within else None


_NEVER = 1 << 100  # bytes; a sentinel at the end of every list of memories
_Choice: TypeAlias = tuple[int, int, int, int, int]  # memory, cost, length of the region (0: recorded), rest, rerun


class _Table:
    """The frontier of one run of blocks: memory ascends, cost descends, choices index the tables of its parts."""

    def __init__(
        self, choices: list[_Choice], last: tuple[int, ...], rests: list[_Table], reruns: list[_Table]
    ) -> None:
        self.memory = [choice[0] for choice in choices] + [_NEVER]
        self.cost = [choice[1] for choice in choices]
        self.choices = [choice[2:] for choice in choices]
        self.last = last  # the items, where there is no choice
        self.rests = rests  # tables of what follows the first 1, 2, ... blocks
        self.reruns = reruns  # tables of a rerun of the first 1, 2, ... blocks
        self.cache: dict[int, Items] = {}

    def items(self, index: int) -> Items:
        if index not in self.cache:
            self.cache[index] = self._read(index)
        return self.cache[index]

    def _read(self, index: int) -> Items:
        table = self
        items: list[int | Items] = []
        while table.rests:
            length, rest, rerun = table.choices[index]
            items.append(table.reruns[length - 1].items(rerun) if length else 1)
            table, index = table.rests[max(length, 1) - 1], rest
        items += table.last
        merged: list[int | Items] = []
        for item in items:
            if isinstance(item, int) and merged and isinstance(merged[-1], int):
                merged[-1] += item
            else:
                merged.append(item)
        return tuple(merged)


_EMPTY = _Table([(0, 0, 0, 0, 0)], (), [], [])


def _rerun_table(stages: Sequence[Stage], rests: list[_Table], reruns: list[_Table], step: int) -> _Table:
    last = stages[-1]
    if not rests:
        return _Table([(_alone(last, last.output), last.stopped, 0, 0, 0)], (1,), [], [])
    return _table(stages, last.output, rests, reruns, step)


def _table(stages: Sequence[Stage], held: int, rests: list[_Table], reruns: list[_Table], step: int) -> _Table:
    """Return the lower envelope over all choices of the first item."""
    first = stages[0]
    choices = _joined(rests[0], _EMPTY, _alone(first, held), first.saved + first.output, first.flops, 0)
    for length, (rest, rerun, (running, flops)) in enumerate(zip(rests, reruns, _dropped(stages), strict=False), 1):
        choices += _joined(rest, rerun, held + running, stages[length - 1].output, flops, length)
    choices.sort()
    envelope: list[_Choice] = []
    cost = _NEVER
    for choice in choices:
        if choice[1] < cost:
            cost = choice[1]
            # Among equal rounded peaks the last is the cheapest. The very first keeps the least peak.
            if len(envelope) > 1 and -(-envelope[-1][0] // step) == -(-choice[0] // step):
                envelope.pop()
            envelope.append(choice)
    return _Table(envelope, (), rests, reruns)


def _joined(rest: _Table, rerun: _Table, floor: int, shift: int, flops: int, length: int) -> list[_Choice]:
    """Return the frontier of (max(floor, shift + memory of rest, memory of rerun), sum of the costs)."""
    rests, reruns, rest_costs, rerun_costs = rest.memory, rerun.memory, rest.cost, rerun.cost
    memory = max(floor, shift + rests[0], reruns[0])
    i, k = bisect_right(rests, memory - shift) - 1, bisect_right(reruns, memory) - 1
    joined: list[_Choice] = []
    # Step through the memories at which rest or rerun has a cheaper schedule.
    while memory < _NEVER:
        joined.append((memory, flops + rest_costs[i] + rerun_costs[k], length, i, k))
        memory, by_rerun = shift + rests[i + 1], reruns[k + 1]
        if memory <= by_rerun:
            i += 1
        if by_rerun <= memory:
            memory = by_rerun
            k += 1
    return joined
