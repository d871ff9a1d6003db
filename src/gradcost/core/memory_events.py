"""What the code that runs tells the memory tracker and the FLOP counter.

The purposes of tensors, how often operators count, and which block runs again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

from torch import Tensor, nn

# The purposes of tensors. The memory tracker finds parameters, inputs and optimizer state without a tag.
#   gradients  the gradient of a parameter
#   saved      an activation saved for the backward pass
#   tangents   a tangent, or a tensor computed from one
#   noise      a weight plus a direction. Tagged once per direction, to count the random numbers drawn
#   shifted    a weight plus a low-rank direction. The random numbers are counted by the "noise" tags of the factors
#   elsewhere  moved to a device that the memory tracker does not follow
Kind = Literal["gradients", "saved", "tangents", "noise", "shifted", "elsewhere"]


class Observer(Protocol):
    """An object that `observe` accepts; `on_tag` is called for each tagged tensor."""

    def on_tag(self, kind: Kind, tensor: Tensor) -> None: ...


_observers: list[Observer] = []


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Call `observer.on_tag(kind, tensor)` for each tagged tensor inside the context."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def tag(kind: Kind, tensor: Tensor) -> Tensor:
    """Call `on_tag(kind, tensor)` of all active observers. Return the tensor unchanged."""
    for observer in _observers:
        observer.on_tag(kind, tensor)
    return tensor


def is_observed() -> bool:
    """Return whether an observer is active."""
    return bool(_observers)


_weights: list[int] = [1]  # a stack; `counted` pushes and pops


@contextmanager
def counted(times: int) -> Iterator[None]:
    """Inside the context, each operator counts as `times` operators. Its memory counts once."""
    _weights.append(_weights[-1] * times)
    try:
        yield
    finally:
        _weights.pop()


def times_counted() -> int:
    """Return how many times the operators that run now count: 1 outside of `counted`."""
    return _weights[-1]


_running_again: list[nn.Module] = []


@contextmanager
def runs_again(module: nn.Module | None) -> Iterator[None]:
    """Inside the context, `module` runs again in a backward pass, without its hooks. None: nothing is recorded."""
    if module is None:
        yield
        return
    _running_again.append(module)
    try:
        yield
    finally:
        _running_again.pop()


def running_again() -> nn.Module | None:
    """Return the innermost module that runs again in a backward pass, or None."""
    return _running_again[-1] if _running_again else None
