"""Figures on lines: every size is exact, from few computed sizes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gradcost.planning.affine import Sample, piece_of, pieces

LINES = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 100)), min_size=1, max_size=4)


def largest(lines: list[tuple[int, int]], size: int) -> Sample:
    """The largest of some lines, as a peak is, and which line it is."""
    value, place = max((start + growth * size, i) for i, (start, growth) in enumerate(lines))
    return Sample((f"line {place}",), (value, size), value / 7)


@settings(max_examples=200, deadline=None)
@given(LINES, st.sets(st.integers(1, 300), min_size=1, max_size=80))
def test_every_size_is_exact(lines: list[tuple[int, int]], chosen: set[int]):
    sizes = sorted(chosen)
    found = pieces(lambda size: largest(lines, size), sizes)
    for size in sizes:
        piece = piece_of(found, size)
        assert piece is not None
        words, numbers, seconds = piece.at(size)
        assert (words, numbers) == largest(lines, size)[:2]
        assert seconds is not None
        assert abs(seconds - numbers[0] / 7) < 1e-6
    assert [piece.first for piece in found] == sorted(piece.first for piece in found)


def test_few_sizes_are_computed_and_a_line_has_three_of_them():
    seen: set[int] = set()

    def sample(size: int) -> Sample:
        seen.add(size)
        return largest([(1000, 1), (0, 300)], size)

    found = pieces(sample, range(1, 1025))
    assert [(piece.first, piece.last) for piece in found] == [(1, 3), (4, 1024)]
    assert all(len(piece.computed) >= 3 for piece in found)
    assert {size for piece in found for size in piece.computed} <= seen
    assert len(seen) < 12


def test_what_is_on_no_line_is_computed():
    found = pieces(lambda size: Sample(("x",), (size * size,)), [1, 2, 3, 4, 9])
    assert [piece.at(size).numbers for piece in found for size in {piece.first, piece.last}] != []
    for size in (1, 2, 3, 4, 9):
        piece = piece_of(found, size)
        assert piece is not None
        assert size in piece.computed
        assert piece.at(size).numbers == (size * size,)


def test_words_divide_a_line_and_a_refusal_has_no_numbers():
    def sample(size: int) -> Sample:
        return Sample(("too large",)) if size > 5 else Sample(("a" if size < 3 else "b",), (2 * size,))

    found = pieces(sample, range(1, 10))
    assert [(piece.first, piece.last, piece.words) for piece in found] == [
        (1, 2, ("a",)),
        (3, 5, ("b",)),
        (6, 9, ("too large",)),
    ]
    assert found[2].at(7) == Sample(("too large",))
