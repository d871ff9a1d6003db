"""Fake tensors have a shape and a dtype but no data. Running a method on them forecasts its cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from gradcost.core.memory_events import counted

Item = TypeVar("Item")
Result = TypeVar("Result")

DEVICE = torch.ops.prim.device.default  # asks a fake tensor for its device; half of all calls of operators

_simulated_devices: list[str] = ["cpu"]  # a stack; `standing_for` pushes and pops


def is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def numbers(tensor: Tensor) -> list[float]:
    """Return the entries of a vector as a list; ones if the vector is fake, because it has no data."""
    return [1.0] * len(tensor) if is_fake(tensor) else tensor.tolist()


def repeated(run: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return [run(item) for item in items], where each call of `run` costs the same.

    If the results are fake, only the first and the last call run. The results between them are copies of the first,
    and the operators of the last call count for those calls, too. So peak and counts are those of all calls.

    Args:
        run: returns a tensor, or a list or tuple of tensors.
        items: one or more arguments.
    """
    first, between = run(items[0]), len(items) - 2
    if between < 1 or not any(is_fake(tensor) for tensor in pytree.tree_leaves(first)):
        return [first, *map(run, items[1:])]
    with counted(0):
        copies = [pytree.tree_map(torch.clone, first) for _ in range(between)]
    with counted(1 + between):
        return [first, *copies, run(items[-1])]


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
