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


class Watcher(Protocol):
    def told(self, kind: Kind, tensor: Tensor) -> None: ...


_watchers: list[Watcher] = []


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Within, `watcher.told(kind, tensor)` hears of every tensor that a method tells of."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def tell(kind: Kind, tensor: Tensor) -> Tensor:
    """Say what a tensor is, to nobody unless memory is being measured; gives the tensor back.

    "elsewhere" is what was moved to another device than the one that is watched.
    """
    for watcher in _watchers:
        watcher.told(kind, tensor)
    return tensor
