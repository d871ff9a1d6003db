"""The lengths of nearly equal parts."""

from __future__ import annotations


def part_lengths(length: int, parts: int) -> list[int]:
    """Return the lengths of `parts` parts of a sequence: they differ by at most 1, and the longer ones are first."""
    shortest, longer = divmod(length, parts)
    return [shortest + (i < longer) for i in range(parts)]
