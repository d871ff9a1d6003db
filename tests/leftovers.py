"""Count the tensors that are alive while the garbage collector of cycles is off."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def no_garbage_collector() -> Iterator[None]:
    """Inside the context only reference counts free objects. Before it, what earlier tests have left is freed."""
    while gc.collect() > 100:
        pass
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def tensors_alive() -> int:
    return sum(isinstance(each, Tensor) for each in gc.get_objects())
