"""The passes of the blocks of a chain under a checkpointing schedule, in the order in which a step makes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

from gradcost.checkpointing.schedules import Items, is_schedule, parts_of, schedule_length, with_last_region_expanded

Label: TypeAlias = Any  # hashable: visits with equal labels have equal allocations and operators
COPIES = 2  # of each label in a short schedule, so that their visits can be compared


class _Pass(NamedTuple):
    """One pass of a block. facts: what determines its allocations."""

    block: int
    facts: tuple[str, ...]


class Visit(NamedTuple):
    """Consecutive passes of one block: in a rerun, for example, the forward pass and then the backward pass."""

    block: int
    label: Label


def visits(items: Items, parts: int = 1, starts: bool = False) -> list[Visit]:
    """Return the visits of all blocks in a step of backpropagation under a schedule.

    The label of a visit contains its own passes, those of the visits before and after it, and whether the block is
    the first or the last one. So it contains which tensors the block finds, and which are freed during the visit.

    Args:
        items: the schedule, as in `checkpointing.policies.Schedule`.
        parts: the number of micro-batches.
        starts: whether the backward pass of a block begins with operators that need no saved tensor, such as a
            product with a number. Those of a region's last block run before the region's rerun.
    """
    last = schedule_length(items) - 1
    # A visit ends between a forward and a backward pass: the head and the loss run there.
    halves = [
        [(block, tuple(p.facts for p in group)) for block, group in groupby(half, lambda p: p.block)]
        for half in (list(_forward(items)), list(_backward(items, starts)))
    ]
    result: list[Visit] = []
    for part in range(parts):
        for number_of_half, half in enumerate(halves):
            end = last if number_of_half == 0 else 0
            for number, (block, facts) in enumerate(half):
                around = tuple(
                    (half[at][1], max(-2, min(2, half[at][0] - block))) if 0 <= at < len(half) else None
                    for at in (number - 1, number + 1)
                )
                place = block == 0, block == last, part == 0, part == parts - 1
                result.append(Visit(block, (facts, around, place, _kept(items) if block == end else ())))
    return result


def labels(items: Items, parts: int = 1, starts: bool = False) -> list[Label]:
    """Return the label of what a step does before the first visit, then those of the visits."""
    steps = visits(items, parts, starts)
    return [("before", steps[0].label, _kept(items)), *(visit.label for visit in steps)]


def _kept(items: Items) -> tuple[bool, bool]:
    """Return what determines which tensors from outside of the blocks are kept until the backward pass.

    A region keeps its arguments: the input of the first block, and tensors that all blocks get, such as a mask.
    """
    return has_regions(items), isinstance(items[0], int) and items[0] > 0


def _forward(items: Items) -> Iterator[_Pass]:
    """Yield the passes of the first forward pass."""
    start = 0
    for item in items:
        stop = start + schedule_length(item)
        for block in range(start, stop):
            if isinstance(item, int):
                yield _Pass(block, ("forward, recorded",) if item > 0 else ("forward, selective",))
            else:
                yield _Pass(block, ("forward, in a region", *_ends(block, start, stop)))
        start = stop


def _backward(items: Items, starts: bool) -> Iterator[_Pass]:
    """Yield the passes of the backward pass: the reruns of regions, and the backward passes of blocks."""
    stop = schedule_length(items)
    for number, item in reversed(list(enumerate(items))):
        start = stop - schedule_length(item)
        end = "ends a region" if has_regions(items[:number]) else "ends the last region"
        if isinstance(item, int) and item > 0:
            yield from (_Pass(block, ("backward",)) for block in reversed(range(start, stop)))
        elif isinstance(item, int):
            for block in reversed(range(start, stop)):
                yield _Pass(block, ("backward, selective", end if block == start else "ends a region"))
        else:
            yield from _rerun(item, start, start, end, starts)
        stop = start


def has_regions(items: Items) -> bool:
    """Return whether some blocks run again."""
    return not all(isinstance(item, int) and item > 0 for item in items)


def _rerun(items: Items, start: int, region: int, end_of_region: str, starts: bool) -> Iterator[_Pass]:
    """Yield the passes of a rerun from block `start` and of its backward pass. region: the region's first block."""
    items, stop = with_last_region_expanded(items), start + schedule_length(items)
    parts = parts_of(items)
    if starts:
        yield _Pass(stop - 1, ("starts the backward",))
    at, bounds = start, [start]
    for item in items:
        end = at + schedule_length(item)
        for block in range(at, end):
            facts = [_source(block, start, region), *_ends(block, at, end)]
            if block == end - 1:  # the graph of consecutive blocks keeps the input of the first one until here
                facts.append(f"from the input {_source(at, start, region)}")
            if isinstance(item, int):
                end_facts = ["stops", f"in {parts} parts"] if block == stop - 1 else []
                yield _Pass(block, ("rerun, recorded", *facts, *end_facts))
            else:
                yield _Pass(block, ("rerun, dropped", *facts))
        at = end
        bounds.append(end)
    for item, low, high in zip(reversed(items), bounds[-2::-1], bounds[:0:-1], strict=True):
        if isinstance(item, int):
            for block in reversed(range(low, high)):
                yield _Pass(block, ("backward", end_of_region if block == region else "in a region"))
        else:
            yield from _rerun(item, low, region, end_of_region, starts)


