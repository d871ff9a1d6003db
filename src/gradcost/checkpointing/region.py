"""Regions: consecutive module calls that save only their input and run again in the backward pass."""

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


class _VersionedTensor:
    """A tensor and its version counter at construction."""

    def __init__(self, tensor: Tensor) -> None:
        # Detach: the tensor's graph may refer to this object, which would be a reference cycle.
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
        """Return the tensor as an autograd leaf that requires a gradient if the original tensor did."""
        return self.read().detach().requires_grad_() if self.requires_grad else self.read()


class _PreviousOutput:
    """Placeholder among a call's arguments for tensor number `index` of the previous call's output."""

    def __init__(self, index: int) -> None:
        self.index = index


@dataclass
class _Call:
    """One call of a module inside a region."""

    forward: Forward
    arguments: Any  # (args, kwargs), with _VersionedTensor or _PreviousOutput in place of tensors, except parameters
    first: int  # index of the first value that this call saves
    saved: list[int | None] = field(default_factory=list)  # index of each saved tensor; None: it is in memory anyway

    def used_outputs(self) -> set[int]:
        """Return the indices of the tensors of the previous call's output that this call uses."""
        return {leaf.index for leaf in pytree.tree_leaves(self.arguments) if isinstance(leaf, _PreviousOutput)}


@dataclass
class _RecomputeUnit:
    """Calls start, ..., stop - 1 of a region. They run again when the backward pass needs one of their values."""

    start: int
    stop: int
    items: Items  # the schedule of the next run
    inputs: list[_VersionedTensor | None]  # output tensors of call start - 1; None if call `start` does not use one
    generator_states: list[Tensor]  # before call `start`


