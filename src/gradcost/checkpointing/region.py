"""A run of modules that keeps its input alone, and runs again when the backward asks for what it saved."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from gradcost.core import memory_events
from gradcost.core.isolation import restored_generators
from gradcost.core.pytree import tensors

# A nested schedule: each item a number of calls (or blocks) that are recorded: all they save is kept, or a tuple
# of items: a region, whose input alone is kept and which is run again under these items.
Items = tuple[Any, ...]
Forward = Callable[..., Any]


def count(items: Items) -> int:
    """How many calls, or blocks, a schedule is for."""
    return sum(item if isinstance(item, int) else count(item) for item in items)


class _Kept:
    """A tensor as it was when it was kept, without the graph that made it: that may lead back to who keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.wanted = tensor.requires_grad
        self.tensor = tensor.detach() if self.wanted else tensor
        self.version = 0 if tensor.is_inference() else tensor._version

    def read(self) -> Tensor:
        if not self.tensor.is_inference() and self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that a block was given, or saved, was changed in "
                "place before the backward, so the block cannot be computed again. Use Everything()."
            )
        return self.tensor

    def leaf(self) -> Tensor:
        """To run a block on: it requires a gradient if the tensor did."""
        return self.read().detach().requires_grad_() if self.wanted else self.read()


class _Previous:
    """Stands for the n-th tensor of the previous call's output in the arguments of the next."""

    def __init__(self, index: int) -> None:
        self.index = index


@dataclass
class _Call:
    """One forward of a module within a region."""

    forward: Forward
    arguments: Any  # (args, kwargs), with a _Kept for a tensor and a _Previous for one that the last call made
    first: int  # the index that a value gets which it is the first to save
    saved: list[int | None] = field(default_factory=list)  # of each tensor that it saves; None: it is kept anyway

    def previous(self) -> set[int]:
        return {leaf.index for leaf in pytree.tree_leaves(self.arguments) if isinstance(leaf, _Previous)}


@dataclass
class _Part:
    """Calls `start` to `stop` of a region, to be run again under `items` when a value of theirs is asked for."""

    start: int
    stop: int
    items: Items
    inputs: list[_Kept | None]  # of the output of the call before: what the first call wants of it
    random: list[Tensor]