def _source(block: int, start: int, region: int) -> str:
    """Return what the input of a block in a rerun from block `start` is."""
    return "of the region" if block == region else "of the rerun" if block == start else "of a block"


def _ends(block: int, start: int, stop: int) -> list[str]:
    return [*(["first"] if block == start else []), *(["last"] if block == stop - 1 else [])]


def shortened(items: Items, parts: int, wanted: set[Label], starts: bool = False) -> Items:
    """Return a schedule of fewer blocks that contains the wanted labels of `items`, twice if `items` does.

    Args:
        items: a schedule.
        parts: the number of micro-batches.
        wanted: labels of visits of `items`.
        starts: as in `visits`.
    """
    need, short = _needed(items, parts, wanted, starts), items
    while True:
        shorter = _first_with(need, _smaller(short), parts, starts)
        if shorter is None:
            return short
        short = shorter


def lengthened(short: Items, items: Items, parts: int, wanted: set[Label], starts: bool = False) -> Items | None:
    """Return a schedule with more blocks than `short`, not more than `items`, with the same labels; None without one.

    Args:
        short: a schedule that `shortened` or `lengthened` returned for the other arguments.
        items, parts, wanted, starts: as in `shortened`.
    """
    blocks = range(schedule_length(short) + 1, schedule_length(items) + 1)
    longer = (schedule for schedule in _larger(short) if schedule_length(schedule) in blocks)
    return _first_with(_needed(items, parts, wanted, starts), longer, parts, starts)


def _needed(items: Items, parts: int, wanted: set[Label], starts: bool) -> dict[Label, int]:
    """Return how often a short schedule must contain each wanted label of `items`."""
    counts = Counter(label for label in labels(items, parts, starts) if label in wanted)
    return {label: min(count, COPIES) for label, count in counts.items()}


def _first_with(need: dict[Label, int], schedules: Iterator[Items], parts: int, starts: bool) -> Items | None:
    """Return the smallest schedule with the needed labels."""

    def is_enough(candidate: Items) -> bool:
        have = Counter(labels(candidate, parts, starts))
        return all(have[label] >= count for label, count in need.items())

    candidates = sorted({schedule for schedule in schedules if is_schedule(schedule)}, key=_size)
    return next(filter(is_enough, candidates), None)


def _size(items: Items) -> tuple[int, str]:
    return sum(1 for _ in (*_forward(items), *_backward(items, False))), str(items)


def _smaller(items: Items) -> Iterator[Items]:
    """Yield schedules with fewer blocks, from which one item or a part of an item is removed, at any level."""
    for i, item in enumerate(items):
        before, after = items[:i], items[i + 1 :]
        for stop in range(i + 1, len(items) + 1):
            yield (*before, *items[stop:])
        if isinstance(item, int):
            yield from ((*before, count if item > 0 else -count, *after) for count in range(1, abs(item)))
        else:
            yield from ((*before, inner, *after) for inner in _smaller(item) if inner)


def _larger(items: Items) -> Iterator[Items]:
    """Yield schedules with more blocks: one item, or a part of one, is twice there or longer by one block."""
    for i, item in enumerate(items):
        before, after = items[:i], items[i + 1 :]
        yield (*before, item, item, *after)
        if isinstance(item, int):
            yield (*before, item + 1 if item > 0 else item - 1, *after)
        else:
            yield from ((*before, inner, *after) for inner in _larger(item))
