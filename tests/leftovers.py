"""Find tensors that only the garbage collector of cycles would free."""

from __future__ import annotations

import gc
from collections.abc import Callable

from torch import Tensor


def assert_nothing_left(step: Callable[[int], object]) -> None:
    """Call `step` with 0 to 8, and assert that reference counts alone free every tensor, from the first step on."""
    for _ in range(3):  # what earlier tests have left
        gc.collect()
    gc.disable()
    try:
        alive = []
        for number in range(9):
            step(number)
            alive.append(_tensors())
        gc.collect()
        assert alive == [_tensors()] * 9
    finally:
        gc.enable()


def _tensors() -> int:
    return sum(isinstance(each, Tensor) for each in gc.get_objects())
