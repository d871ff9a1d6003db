"""What a tensor is to the method that made it, told to whoever watches the memory meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

from torch import Tensor

# What a method can say of a tensor; a watcher knows parameters, inputs and the optimizer's state by itself.
# Whatever is computed from a tangent is one; noise is a weight with a direction added, told once a direction, and
# shifted is one to which products of noise were added, whose own numbers were told before.
Kind = Literal["gradients", "saved", "tangents", "noise", "shifted", "elsewhere"]


class Observer(Protocol):
    def on_tag(self, kind: Kind, tensor: Tensor) -> None: ...


_observers: list[Observer] = []


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Within, `watcher.told(kind, tensor)` hears of every tensor that a method tells of."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def tag(kind: Kind, tensor: Tensor) -> Tensor:
    """Say what a tensor is, to nobody unless memory is being measured; gives the tensor back.

    "elsewhere" is what was moved to another device than the one that is watched.
    """
    for observer in _observers:
        observer.on_tag(kind, tensor)
    return tensor
