"""Tag tensors by purpose, such as "gradients", for the memory tracker and the FLOP counter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

from torch import Tensor

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
