"""A run of modules that keeps only its input, and runs again when the backward pass needs its saved tensors."""

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

from gradcost.checkpointing.optimal import Items, schedule_length
from gradcost.core import memory_events
from gradcost.core.isolation import restored_generators
from gradcost.core.pytree import tensors

Forward = Callable[..., Any]


class _HeldTensor:
    """A tensor with the version it had. Detached: its graph could reference the holder (a reference cycle)."""

    def __init__(self, tensor: Tensor) -> None:
        self.requires_grad = tensor.requires_grad
        self.tensor = tensor.detach() if self.requires_grad else tensor
        self.version = 0 if tensor.is_inference() else tensor._version

    def read(self) -> Tensor:
        if not self.tensor.is_inference() and self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)}, an input of a block or saved by it, was changed in "
                "place before the backward pass, so the block cannot be recomputed. Use Everything()."
            )
        return self.tensor

    def leaf(self) -> Tensor:
        """Return an autograd leaf to run a block on; it requires a gradient if the tensor did."""
        return self.read().detach().requires_grad_() if self.requires_grad else self.read()


class _PreviousOutput:
    """A placeholder in the arguments of a call: the n-th tensor of the previous call's output."""

    def __init__(self, index: int) -> None:
        self.index = index


@dataclass
class _Call:
    """One forward of a module inside a region."""

    forward: Forward
    arguments: Any  # (args, kwargs); tensors are _HeldTensor, those of the previous call's output _PreviousOutput
    first: int  # index of the first value this call saves
    saved: list[int | None] = field(default_factory=list)  # index of each value it saves; None: held anyway

    def previous(self) -> set[int]:
        return {leaf.index for leaf in pytree.tree_leaves(self.arguments) if isinstance(leaf, _PreviousOutput)}


@dataclass
class _RecomputeUnit:
    """Calls `start` to `stop` of a region. They run again under `items` when one of their values is needed."""

    start: int
    stop: int
    items: Items
    inputs: list[_HeldTensor | None]  # the tensors of the previous call's output that the first call uses
    random: list[Tensor]  # states of the generators


