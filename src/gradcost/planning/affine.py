"""Figures as a function of the batch size: affine pieces, each found from two sizes and confirmed at a third.

The peak is the largest of the bytes at each moment of a step. While the step runs the same operators, each of these
is affine in the batch size, so the peak is convex: if three sizes are on a line, all sizes between them are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose, isqrt
from typing import NamedTuple

Line = tuple[int, int]  # the value at size 0, and its growth per example


class Sample(NamedTuple):
    """The figures at one size.

    Args:
        words: what is equal in a piece, such as the operator that reaches the peak. For a refusal, its reason alone.
        numbers: what is affine in a piece.
        seconds: affine in a piece, up to rounding; None if unknown.
    """

    words: tuple[str, ...]
    numbers: tuple[int, ...] = ()
    seconds: float | None = None


@dataclass(frozen=True)
class Piece:
    """The figures of the sizes from `first` to `last`.

    Args:
        first: the smallest size.
        last: the largest size.
        words: `Sample.words` of every size.
        lines: `Sample.numbers` as lines.
        seconds: `Sample.seconds` as a line; None if unknown.
        computed: the sizes whose figures were computed. Those of the other sizes follow.
    """

    first: int
    last: int
    words: tuple[str, ...]
    lines: tuple[Line, ...]
    seconds: tuple[float, float] | None
    computed: tuple[int, ...]

    def at(self, size: int) -> Sample:
        """Return the figures at a size."""
        seconds = None if self.seconds is None else self.seconds[0] + self.seconds[1] * size
        return Sample(self.words, tuple(start + growth * size for start, growth in self.lines), seconds)


def pieces(sample: Callable[[int], Sample], sizes: Sequence[int]) -> list[Piece]:
    """Return the pieces of a function of the size, in increasing order; every size of `sizes` is in one of them.

    A piece of three or more sizes is a line through its smallest and its largest size, confirmed at one between them.

    Args:
        sample: computes the figures at one size. It is called again for the same size.
        sizes: the sizes, increasing.
    """
    found: list[Piece] = []
    rest = list(sizes)
    while rest:
        found.append(_last(sample, rest))
        rest = [size for size in rest if size < found[-1].first]
    return found[::-1]


def _last(sample: Callable[[int], Sample], sizes: Sequence[int]) -> Piece:
    """Return the longest piece that ends at the largest size. Its beginning is searched by bisection."""
    last = len(sizes) - 1
    piece = _line({sizes[last]: sample(sizes[last])})
    assert piece is not None
    fails, works, at = -1, last, 0
    while works - fails > 1:
        middle = works if works < last else _between(sizes, at, last)
        places = dict.fromkeys((at, middle, last))
        longer = _line({sizes[place]: sample(sizes[place]) for place in places})
        if longer is None:
            fails = at
        else:
            piece, works = replace(longer, computed=tuple(sorted({*longer.computed, *piece.computed}))), at
        at = _between(sizes, fails, works)
    return piece


def _between(sizes: Sequence[int], low: int, high: int) -> int:
    """Return the place between two others whose size is nearest to their geometric mean; `high` if there is none."""
    return max(min(bisect_left(sizes, isqrt(sizes[max(low, 0)] * sizes[high])), high - 1), low + 1)


def _line(known: Mapping[int, Sample]) -> Piece | None:
    """Return the piece through samples at increasing sizes; None if they are not on a line."""
    (first, low), (last, high) = next(iter(known.items())), list(known.items())[-1]
    width = max(last - first, 1)
    growths = [divmod(b - a, width) for a, b in zip(low.numbers, high.numbers, strict=False)]
    if any(rest for _, rest in growths):
        return None
    lines = tuple((a - growth * first, growth) for a, (growth, _) in zip(low.numbers, growths, strict=False))
    seconds = None
    if low.seconds is not None and high.seconds is not None:
        growth = (high.seconds - low.seconds) / width
        seconds = low.seconds - growth * first, growth
    piece = Piece(first, last, low.words, lines, seconds, tuple(known))
    return piece if all(_equal(piece.at(size), found) for size, found in known.items()) else None


def _equal(one: Sample, other: Sample) -> bool:
    if one[:2] != other[:2] or (one.seconds is None) != (other.seconds is None):
        return False
    return one.seconds is None or other.seconds is None or isclose(one.seconds, other.seconds, rel_tol=1e-9)


def piece_of(found: Sequence[Piece], size: int) -> Piece | None:
    """Return the piece that contains a size; None if there is none."""
    return next((piece for piece in found if piece.first <= size <= piece.last), None)
