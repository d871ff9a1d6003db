"""Which blocks of a chain to record and which to run again: every best trade of memory for recomputation.

A chain of blocks ends in an epilogue (the head and the loss), which is always recorded. A *schedule* over blocks
that follow one another is a tuple. An int n in it says that the next n blocks are recorded: all that they save is
kept until their backward. A tuple in it is a *region*: of the blocks that it covers only the first one's input is
kept, and when the backward comes to the last of them, they are run again from that input under the schedule that
the tuple is. `(((2,), (3,), 1), (2,), 4)` is one of twelve blocks.

The law of memory. M(S, g) is the most bytes that are live while S runs forward and backward, beyond the input of
its first block; g is the gradient that is held while S runs forward (none the first time, else the bytes of the
output that a rerun ends before). By the first item of S, with R what follows it:

    recorded block s            max(g + recorded_s, saved_s + output_s + M(R, g), saved_s + backward_s)
    region s..e, inner I        max(g + dropped_k + output_{k-1} for k in s..e [no output_{s-1}],
                                    output_e + M(R, g), M(I, output_e))
    epilogue                    max(recorded, saved + backward)

and where a rerun ends, nothing follows: a last block stops when its last saved tensor is made, max(g + recorded,
saved + backward), and a last region is not run first and then again but expanded at once, M(I, g). The input of
the whole chain is held throughout and is not counted.

The law of work. The first forward is free. A rerun costs the FLOPs of the blocks that it runs, recorded or not,
its last one only up to where it stops, and what the regions in it cost in turn.

All is in bytes and FLOPs. Source: Herrmann, Beaumont, Eyraud-Dubois, Hermann, Joly and Shilova, "Optimal
checkpointing for heterogeneous chains" (arXiv 1911.13214). Its dynamic program for persistent schedules (what is
kept is kept until its backward, as here) is solved there at one budget in rounded slots of memory and here at every
budget. Where blocks are equal and no two can be recorded at once, the problem is that of Griewank and Walther,
"Algorithm 799: Revolve" (ACM TOMS 26, 2000).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, TypeAlias

from gradcost.core.errors import BadInput

Items: TypeAlias = "tuple[int | Items, ...]"


@dataclass(frozen=True)
class Stage:
    """One block of a chain. Raises: ValueError when a number is negative or `stopped` is more than `flops`.

    output:   bytes of its output, which is the next block's input
    saved:    bytes that a recorded forward keeps until its backward, beyond its input and without its output
    dropped:  peak bytes while it runs and keeps nothing, beyond its input, its output included
    recorded: peak bytes while it runs recorded, beyond its input, its output included
    backward: peak bytes during its backward, beyond its input and `saved`, its output's gradient included
    flops:    FLOPs of one forward
    stopped:  FLOPs of a forward that ends when its last saved tensor is made
    """

    output: int
    saved: int
    dropped: int
    recorded: int
    backward: int
    flops: int
    stopped: int

    def __post_init__(self) -> None:
        _refuse_negative(self)
        if self.stopped > self.flops:
            raise BadInput(
                f"a forward that stops early takes no more than a whole one, and here stopped={self.stopped} is more "
                f"than flops={self.flops}: give the FLOPs up to the last saved tensor as `stopped`."
            )


@dataclass(frozen=True)
class Epilogue:
    """What follows the last block: the head and the loss. Raises: ValueError when a number is negative.

    recorded: peak bytes of its forward, beyond its input
    saved:    bytes that it keeps until its backward, beyond its input
    backward: peak bytes of its backward, beyond its input and `saved`
    """

    recorded: int
    saved: int
    backward: int

    def __post_init__(self) -> None:
        _refuse_negative(self)


def _refuse_negative(of: Stage | Epilogue) -> None:
    for field in fields(of):
        if (number := getattr(of, field.name)) < 0:
            raise BadInput(
                f"{field.name} of {type(of).__name__} is a count of bytes or FLOPs, not {number}: give 0 or more."
            )


class Point(NamedTuple):
    """A schedule with its peak in bytes and the FLOPs that it computes again."""

    peak: int
    flops: int
    items: Items


# ---- a given schedule


def peak(items: Items, stages: Sequence[Stage], epilogue: Epilogue) -> int:
    """M(items, 0) in bytes, by the law of memory at the head of this file.

    Raises: ValueError when the items are no schedule of as many blocks as there are stages.
    """
    _refuse(items, stages)
    return _peak(items, stages, 0, _ending(epilogue))


def recomputed(items: Items, stages: Sequence[Stage]) -> int:
    """The FLOPs of all reruns, by the law of work at the head of this file. Raises: as `peak`."""
    _refuse(items, stages)
    return sum(_rerun(item, under) for item, under in _walk(items, stages) if not isinstance(item, int))


def _peak(items: Items, stages: Sequence[Stage], held: int, rest: int | None) -> int:
    """M(items, held), where `rest` is M of what follows the last item: None at the end of a rerun."""
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
    """FLOPs of one rerun and of all the reruns in it."""
    walked = list(_walk(items, stages))
    inner = sum(_rerun(item, under) for item, under in walked if not isinstance(item, int))
    last, under = walked[-1]
    end = sum(stage.flops for stage in under[:-1]) + under[-1].stopped if isinstance(last, int) else 0
    return inner + end + sum(stage.flops for _, under in walked[:-1] for stage in under)


def _walk(items: Items, stages: Sequence[Stage]) -> Iterator[tuple[int | Items, Sequence[Stage]]]:
    """Each item with the stages that it covers."""
    start = 0
    for item in items:
        end = start + _length(item)
        yield item, stages[start:end]
        start = end


def _length(item: int | Items) -> int:
    return item if isinstance(item, int) else sum(map(_length, item))


def _refuse(items: Items, stages: Sequence[Stage]) -> None:
    def whole(item: int | Items) -> bool:
        return item >= 1 if isinstance(item, int) else bool(item) and all(map(whole, item))

    if not all(map(whole, items)):
        raise BadInput(
            f"an item is a count of 1 block or more or a tuple of 1 item or more, and {items} has another."
        )
    if _length(items) != len(stages):
        raise BadInput(
            f"{items} is a schedule of {_length(items)} blocks and the chain has {len(stages)}: cover each once."
        )


# ---- the two laws, as far as they do not look at what follows


def _alone(stage: Stage, held: int) -> int:
    """Peak of a recorded block's own forward and backward."""
    return max(held + stage.recorded, stage.saved + stage.backward)


