"""Search for a checkpointing schedule by simulating whole steps.

In a chain of blocks, the bytes and FLOPs of single blocks determine the peak of every schedule. In other models (skip
connections, an encoder and a decoder, a residual stream outside of the blocks) they only give estimates of peaks. The
search simulates the schedules with the best estimates first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gradcost.checkpointing.schedule_cost import Point
from gradcost.checkpointing.schedules import Items, joined, parts_of, whole

_MOST_SIMULATIONS = 16  # per search

Measure = Callable[[Items], Point]


def fewer_flops(start: Point, budget: int, simulated: Measure, estimated: Measure) -> Point:
    """Return a schedule that fits `budget` with at most the FLOPs of `start`, which fits.

    Args:
        start: a simulated schedule whose peak is at most `budget`.
        budget: bytes.
        simulated: returns the peak of a whole step and the recomputed FLOPs of a schedule. Slow.
        estimated: returns estimates of both from the bytes and FLOPs of single blocks. Fast.
    """
    return _descent(start, simulated, estimated, lambda point: (point.peak > budget, point.flops, point.peak))


def lower_peak(start: Point, simulated: Measure, estimated: Measure) -> Point:
    """Return a schedule with at most the peak of `start`. Arguments: as `fewer_flops`."""
    return _descent(start, simulated, estimated, lambda point: (point.peak, point.flops))


def _descent(best: Point, simulated: Measure, estimated: Measure, rank: Callable[[Point], tuple[int, ...]]) -> Point:
    """Move to neighbours of lower rank until none has a lower rank or `_MOST_SIMULATIONS` were simulated."""
    tried = {best.items}
    while len(tried) <= _MOST_SIMULATIONS:
        error = best.peak - estimated(best.items).peak  # of the estimate; nearly the same for neighbours
        candidates = [estimated(items) for items in set(neighbours(best.items)) - tried]
        candidates = [Point(point.peak + error, point.flops, point.items) for point in candidates]
        candidates.sort(key=lambda point: (*rank(point), str(point.items)))
        for candidate in candidates[: _MOST_SIMULATIONS + 1 - len(tried)]:
            tried.add(candidate.items)
            point = simulated(candidate.items)
            if rank(point) < rank(best):
                best = point
                break
        else:
            return best
    return best


def uniform(blocks: int, count: int) -> Items:
    """Return the schedule of `Segments(count)`."""
    shortest, remainder = divmod(blocks, count)
    return tuple((shortest + (i < remainder),) for i in range(count))


def neighbours(items: Items) -> Iterator[Items]:
    """Yield the schedules that differ from a schedule in one place.

    - A region is replaced by its items.
    - The first block, the last block, the first half or all of a run (consecutive recorded blocks) becomes a region.
    - Two neighbouring regions are joined, or a region is divided.
    - One of these changes is made inside a region.
    """
    for i, item in enumerate(items[: len(items) if parts_of(items) == 1 else -parts_of(items)]):
        before, after = items[:i], items[i + 1 :]
        if isinstance(item, int) and item < 0:
            pieces: list[Items] = [(-item,), ((-item,),)]
        elif isinstance(item, int):
            pieces = [((item,),)]
            if item > 1:
                pieces += [((1,), item - 1), (item - 1, (1,)), ((item // 2,), item - item // 2)]
        else:
            plain = whole(item)
            pieces = [plain]
            pieces += [((*item[:k],), (*item[k:],)) for k in range(1, len(item) - parts_of(item) + 1)]
            if len(item) == 1 and isinstance(item[0], int) and item[0] > 1:
                pieces += [((k,), (item[0] - k,)) for k in sorted({1, item[0] // 2, item[0] - 1})]
            pieces += [(inner,) for inner in neighbours(item)]
            following = items[i + 1] if i + 1 < len(items) else 0
            if isinstance(following, tuple):
                yield joined((*before, (*plain, *following), *items[i + 2 :]))
                yield joined((*before, (item, following), *items[i + 2 :]))
        for piece in pieces:
            yield joined((*before, *piece, *after))
