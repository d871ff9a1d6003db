"""Tags tensors by purpose for the memory tracker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

from torch import Tensor

# The purposes that a method tags. The memory tracker finds parameters, inputs and optimizer state by itself.
#   tangents   anything computed from a tangent
#   noise      a weight plus a direction, tagged once per direction: new random numbers
#   shifted    a weight plus products of noise whose random numbers are tagged already
#   elsewhere  moved to a device other than the tracked one
Kind = Literal["gradients", "saved", "tangents", "noise", "shifted", "elsewhere"]


class Observer(Protocol):
    """Receives each tag inside `observe`."""

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
    """Pass a tensor's purpose to the observers, if there are any; return the tensor."""
    for observer in _observers:
        observer.on_tag(kind, tensor)
    return tensor
