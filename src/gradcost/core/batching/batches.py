"""The batches of a loader by the number of the step, in an order that a key determines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gradcost.core.errors import BadInput
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key


class Batches:
    """The batches of a loader, epoch after epoch. Each is drawn under a key, so the same step gives the same batch.

    - Around each draw, the default generators of torch, NumPy and `random` are set from the key, and restored
      afterwards. So a DataLoader with `shuffle=True` shuffles as the key says, in each epoch in another order.
    - A list or tuple of batches keeps its order.
    - Steps are cheap in ascending order. A smaller step, another key, or a step of a later epoch than the next one
      starts the loader again, if its length is known at the epoch of that step.

    Args:
        loader: a DataLoader, a list of batches, or another iterable that can be iterated several times.
    Raises:
        BadInput: `loader` cannot be iterated several times; later, when it yields no batch.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        require_loader(loader, "the loader")
        self.loader = loader
        self._key: Key | None = None
        self._next = 0  # the number of the step that the iterator yields next
        self._iterator: Iterator[Any] = iter(())
        self._last: Any = None  # the batch of step `_next` - 1: the first step reads its batch twice

    def at(self, key: Key, step: int) -> Any:
        """Return the batch of one step.

        Args:
            key: the source of the order and of random augmentations.
            step: the number of the step, from 0.
        """
        if step < 0:
            raise BadInput(f"step must be 0 or more, not {step}: steps count from 0.")
        if isinstance(self.loader, Sequence):
            if not len(self.loader):
                raise _empty(self.loader)
            return self.loader[step % len(self.loader)]
        if key != self._key or step < self._next - 1 or (step > self._next and self._epoch_start(step) > self._next):
            self._restart(key, step)
        while self._next <= step:
            self._last = self._draw()
        return self._last

    def _epoch_start(self, step: int) -> int:
        """Return the first step of the epoch of `step` if the length of an epoch is known, otherwise 0."""
        length = length_of(self.loader)
        return step - step % length if length else 0

    def _restart(self, key: Key, step: int) -> None:
        self._key, self._iterator, self._next = key, iter(()), self._epoch_start(step)

    def _draw(self) -> Any:
        assert self._key is not None
        with seeded_generators(self._key.fold("batch", self._next)):
            try:
                batch = next(self._iterator)
            except StopIteration:
                self._iterator = iter(self.loader)
                batch = next(self._iterator, _END)
        if batch is _END:
            raise _empty(self.loader)
        self._next += 1
        return batch


_END = object()


def length_of(loader: Any) -> int | None:
    """Return the number of batches of a loader; None if it does not know it, as for an `IterableDataset`."""
    try:
        return len(loader)
    except TypeError:
        return None


def require_loader(loader: Any, name: str) -> None:
    """Check that an object can be iterated several times; `name` appears in the message.

    Raises:
        BadInput: it is not iterable, or is an iterator, which can be read only once.
    """
    if isinstance(loader, Iterator):
        raise BadInput(
            f"{name} is a {type(loader).__name__}, which can be read only once: give a DataLoader or a list of "
            "batches."
        )
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise BadInput(
            f"{name} is of type {type(loader).__name__}, which yields no batches: give a DataLoader or a list of "
            "batches."
        )


def _empty(loader: Any) -> BadInput:
    return BadInput(
        f"the {type(loader).__name__} yields no batch: its data set is empty, or is smaller than one batch with "
        "drop_last=True."
    )