class Region:
    """A run of modules whose saved tensors are dropped, and recomputed when the backward pass needs the first.

    The graph of the first forward pass holds their indices. A unit that runs again records some of its calls, and
    `values` holds what they save until the backward pass takes it. Its other calls become smaller units in `pending`,
    of which only the input is kept. They run again when the backward pass reaches them.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = devices
        self.items: Items = ()  # the schedule, in calls; empty if the chain broke inside the region
        self.calls: list[_Call] = []
        self.outputs: list[weakref.ref[Tensor]] = []
        self.held: set[int] = set()  # storages that stay in memory anyway: parameters and the region's inputs
        self.value_count = 0
        self.values: dict[int, Tensor] = {}
        self.pending: list[_RecomputeUnit] = []
        with restored_generators(devices) as generators:
            self.random = [generator.get_state() for generator in generators]
        self.autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]

    def continues(self, args: Any, kwargs: Any) -> bool:
        """Return True if these arguments contain an output of the last module that ran."""
        outputs = {id(output()) for output in self.outputs if output() is not None}
        return any(id(tensor) in outputs for tensor in tensors((args, kwargs)))

    def forward(self, forward: Forward, args: Any, kwargs: Any) -> Any:
        call = _Call(forward, self._packed_arguments(args, kwargs), self.value_count)
        self.calls.append(call)
        owner = getattr(forward, "__self__", None)
        if isinstance(owner, nn.Module):
            self.held.update(_storage(parameter) for parameter in owner.parameters())

        def pack(tensor: Tensor) -> _HeldTensor | int:
            if _storage(tensor) in self.held:
                call.saved.append(None)
                return _HeldTensor(tensor)
            call.saved.append(self.value_count)
            self.value_count += 1
            return self.value_count - 1

        with saved_tensors_hooks(pack, self.unpack):
            out = forward(*args, **kwargs)
        self.outputs = [weakref.ref(tensor) for tensor in tensors(out)]
        return out

    def _packed_arguments(self, args: Any, kwargs: Any) -> Any:
        positions = {id(output()): i for i, output in enumerate(self.outputs) if output() is not None}
        packed: dict[int, _HeldTensor] = {}  # a module may test whether two of its arguments are one object

        def pack(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) in positions:
                return _PreviousOutput(positions[id(leaf)])
            self.held.add(_storage(leaf))
            if isinstance(leaf, nn.Parameter):
                return leaf
            if id(leaf) not in packed:
                packed[id(leaf)] = _HeldTensor(memory_events.tag("saved", leaf))
            return packed[id(leaf)]

        return pytree.tree_map(pack, (args, kwargs))

    def unpack(self, packed: _HeldTensor | int) -> Tensor:
        if isinstance(packed, _HeldTensor):
            return packed.read()
        while packed not in self.values:  # repeats if the value belongs to a unit that the rerun leaves pending
            self._run_again(self._unit_of(packed))
        return self.values.pop(packed)

    def _unit_of(self, index: int) -> _RecomputeUnit:
        """Return the smallest unit that computes this value. The whole region can run again any number of times."""
        call = bisect_right(self.calls, index, key=lambda call: call.first) - 1
        for number in reversed(range(len(self.pending))):
            if self.pending[number].start <= call < self.pending[number].stop:
                return self.pending.pop(number)
        return _RecomputeUnit(0, len(self.calls), self.items or (len(self.calls),), [], self.random)

    def _run_again(self, unit: _RecomputeUnit) -> None:
        end = self._first(unit.stop)

        def store(index: int, tensor: Tensor) -> None:
            self.values[index] = memory_events.tag("saved", tensor.detach())
            if index == end - 1:
                raise _Complete

        with restored_generators(self.devices) as generators, torch.enable_grad(), self._cast(0), self._cast(1):
            for generator, state in zip(generators, unit.random, strict=True):
                generator.set_state(state)
            start, previous = unit.start, unit.inputs
            try:
                for item in _with_last_region_expanded(unit.items):
                    stop = start + schedule_length(item)
                    if isinstance(item, int):
                        self._run(start, stop, previous, store)
                    else:
                        if self._first(start) < self._first(stop):
                            random = [generator.get_state() for generator in generators]
                            self.pending.append(_RecomputeUnit(start, stop, item, list(previous), random))
                        self._run(start, stop, previous, _discard)
                    start = stop
            except _Complete:
                pass

    def _first(self, call: int) -> int:
        """Return the index of the first value that this call, or one after it, saves."""
        return self.calls[call].first if call < len(self.calls) else self.value_count

    def _run(
        self, start: int, stop: int, previous: list[_HeldTensor | None], store: Callable[[int, Tensor], None]
    ) -> None:
        """Run calls `start` to `stop` again. `previous` holds their input, and afterwards the input of the next call.

        It is empty meanwhile, so nothing here extends the life of its tensors. Gradients are on also where nothing is
        stored: without them other kernels may run, with other last bits.
        """
        leaves = [None if held is None else held.leaf() for held in previous]
        previous.clear()
        for at in range(start, stop):
            call = self.calls[at]
            args, kwargs = _unpacked_arguments(call, leaves)
            expected = iter(call.saved)
            with saved_tensors_hooks(partial(_pack_again, expected, store), _refuse_backward):
                out = call.forward(*args, **kwargs)
            if next(expected, _END) is not _END:
                raise RuntimeError(_FORWARD_DIFFERS)
            used = self.calls[at + 1].previous() if at + 1 < len(self.calls) else set()
            leaves = [tensor if i in used else None for i, tensor in enumerate(tensors(out))]
            del args, kwargs, out
        previous += [None if leaf is None else _HeldTensor(memory_events.tag("saved", leaf)) for leaf in leaves]

    def _cast(self, which: int) -> AbstractContextManager[Any]:
        device, enabled, dtype = self.autocast[which]
        # No cache: it would hold the casts of all weights until the last call.
        return torch.autocast(device, dtype=dtype, cache_enabled=False) if enabled else nullcontext()


class _Complete(Exception):
    """Raised when all that the backward pass needs is recomputed: the rest of the unit need not run."""


_END = object()
_FORWARD_DIFFERS = (
    "a block saved another number of tensors when it was recomputed than in its first forward: its forward differs "
    "between calls. Use Everything()."
)


def _with_last_region_expanded(items: Items) -> Items:
    """Return the same calls without a region at the end. The backward pass starts there; it would run twice."""
    while not isinstance(items[-1], int):
        items = items[:-1] + items[-1]  # pyright: ignore[reportOperatorIssue]
    return items


def _unpacked_arguments(call: _Call, leaves: Sequence[Tensor | None]) -> Any:
    """Return the arguments with which a call runs again."""
    unpacked: dict[int, Tensor] = {}

    def unpack(leaf: Any) -> Any:
        if isinstance(leaf, _PreviousOutput):
            return leaves[leaf.index]
        if isinstance(leaf, _HeldTensor):
            if id(leaf) not in unpacked:
                unpacked[id(leaf)] = leaf.leaf()
            return unpacked[id(leaf)]
        return leaf

    return pytree.tree_map(unpack, call.arguments)


def _pack_again(expected: Iterator[int | None], store: Callable[[int, Tensor], None], tensor: Tensor) -> None:
    index = next(expected, _END)
    if index is _END:
        raise RuntimeError(_FORWARD_DIFFERS)
    if isinstance(index, int):
        store(index, tensor)


def _discard(index: int, tensor: Tensor) -> None:
    pass


def _refuse_backward(packed: None) -> Tensor:
    raise AssertionError("the graph of a rerun is not differentiated")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