class Region:
    """Consecutive module calls. Their saved tensors are dropped and recomputed in the backward pass.

    A dropped saved tensor is a *value*. Autograd saves its index instead. When the backward pass needs a value, its
    unit runs again under the unit's schedule:

    - A recorded call stores its values in `values` until the backward pass takes them.
    - An inner region becomes a smaller unit in `pending`, which saves only the region's input. It runs again when the
      backward pass needs one of its values.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = devices
        self.items: Items = ()  # the schedule, in calls; empty: record all calls in one rerun
        self.calls: list[_Call] = []
        self.outputs: list[weakref.ref[Tensor]] = []
        self.resident: set[int] = set()  # storages that are in memory anyway: parameters, tensors from outside
        self.value_count = 0
        self.values: dict[int, Tensor] = {}
        self.pending: list[_RecomputeUnit] = []
        with restored_generators(devices) as generators:
            self.generator_states = [generator.get_state() for generator in generators]
        self.autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]

    def continues(self, args: Any, kwargs: Any) -> bool:
        """Return True if the arguments contain an output of the region's latest call."""
        outputs = {id(output()) for output in self.outputs if output() is not None}
        return any(id(tensor) in outputs for tensor in tensors((args, kwargs)))

    def forward(self, forward: Forward, args: Any, kwargs: Any) -> Any:
        call = _Call(forward, self._packed_arguments(args, kwargs), self.value_count)
        self.calls.append(call)
        owner = getattr(forward, "__self__", None)
        if isinstance(owner, nn.Module):
            self.resident.update(_storage(parameter) for parameter in owner.parameters())

        def pack(tensor: Tensor) -> _VersionedTensor | int:
            if _storage(tensor) in self.resident:
                call.saved.append(None)
                return _VersionedTensor(tensor)
            call.saved.append(self.value_count)
            self.value_count += 1
            return self.value_count - 1

        with saved_tensors_hooks(pack, self.unpack):
            out = forward(*args, **kwargs)
        self.outputs = [weakref.ref(tensor) for tensor in tensors(out)]
        return out

    def _packed_arguments(self, args: Any, kwargs: Any) -> Any:
        positions = {id(output()): i for i, output in enumerate(self.outputs) if output() is not None}
        packed: dict[int, _VersionedTensor] = {}  # by id: a module may test whether two arguments are the same object

        def pack(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) in positions:
                return _PreviousOutput(positions[id(leaf)])
            self.resident.add(_storage(leaf))
            if isinstance(leaf, nn.Parameter):
                return leaf
            if id(leaf) not in packed:
                packed[id(leaf)] = _VersionedTensor(memory_events.tag("saved", leaf))
            return packed[id(leaf)]

        return pytree.tree_map(pack, (args, kwargs))

    def unpack(self, packed: _VersionedTensor | int) -> Tensor:
        if isinstance(packed, _VersionedTensor):
            return packed.read()
        while packed not in self.values:  # repeats while the value is in a smaller, pending unit
            self._run_again(self._unit_of(packed))
        return self.values.pop(packed)

    def _unit_of(self, index: int) -> _RecomputeUnit:
        """Return the smallest pending unit with this value, removed from `pending`; if none, the region as a unit."""
        call = bisect_right(self.calls, index, key=lambda call: call.first) - 1
        for number in reversed(range(len(self.pending))):
            if self.pending[number].start <= call < self.pending[number].stop:
                return self.pending.pop(number)
        # Not stored in `pending`: the region as a unit can run again any number of times.
        return _RecomputeUnit(0, len(self.calls), self.items or (len(self.calls),), [], self.generator_states)

    def _run_again(self, unit: _RecomputeUnit) -> None:
        value_end = self._first_value(unit.stop)

        def store(index: int, tensor: Tensor) -> None:
            self.values[index] = memory_events.tag("saved", tensor.detach())
            if index == value_end - 1:
                raise _Complete

        with restored_generators(self.devices) as generators, torch.enable_grad(), self._cast(0), self._cast(1):
            for generator, state in zip(generators, unit.generator_states, strict=True):
                generator.set_state(state)
            start, previous = unit.start, unit.inputs
            try:
                for item in _with_last_region_expanded(unit.items):
                    stop = start + schedule_length(item)
                    if isinstance(item, int):
                        self._run(start, stop, previous, store)
                    else:
                        if self._first_value(start) < self._first_value(stop):
                            states = [generator.get_state() for generator in generators]
                            self.pending.append(_RecomputeUnit(start, stop, item, list(previous), states))
                        self._run(start, stop, previous, _discard)
                    start = stop
            except _Complete:
                pass

    def _first_value(self, call: int) -> int:
        """Return the index of the first value that this call or a later one saves."""
        return self.calls[call].first if call < len(self.calls) else self.value_count

    def _run(
        self, start: int, stop: int, previous: list[_VersionedTensor | None], store: Callable[[int, Tensor], None]
    ) -> None:
        """Run calls start, ..., stop - 1 again. Replace the tensors in `previous` by the input of call `stop`.

        previous: the input of call `start`. Gradients are on even if `store` discards the values: without gradients
        torch may choose other kernels, with other last bits.
        """
        leaves = [None if tensor is None else tensor.leaf() for tensor in previous]
        previous.clear()  # so that each tensor can be freed after its last use
        for number in range(start, stop):
            call = self.calls[number]
            args, kwargs = _unpacked_arguments(call, leaves)
            expected = iter(call.saved)
            with saved_tensors_hooks(partial(_pack_in_rerun, expected, store), _refuse_backward):
                out = call.forward(*args, **kwargs)
            if next(expected, _END) is not _END:
                raise RuntimeError(_FORWARD_DIFFERS)
            used = self.calls[number + 1].used_outputs() if number + 1 < len(self.calls) else set()
            leaves = [tensor if i in used else None for i, tensor in enumerate(tensors(out))]
            del args, kwargs, out
        previous += [None if leaf is None else _VersionedTensor(memory_events.tag("saved", leaf)) for leaf in leaves]

    def _cast(self, index: int) -> AbstractContextManager[Any]:
        device, enabled, dtype = self.autocast[index]
        # No cache: it would keep the converted copies of all weights until the last call returns.
        return torch.autocast(device, dtype=dtype, cache_enabled=False) if enabled else nullcontext()


class _Complete(Exception):
    """Raised once the last value of a unit is recomputed, to skip the remaining operations."""


_END = object()
_FORWARD_DIFFERS = (
    "a block saved another number of tensors in its recomputation than in its first forward pass, so its forward "
    "differs between calls. Use Everything()."
)


def _with_last_region_expanded(items: Items) -> Items:
    """Replace a region at the end by its items. The backward pass starts there, so the region would run twice."""
    while not isinstance(items[-1], int):
        items = items[:-1] + items[-1]  # pyright: ignore[reportOperatorIssue]
    return items


def _unpacked_arguments(call: _Call, leaves: Sequence[Tensor | None]) -> Any:
    """Return (args, kwargs) for the rerun of a call. leaves: the tensors of the previous call's output."""
    unpacked: dict[int, Tensor] = {}

    def unpack(leaf: Any) -> Any:
        if isinstance(leaf, _PreviousOutput):
            return leaves[leaf.index]
        if isinstance(leaf, _VersionedTensor):
            if id(leaf) not in unpacked:
                unpacked[id(leaf)] = leaf.leaf()
            return unpacked[id(leaf)]
        return leaf

    return pytree.tree_map(unpack, call.arguments)


def _pack_in_rerun(expected: Iterator[int | None], store: Callable[[int, Tensor], None], tensor: Tensor) -> None:
    """Call `store(index, tensor)` for a tensor saved in a rerun. expected: the rest of `_Call.saved`."""
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
