"""Search for a checkpointing schedule by simulating whole steps.

In a chain of blocks, the bytes and FLOPs of single blocks determine the peak of every schedule. In other models (skip
connections, an encoder and a decoder, a residual stream outside of the blocks) they only give estimates of peaks. The
search simulates the schedules with the best estimates first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from gradcost.checkpointing.schedule_cost import Point
from gradcost.checkpointing.schedules import Items, joined, parts_of, whole
from gradcost.core.errors import BadInput
from gradcost.planning.block_profile import MOST_PARTS

_MOST_SIMULATIONS = 32  # per search

Measure = Callable[[Items], Point]


def fewer_flops(starts: Sequence[Point], budget: int, simulated: Measure, estimated: Measure) -> Point:
    """Return the schedule with the fewest FLOPs of those that fit `budget` and were simulated.

    Args:
        starts: simulated schedules, of which one or more fit. The search begins with their neighbours.
        budget: bytes.
        simulated: returns the peak of a whole step and the recomputed FLOPs of a schedule. Slow.
        estimated: returns estimates of both from the bytes and FLOPs of single blocks, or raises BadInput. Fast.
    """

    def rank(point: Point) -> tuple[int, ...]:
        return max(point.peak - budget, 0), point.flops, point.peak

    def may_be_better(estimate: Point, best: Point) -> bool:
        return (estimate.flops, estimate.peak) < (best.flops, best.peak)

    return _best_first(starts, simulated, estimated, rank, may_be_better)


def lower_peak(starts: Sequence[Point], simulated: Measure, estimated: Measure) -> Point:
    """Return the schedule with the lowest peak of those that were simulated. Arguments: as `fewer_flops`."""

    def rank(point: Point) -> tuple[int, ...]:
        return point.peak, point.flops

    return _best_first(starts, simulated, estimated, rank, lambda estimate, best: rank(estimate) < rank(best))


def _best_first(
    starts: Sequence[Point],
    simulated: Measure,
    estimated: Measure,
    rank: Callable[[Point], tuple[int, ...]],
    may_be_better: Callable[[Point, Point], bool],
) -> Point:
    """Simulate up to `_MOST_SIMULATIONS` neighbours of simulated schedules, the best estimates first.

    - An estimate is corrected by the error of the estimate of the schedule that it is a neighbour of.
    - If a change left the peak as it was, the peak lies elsewhere. Further changes of that schedule come last.

    Args:
        starts: simulated schedules.
        simulated: returns the simulated peak and FLOPs of a schedule.
        estimated: returns their estimates.
        rank: the lower, the better.
        may_be_better: whether a schedule with this estimate is worth a simulation, given the best one so far.
    Returns:
        The schedule of the lowest rank.
    """
    known, candidates = set[Items](), dict[Items, tuple[int, Point, Point]]()  # changes in vain, estimate, parent

    def add(point: Point, in_vain: int) -> None:
        known.add(point.items)
        candidates.pop(point.items, None)
        estimate = estimated(point.items)
        for items in set(neighbours(point.items)) - known:
            try:
                near = estimated(items)
            except BadInput:  # a block cannot be recomputed in so many parts, or recorded selectively
                continue
            peak, flops = near.peak + point.peak - estimate.peak, near.flops + point.flops - estimate.flops
            candidates.setdefault(items, (in_vain, Point(peak, flops, items), point))

    for start in starts:
        add(start, 0)
    best = min(starts, key=rank)
    for _ in range(_MOST_SIMULATIONS):
        worthwhile = [candidate for candidate in candidates.values() if may_be_better(candidate[1], best)]
        if not worthwhile:
            break
        in_vain, estimate, parent = min(worthwhile, key=lambda each: (each[0], *rank(each[1]), str(each[1].items)))
        point = simulated(estimate.items)
        add(point, in_vain + 1 if point.peak == parent.peak else 0)
        best = min(best, point, key=rank)
    return best


def neighbours(items: Items, is_region: bool = False) -> Iterator[Items]:
    """Yield the schedules that differ from a schedule in one place.

    - A region is replaced by its items.
    - The first block, the last block, the first half or all of a run (consecutive recorded blocks) becomes a region.
    - Outside of regions, the first block, the last block or all of a run is recorded selectively, or no longer so.
    - The last block of a region runs again in one part more or less.
    - Two neighbouring regions are joined, or a region is divided.
    - One of these changes is made inside a region.

    Args:
        items: the schedule.
        is_region: whether it is that of a region.
    """
    for i, item in enumerate(items[: len(items) if parts_of(items) == 1 else -parts_of(items)]):
        before, after = items[:i], items[i + 1 :]
        if isinstance(item, int):
            pieces = list(_of_run(item, is_region))
        else:
            plain = whole(item)
            pieces = [plain, *_in_parts(item)]
            pieces += [((*item[:k],), (*item[k:],)) for k in range(1, len(item) - parts_of(item) + 1)]
            if len(item) == 1 and isinstance(item[0], int) and item[0] > 1:
                pieces += [((k,), (item[0] - k,)) for k in sorted({1, item[0] // 2, item[0] - 1})]
            pieces += [(inner,) for inner in neighbours(item, is_region=True) if not _is_one_region(inner)]
            following = items[i + 1] if i + 1 < len(items) else 0
            if isinstance(following, tuple):
                yield joined((*before, (*plain, *following), *items[i + 2 :]))
                yield joined((*before, (item, following), *items[i + 2 :]))
        for piece in pieces:
            yield joined((*before, *piece, *after))


def _is_one_region(items: Items) -> bool:
    """Whether a region consists of one region, which costs a rerun and saves nothing."""
    return len(items) == 1 and isinstance(items[0], tuple)


def _of_run(item: int, is_region: bool) -> Iterator[Items]:
    """Yield what may replace a run of blocks: some of them in a region, or recorded in the other way."""
    count, sign = abs(item), 1 if item > 0 else -1
    others: list[int | Items] = [(1,)] if is_region else [(1,), -sign]
    yield ((count,),)
    if not is_region:
        yield (-item,)
    if count > 1:
        for other in others:
            yield other, sign * (count - 1)
            yield sign * (count - 1), other
        yield (count // 2,), sign * (count - count // 2)


def _in_parts(region: Items) -> Iterator[Items]:
    """Yield the region with its last block recomputed in one part more, or in one part less."""
    last = region[-1]
    if isinstance(last, int):
        if parts_of(region) < MOST_PARTS:
            yield ((*region[:-1], *([last - 1] if last > 1 else []), 0, 1),)
        if parts_of(region) > 1:
            yield ((*region[:-2], last),)
