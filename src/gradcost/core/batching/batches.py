"""The batches of a loader by the number of the step, in an order that a key determines."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from gradcost.core.errors import BadInput
from gradcost.core.evaluation.mutable_state import Traversal
from gradcost.core.isolation import seeded_generators, seeded_objects
from gradcost.core.key import Key


class Batches:
    """The batches of a loader, epoch after epoch. Each is drawn under a key, so the same step gives the same batch.

    - Around each draw, the default generators of torch, NumPy and `random` are set from the key, and restored
      afterwards. So are the generators that the loader, its samplers, its data set and their functions refer to. So a
      DataLoader with `shuffle=True` shuffles as the key says, in each epoch in another order.
    - A list or tuple of batches keeps its order.
    - Other state that determines batches is not set from the key: a counter in a sampler, or a generator of a worker
      process that serves several epochs (`persistent_workers=True`).
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
        self._generators: list[Any] = []  # that the loader refers to
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
            if isinstance(self.loader, list | tuple):
                return self.loader[step % len(self.loader)]
            if key != self._key:
                self._restart(key, step)
            with self._seeded(step):
                return self.loader[step % len(self.loader)]
        if key != self._key or step < self._next - 1 or (step > self._next and self._epoch_start(step) > self._next):
            self._restart(key, step)
        while self._next <= step:
            self._last = self._draw()
        return self._last

    def once(self, key: Key) -> Iterator[Any]:
        """Yield the batches of one pass over the loader. Passes with one key are equal; `at` is not affected.

        Args:
            key: the source of the order and of random augmentations.
        """
        batches, iterator = Batches(self.loader), None
        batches._restart(key, 0)
        for number in itertools.count():
            with batches._seeded(number):
                iterator = iter(self.loader) if iterator is None else iterator
                batch = next(iterator, _END)
            if batch is _END:
                return
            yield batch

    def _epoch_start(self, step: int) -> int:
        """Return the first step of the epoch of `step` if the length of an epoch is known, otherwise 0."""
        length = length_of(self.loader)
        return step - step % length if length else 0

    def _restart(self, key: Key, step: int) -> None:
        self._key, self._iterator, self._next = key, iter(()), self._epoch_start(step)
        self._generators = _generators_of(self.loader)

    @contextmanager
    def _seeded(self, step: int) -> Iterator[None]:
        """Seed all generators that may determine the batch of a step; restore them afterwards."""
        assert self._key is not None
        key = self._key.fold("batch", step)
        with seeded_generators(key), seeded_objects(key, self._generators):
            yield

    def _draw(self) -> Any:
        with self._seeded(self._next):
            batch = next(self._iterator, _END)
        if batch is _END:
            with self._seeded(self._next):  # again: a sampler may draw at the end of its epoch
                self._iterator = iter(self.loader)
                batch = next(self._iterator, _END)
        if batch is _END:
            raise _empty(self.loader)
        self._next += 1
        return batch


_END = object()
_MOST_ITEMS = 1000  # lists of more are paths or examples, and contain no generator


def _generators_of(loader: Any) -> list[Any]:
    """Return the random generators of torch, NumPy and `random` that a loader refers to."""
    traversal = Traversal(follow_functions=True, entered=(DataLoader, Dataset, Sampler), most_items=_MOST_ITEMS)
    traversal.visit("", loader)
    return [generator for _, generator in traversal.generators]


def length_of(loader: Any) -> int | None:
    """Return the number of batches of a loader; None if it is not known.

    It is never known for a DataLoader of an `IterableDataset`: the length of such a data set is a hint in torch, and
    the loader yields more or fewer batches.
    """
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return None
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
