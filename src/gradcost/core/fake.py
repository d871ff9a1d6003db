"""Fake tensors: shapes without numbers, on which a method's own code tells what it would cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_stands_for: list[str] = ["cpu"]


def is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def numbers(tensor: Tensor) -> list[float]:
    """The numbers of a vector; of a fake one, which has none, ones."""
    return [1.0] * len(tensor) if is_fake(tensor) else tensor.tolist()


def known(tensor: Tensor) -> Tensor | None:
    """The tensor itself; of a fake one the real tensor whose numbers it knows, or None."""
    return getattr(tensor, "constant", None) if is_fake(tensor) else tensor


def stands_for() -> str:
    """The type of device that fake tensors stand for at present: they themselves are on the CPU always."""
    return _stands_for[-1]


@contextmanager
def standing_for(device: str) -> Iterator[None]:
    """Within, fake tensors stand for tensors on this type of device."""
    _stands_for.append(device)
    try:
        yield
    finally:
        _stands_for.pop()
