"""Change the size of a batch for a forecast, which needs shapes but no data, and find the largest that fits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradcost.core.batching.micro_batches import map_examples
from gradcost.core.errors import BadInput
from gradcost.core.pytree import batch_size

MOST = 1 << 24  # examples: the largest batch that is tried
_MAX_REPEATED = 1 << 20  # elements; integer tensors up to this size get values: models branch on masks and positions


def resized(batch: Any, size: int) -> Any:
    """Return a batch of `size` examples with the shapes and types of `batch`.

    - Integer tensors on the CPU (tokens, masks), up to 2^20 elements, NumPy arrays and lists with one entry per
      example: the examples of `batch`, repeated.
    - Other tensors: empty, on the `meta` device.
    - Scalars, and other values: unchanged.

    Raises:
        BadInput: size < 1, or the number of examples of `batch` is not defined.
    """
    if size < 1:
        raise BadInput(f"a batch has 1 example or more, not {size}.")

    made: dict[tuple[int, int], tuple[Any, Any]] = {}  # identity and axis -> the leaf, kept alive, and the result

    def resize(leaf: Any, axis: int) -> Any:
        # A tensor that occurs twice, as tokens and as targets, stays one tensor.
        if (id(leaf), axis) not in made:
            made[id(leaf), axis] = leaf, _resized(leaf, axis, size)
        return made[id(leaf), axis][1]

    return map_examples(batch, resize)


def _resized(leaf: Any, axis: int, size: int) -> Any:
    """Return a tensor, array or list with `size` examples along a dimension."""
    if isinstance(leaf, np.ndarray):
        return leaf.take(np.arange(size) % leaf.shape[axis], axis)
    if not isinstance(leaf, Tensor):
        return type(leaf)(list(itertools.islice(itertools.cycle(leaf), size)))
    shape = (*leaf.shape[:axis], size, *leaf.shape[axis + 1 :])
    has_values = not (leaf.is_floating_point() or leaf.is_complex() or leaf.is_meta) and leaf.device.type == "cpu"
    if has_values and leaf.numel() and math.prod(shape) <= _MAX_REPEATED:
        return leaf.index_select(axis, torch.arange(size) % leaf.shape[axis])
    return torch.empty(shape, dtype=leaf.dtype, device="meta")


def three_parts(batch: Any, parts: int, own_parts: int = 1) -> Any | None:
    """Return a batch of 3 micro-batches instead of `parts`, of the same size each.

    None if there are no more than 3, if their sizes differ, or if a micro-batch does not divide into `own_parts`
    equal parts.
    """
    try:
        examples = batch_size(batch)
    except BadInput:
        return None
    if parts <= 3 or examples % (parts * own_parts):
        return None
    return resized(batch, examples // parts * 3)


def largest(peak: Callable[[int], int | None], budget: int, start: int, floor: int = 1) -> int:
    """Return the largest size, from `floor` to MOST, whose peak is at most `budget`; 0 if there is none.

    Peaks are piecewise affine in the size, so a line through two of them predicts the answer: through those of the
    two smallest sizes that do not fit, of the two largest that do, of the largest that fits and the smallest that
    does not, or of the last two. The range is halved, in its logarithm if it is wide, after two sizes in a row on one
    side of the answer that do not predict it, and after 8 predictions.

    Args:
        peak: returns the peak bytes of a size; None if the size is impossible.
        budget: bytes.
        start: the first size to try.
        floor: the smallest size.
    """
    below = low = (floor - 1, None)  # the two largest sizes that fit, and their peaks
    above = high = (MOST + 1, None)  # the two smallest sizes that do not
    last, at, predictions, in_a_row = None, max(start, floor), 0, 0  # in a row: sizes that fit, or -sizes that do not
    while high[0] - low[0] > 1:
        at = min(max(at, low[0] + 1), high[0] - 1)
        point = at, peak(at)
        if point[1] is not None and point[1] <= budget:
            below, low, in_a_row = low, point, max(in_a_row, 0) + 1
        else:
            above, high, in_a_row = high, point, min(in_a_row, 0) - 1
        is_bounded = low[1] is not None and high[0] <= MOST
        sides = (_crossing(above, high, budget), _crossing(below, low, budget))
        inside = [size for size in sides if is_bounded and size is not None and low[0] < size < high[0]]
        chord = _crossing(low, high, budget) or _crossing(last, point, budget)
        is_stuck = is_bounded and abs(in_a_row) >= 2 and not inside
        if chord is None or predictions == 8 or is_stuck:
            in_a_row = 0
            middle = math.isqrt(low[0] * high[0]) if high[0] > 4 * low[0] else (low[0] + high[0]) // 2
            at = middle if high[0] <= MOST else 2 * low[0]
        else:
            at, predictions = next(iter(inside), chord), predictions + 1
        last = point
    return low[0] if low[0] >= floor else 0


def _crossing(one: tuple[int, int | None] | None, other: tuple[int, int | None], budget: int) -> int | None:
    """Return the largest size below the budget on the line through two points; MOST if the line does not rise."""
    if one is None or one[1] is None or other[1] is None or one[0] == other[0]:
        return None
    (size, low), (next_size, high) = sorted([(one[0], one[1]), (other[0], other[1])])
    return MOST if high <= low else size + (budget - low) * (next_size - size) // (high - low)