class Region:
    """A run of modules whose saved tensors are dropped, and made again when the backward asks for the first.

    The graph of the first forward holds their numbers. A part that runs again records some of its calls (their
    values lie in `values` until they are asked for) and leaves others `pending`: smaller parts, of which it
    keeps the input. They run again in their turn, as the backward reaches them.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = devices
        self.items: Items = ()  # of calls; none for a region that is not all that it was planned to be
        self.calls: list[_Call] = []
        self.outputs: list[weakref.ref[Tensor]] = []
        self.kept: set[int] = set()  # storages that stay alive anyway: parameters and the region's inputs
        self.count = 0
        self.values: dict[int, Tensor] = {}
        self.pending: list[_Part] = []
        with restored_generators(devices) as generators:
            self.random = [generator.get_state() for generator in generators]
        self.autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]

    def continues(self, args: Any, kwargs: Any) -> bool:
        """Whether these arguments hold the output of the last module that ran."""
        outputs = {id(output()) for output in self.outputs if output() is not None}
        return any(id(tensor) in outputs for tensor in tensors((args, kwargs)))

    def forward(self, forward: Forward, args: Any, kwargs: Any) -> Any:
        call = _Call(forward, self._recorded(args, kwargs), self.count)
        self.calls.append(call)
        owner = getattr(forward, "__self__", None)
        if isinstance(owner, nn.Module):
            self.kept.update(_storage(parameter) for parameter in owner.parameters())

        def pack(tensor: Tensor) -> _Kept | int:
            if _storage(tensor) in self.kept:
                call.saved.append(None)
                return _Kept(tensor)
            call.saved.append(self.count)
            self.count += 1
            return self.count - 1

        with saved_tensors_hooks(pack, self.unpack):
            out = forward(*args, **kwargs)
        self.outputs = [weakref.ref(tensor) for tensor in tensors(out)]
        return out

    def _recorded(self, args: Any, kwargs: Any) -> Any:
        positions = {id(output()): i for i, output in enumerate(self.outputs) if output() is not None}
        seen: dict[int, _Kept] = {}  # a module may ask whether two of its arguments are one

        def record(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) in positions:
                return _Previous(positions[id(leaf)])
            self.kept.add(_storage(leaf))
            if isinstance(leaf, nn.Parameter):
                return leaf
            if id(leaf) not in seen:
                seen[id(leaf)] = _Kept(memory_events.tag("saved", leaf))
            return seen[id(leaf)]

        return pytree.tree_map(record, (args, kwargs))

    def unpack(self, packed: _Kept | int) -> Tensor:
        if isinstance(packed, _Kept):
            return packed.read()
        while packed not in self.values:  # again where all of it lies in a part that the first leaves pending
            self._run_again(self._part_of(packed))
        return self.values.pop(packed)

    def _part_of(self, index: int) -> _Part:
        """The smallest part that makes this value. The whole can be made again as often as it is asked for."""
        at = bisect_right(self.calls, index, key=lambda call: call.first) - 1
        for number in reversed(range(len(self.pending))):
            if self.pending[number].start <= at < self.pending[number].stop:
                return self.pending.pop(number)
        return _Part(0, len(self.calls), self.items or (len(self.calls),), [], self.random)

    def _run_again(self, part: _Part) -> None:
        end = self._first(part.stop)

        def store(index: int, tensor: Tensor) -> None:
            self.values[index] = memory_events.tag("saved", tensor.detach())
            if index == end - 1:
                raise _Complete

        with restored_generators(self.devices) as generators, torch.enable_grad(), self._cast(0), self._cast(1):
            for generator, state in zip(generators, part.random, strict=True):
                generator.set_state(state)
            start, previous = part.start, part.inputs
            try:
                for item in _opened(part.items):
                    stop = start + (item if isinstance(item, int) else count(item))
                    if isinstance(item, int):
                        self._run(start, stop, previous, store)
                    else:
                        if self._first(start) < self._first(stop):
                            random = [generator.get_state() for generator in generators]
                            self.pending.append(_Part(start, stop, item, list(previous), random))
                        self._run(start, stop, previous, _drop)
                    start = stop
            except _Complete:
                pass

    def _first(self, call: int) -> int:
        """The number of the first value that this call, or one after it, saves."""
        return self.calls[call].first if call < len(self.calls) else self.count

    def _run(self, start: int, stop: int, previous: list[_Kept | None], store: Callable[[int, Tensor], None]) -> None:
        """Calls `start` to `stop` once more. `previous` holds their input, and afterwards that of the call after
        them: what is in it is not held meanwhile by anyone here.

        Gradients are on also where nothing is stored: other kernels, with other last bits, may run without.
        """
        leaves = [None if kept is None else kept.leaf() for kept in previous]
        previous.clear()
        for at in range(start, stop):
            call = self.calls[at]
            args, kwargs = _restored(call, leaves)
            expected = iter(call.saved)
            with saved_tensors_hooks(partial(_pack_again, expected, store), _never):
                out = call.forward(*args, **kwargs)
            if next(expected, _END) is not _END:
                raise RuntimeError(_NOT_THE_SAME)
            wanted = self.calls[at + 1].previous() if at + 1 < len(self.calls) else set()
            leaves = [tensor if i in wanted else None for i, tensor in enumerate(tensors(out))]
            del args, kwargs, out
        previous += [None if leaf is None else _Kept(memory_events.tag("saved", leaf)) for leaf in leaves]

    def _cast(self, which: int) -> AbstractContextManager[Any]:
        device, enabled, dtype = self.autocast[which]
        # Without its cache: that would hold the casts of all the weights until the last call has run.
        return torch.autocast(device, dtype=dtype, cache_enabled=False) if enabled else nullcontext()


class _Complete(Exception):
    """All that the backward needs has been computed again: the rest of the part need not run."""


_END = object()
_NOT_THE_SAME = (
    "a block did not save as many tensors when it was computed again as in its forward: its forward is not the same "
    "twice. Use Everything()."
)


def _opened(items: Items) -> Items:
    """The same calls without a region at the end: the backward comes from there, so it would run twice at once."""
    while not isinstance(items[-1], int):
        items = items[:-1] + items[-1]
    return items


def _restored(call: _Call, leaves: Sequence[Tensor | None]) -> Any:
    """The arguments of a call that is run again."""
    made: dict[int, Tensor] = {}

    def restore(leaf: Any) -> Any:
        if isinstance(leaf, _Previous):
            return leaves[leaf.index]
        if isinstance(leaf, _Kept):
            if id(leaf) not in made:
                made[id(leaf)] = leaf.leaf()
            return made[id(leaf)]
        return leaf

    return pytree.tree_map(restore, call.arguments)


def _pack_again(expected: Iterator[int | None], store: Callable[[int, Tensor], None], tensor: Tensor) -> None:
    index = next(expected, _END)
    if index is _END:
        raise RuntimeError(_NOT_THE_SAME)
    if isinstance(index, int):
        store(index, tensor)


def _drop(index: int, tensor: Tensor) -> None:
    pass


def _never(packed: None) -> Tensor:
    raise AssertionError("the graph of a second run is not differentiated")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
