"""Fake tensors have a shape and a dtype but no data. Running a method on them forecasts its cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

DEVICE = torch.ops.prim.device.default  # asks a fake tensor for its device; half of all calls of operators

_simulated_devices: list[str] = ["cpu"]  # a stack; `standing_for` pushes and pops


def is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def numbers(tensor: Tensor) -> list[float]:
    """Return the entries of a vector as a list; ones if the vector is fake, because it has no data."""
    return [1.0] * len(tensor) if is_fake(tensor) else tensor.tolist()


def known(tensor: Tensor) -> Tensor | None:
    """Return the tensor itself, or the constant that a fake tensor stores; None for a fake tensor without one."""
    return getattr(tensor, "constant", None) if is_fake(tensor) else tensor


def stands_for() -> str:
    """Return the device type that fake tensors simulate. The fake tensors themselves are always on the CPU."""
    return _simulated_devices[-1]


@contextmanager
def standing_for(device: str) -> Iterator[None]:
    """Inside the context, fake tensors simulate tensors on a device of this type, such as "cuda"."""
    _simulated_devices.append(device)
    try:
        yield
    finally:
        _simulated_devices.pop()
