"""The notation of checkpointing schedules: which blocks of a chain are recorded, and which run again.

A *recorded* block saves all tensors that its backward pass needs. A *schedule* of blocks is a tuple of items. An item
is one of:

- an int n: the next n blocks are recorded.
- -n, outside of regions: the next n blocks are recorded *selectively*. They save only the outputs of expensive
  operators (`policies.Selective`), and the rest of each block runs again in the backward pass.
- a tuple: the schedule of one *region*. Only the region's input is saved. When the backward pass reaches the region,
  the region runs again from that input (a *rerun*), under this schedule.
- k zeros before a last 1 of a region: the last block runs again in k + 1 *parts*, once for each part of the tensors
  that it saves. Each part starts from the block's input, and what it computes is not kept for the others.

`(((2,), (3,), 1), (2,), 4)` is a schedule of twelve blocks, `((0, 1), 1)` one of two blocks.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from gradcost.core.equal_parts import part_lengths
from gradcost.core.errors import BadInput

Items: TypeAlias = "tuple[int | Items, ...]"  # a schedule


def schedule_length(item: int | Items) -> int:
    """Return the number of blocks in a schedule or in one item (of calls, if the schedule counts calls)."""
    return abs(item) if isinstance(item, int) else sum(map(schedule_length, item))


def uniform(blocks: int, count: int) -> Items:
    """Return the schedule of `Segments(count)`: one region per segment."""
    return tuple((length,) for length in part_lengths(blocks, count) if length)


def check_items(items: Any, is_region: bool = False) -> None:
    """Raise BadInput if `items` is not a schedule, or not that of a region."""
    if not isinstance(items, tuple) or not items:
        raise BadInput(f"a schedule is a tuple of one item or more, such as ((2,), 1), not {items!r}.")
    zeros = parts_of(items) - 1 if is_region and items[-1] == 1 else 0
    for item in items[: len(items) - 1 - zeros] + items[-1:]:
        if isinstance(item, bool) or not isinstance(item, int):
            check_items(item, is_region=True)
        elif item == 0:
            raise BadInput(
                f"zeros in a schedule stand before a 1 at the end of a region, as in ((0, 1),), not as in {items!r}."
            )
        elif item < 0 and is_region:
            raise BadInput(f"a number in a region of a schedule counts recorded blocks: 1 or more, not {item!r}.")


def is_schedule(items: Items) -> bool:
    """Return whether `check_items` accepts `items`."""
    try:
        check_items(items)
    except BadInput:
        return False
    return True


def parts_of(items: Items) -> int:
    """Return in how many parts the last block of a region runs again: 1 plus the zeros before its last item."""
    parts = 1
    while parts < len(items) and items[-1 - parts] == 0:
        parts += 1
    return parts


def whole(items: Items) -> Items:
    """Return the items of a region with its last block recomputed as a whole, not in parts."""
    return items[: -parts_of(items)] + items[-1:]


def has_parts(item: int | Items) -> bool:
    """Return whether a block runs again in parts in a schedule or in one item."""
    return item == 0 if isinstance(item, int) else any(map(has_parts, item))


def with_last_region_expanded(items: Items) -> Items:
    """Replace a last region by its items.

    The backward pass needs its values first. If they were discarded, the region would run again at once.
    """
    while not isinstance(items[-1], int):
        items = items[:-1] + items[-1]
    return items


def joined(items: Items) -> Items:
    """Return a schedule with neighbouring runs of blocks that are recorded alike joined. Parts stay parts."""
    result: list[int | Items] = []
    for item in items:
        last = result[-1] if result else 0
        if isinstance(item, int) and isinstance(last, int) and item * last > 0:
            result[-1] = last + item
        else:
            result.append(item if isinstance(item, int) else joined(item))
    return tuple(result)