def _ending(epilogue: Epilogue) -> int:
    return max(epilogue.recorded, epilogue.saved + epilogue.backward)


def _dropped(stages: Sequence[Stage]) -> Iterator[tuple[int, int]]:
    """Peak and FLOPs of running the first 1, 2, ... stages with nothing kept."""
    most = flops = given = 0
    for stage in stages:
        most, flops = max(most, given + stage.dropped), flops + stage.flops
        yield most, flops
        given = stage.output


# ---- all schedules


def frontier(stages: Sequence[Stage], epilogue: Epilogue, resolution: int | None = None) -> list[Point]:
    """All schedules that no other beats in both peak and recomputed FLOPs, one of each, by ascending peak.

    Law: for every schedule there is a point with no greater peak and no more FLOPs; flops descend strictly, and a
    point's figures are those that `peak` and `recomputed` give of its items. Equal runs of stages are solved once,
    so that a chain of equal blocks is cheap. Unequal ones have frontiers that grow with their length: then give a
    `resolution` in bytes, and of the schedules of a run of blocks whose peaks round up to one multiple of it the
    cheapest alone is kept (and that of the least peak). Figures, least peak and least FLOPs stay exact, and the law
    holds with a peak greater by at most len(stages) * resolution. Raises: ValueError when resolution < 1.

    Source: the recursion of arXiv 1911.13214 over pairs of memory and cost instead of memory slots. A region that
    ends a rerun is left out: it is the same as its items in its place.
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
    # From the last block to the first: what the chain from each block on needs, its first forward paid for too.
    tops = [_Table([(_ending(epilogue), 0, 0, 0, 0)], (), [], [])]
    for start in reversed(range(count)):
        reruns = [rerun(start, cut) for cut in range(start + 1, count + 1)]
        tops.insert(0, _table(stages[start:], 0, tops[:], reruns, step))
    free = sum(stage.flops for stage in stages)
    top = tops[0]
    return [Point(top.memory[i], top.cost[i] - free, top.items(i)) for i in range(len(top.cost))]


def cheapest(points: Sequence[Point], budget: int) -> Point | None:
    """The point of a frontier with the fewest FLOPs whose peak is within the budget in bytes, or None."""
    within = bisect_right(points, budget, key=lambda point: point.peak)
    return points[within - 1] if within else None


_NEVER = 1 << 100  # bytes; ends every list of memories, so that none is run past
_Choice: TypeAlias = tuple[int, int, int, int, int]  # memory, cost, length of the region (0: recorded), rest, rerun


class _Table:
    """The frontier of one run of blocks: memory ascends, cost descends, and choices point at the parts."""

    def __init__(
        self, found: list[_Choice], last: tuple[int, ...], rests: list[_Table], reruns: list[_Table]
    ) -> None:
        self.memory = [choice[0] for choice in found] + [_NEVER]
        self.cost = [choice[1] for choice in found]
        self.choices = [choice[2:] for choice in found]
        self.last = last  # the items where nothing is left to choose
        self.rests = rests  # what follows the first 1, 2, ... blocks
        self.reruns = reruns  # the first 1, 2, ... blocks, run again
        self.known: dict[int, Items] = {}

    def items(self, index: int) -> Items:
        if index not in self.known:
            self.known[index] = self._read(index)
        return self.known[index]

    def _read(self, index: int) -> Items:
        table = self
        read: list[int | Items] = []
        while table.rests:
            length, rest, rerun = table.choices[index]
            read.append(table.reruns[length - 1].items(rerun) if length else 1)
            table, index = table.rests[max(length, 1) - 1], rest
        read += table.last
        merged: list[int | Items] = []
        for item in read:
            if isinstance(item, int) and merged and isinstance(merged[-1], int):
                merged[-1] += item
            else:
                merged.append(item)
        return tuple(merged)


_NOTHING = _Table([(0, 0, 0, 0, 0)], (), [], [])


def _rerun_table(stages: Sequence[Stage], rests: list[_Table], reruns: list[_Table], step: int) -> _Table:
    last = stages[-1]
    if not rests:
        return _Table([(_alone(last, last.output), last.stopped, 0, 0, 0)], (1,), [], [])
    return _table(stages, last.output, rests, reruns, step)


def _table(stages: Sequence[Stage], held: int, rests: list[_Table], reruns: list[_Table], step: int) -> _Table:
    """The lower envelope over what the first item may be."""
    first = stages[0]
    found = _joined(rests[0], _NOTHING, _alone(first, held), first.saved + first.output, first.flops, 0)
    for length, (rest, rerun, (running, flops)) in enumerate(zip(rests, reruns, _dropped(stages), strict=False), 1):
        found += _joined(rest, rerun, held + running, stages[length - 1].output, flops, length)
    found.sort()
    kept: list[_Choice] = []
    cost = _NEVER
    for choice in found:
        if choice[1] < cost:
            cost = choice[1]
            # Of those that round up alike the last is the cheapest. The first of all is kept for its peak.
            if len(kept) > 1 and -(-kept[-1][0] // step) == -(-choice[0] // step):
                kept.pop()
            kept.append(choice)
    return _Table(kept, (), rests, reruns)


def _joined(rest: _Table, rerun: _Table, floor: int, shift: int, flops: int, length: int) -> list[_Choice]:
    """The frontier of max(floor, shift + memory of the rest, memory of the rerun) against the sum of the costs."""
    rests, reruns, rest_costs, rerun_costs = rest.memory, rerun.memory, rest.cost, rerun.cost
    memory = max(floor, shift + rests[0], reruns[0])
    i, k = bisect_right(rests, memory - shift) - 1, bisect_right(reruns, memory) - 1
    joined: list[_Choice] = []
    # From one memory to the next at which the rest or the rerun has a cheaper schedule, or both have.
    while memory < _NEVER:
        joined.append((memory, flops + rest_costs[i] + rerun_costs[k], length, i, k))
        memory, by_rerun = shift + rests[i + 1], reruns[k + 1]
        if memory <= by_rerun:
            i += 1
        if by_rerun <= memory:
            memory = by_rerun
            k += 1
    return joined
