"""Fake tensors: shapes without data. A method runs on them to forecast its cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_simulated_devices: list[str] = ["cpu"]  # a stack: `standing_for` pushes and pops


def is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def numbers(tensor: Tensor) -> list[float]:
    """Return the entries of a vector. A fake tensor has none: ones stand in for them."""
    return [1.0] * len(tensor) if is_fake(tensor) else tensor.tolist()


def known(tensor: Tensor) -> Tensor | None:
    """Return a tensor with real data: the tensor itself, or a fake tensor's constant. None when it has none."""
    return getattr(tensor, "constant", None) if is_fake(tensor) else tensor


def stands_for() -> str:
    """Return the device type that fake tensors simulate now. The fake tensors themselves are on the CPU."""
    return _simulated_devices[-1]


@contextmanager
def standing_for(device: str) -> Iterator[None]:
    """Let fake tensors simulate tensors on this device type inside the context."""
    _simulated_devices.append(device)
    try:
        yield
    finally:
        _simulated_devices.pop()
