"""Round places for the labels of a logarithmic axis: few, and never so few that a reader cannot interpolate."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log

# From coarse to fine: how many powers of the base to go on by, and what to multiply each of them by.
_TWOS = ((4, (1,)), (2, (1,)), (1, (1,)), (1, (1, 1.5)), (1, (1, 1.25, 1.5, 1.75)))
_TENS = ((4, (1,)), (2, (1,)), (1, (1,)), (1, (1, 3)), (1, (1, 2, 5)), (1, (1, 1.5, 2, 3, 4, 5, 6, 7, 8)))


def powers_of_two(low: float, high: float) -> list[float]:
    """Ticks for bytes: 8 KiB, 16 KiB, 32 KiB."""
    return _ticks(low, high, 2, _TWOS)


def powers_of_ten(low: float, high: float) -> list[float]:
    """Ticks for a loss or a learning rate: 0.001, 0.01, 0.1."""
    return _ticks(low, high, 10, _TENS)


def _ticks(low: float, high: float, base: int, levels: Sequence[tuple[int, Sequence[float]]]) -> list[float]:
    """The coarsest level with three ticks in [low, high], or the finest."""
    found: list[float] = []
    for stride, factors in levels:
        first = floor(floor(log(low, base)) / stride) * stride
        powers = range(first, ceil(log(high, base)) + 1, stride)
        found = [x for k in powers for f in factors if low <= (x := float(f"{f * float(base) ** k:.12g}")) <= high]
        if len(found) >= 3:
            break
    return found
