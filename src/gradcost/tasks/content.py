"""A hash of the data of a loader, which is the same in every process that has the same data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset

from gradcost.core.batching.batches import length_of
from gradcost.core.bits import raw_bytes
from gradcost.core.errors import BadInput
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.pytree import leaves

EXAMPLES = 64  # of a data set with random access, evenly spaced
BATCHES = 8  # of a list of batches, evenly spaced


def stamp(loader: Iterable[Any]) -> str:
    """Return 8 hexadecimal digits: a hash of the loader's length and of a sample of its data.

    - DataLoader of a data set with random access: 64 examples, the batch size, the names of the samplers and of
      `collate_fn`, and the weights or indices of a sampler of torch.
    - List: 8 batches.
    - Any other iterable: the first batch.

    Args:
        loader: can be iterated several times.
    Raises:
        BadInput: the loader yields no batch.
    """
    digest = blake2b(digest_size=4)
    with seeded_generators(Key(0).fold("stamp")):
        for sample in _sample(loader):
            for leaf in leaves(sample):
                digest.update(_bytes(leaf))
    return digest.hexdigest()


def _sample(loader: Any) -> Iterable[Any]:
    """Yield the settings and the part of the data that identify a loader."""
    if isinstance(loader, Sequence):
        return [len(loader), *(loader[i] for i in _spaced(len(loader), BATCHES))]
    dataset: Any = getattr(loader, "dataset", None)
    is_stream = isinstance(dataset, IterableDataset)
    if not is_stream and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        settings = [len(dataset), getattr(loader, "batch_size", None), getattr(loader, "drop_last", None)]
        return [*settings, *_rules(loader), *(dataset[i] for i in _spaced(len(dataset), EXAMPLES))]
    for batch in loader:
        return [length_of(loader), batch]
    raise BadInput(f"the {type(loader).__name__} yields no batch.")


def _rules(loader: Any) -> Iterator[Any]:
    """Yield what determines which examples of its data set a DataLoader puts into a batch, and how."""
    for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        yield type(sampler).__qualname__
        if type(sampler).__module__.startswith("torch."):  # a sampler of the user may change its own at any time
            yield [x for name, x in vars(sampler).items() if name != "data_source" and isinstance(x, Tensor | list)]
    collate = getattr(loader, "collate_fn", None)
    yield getattr(collate, "__qualname__", type(collate).__qualname__)


def _spaced(length: int, count: int) -> list[int]:
    return sorted({i * length // count for i in range(count)}) if length else []


def _bytes(leaf: Any) -> bytes:
    if isinstance(leaf, Tensor):
        return f"{leaf.dtype}{tuple(leaf.shape)}".encode() + raw_bytes(leaf)
    if hasattr(leaf, "tobytes") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes()
    text = repr(leaf)
    return type(leaf).__name__.encode() if " at 0x" in text else text.encode()
