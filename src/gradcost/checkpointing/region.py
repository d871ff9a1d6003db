"""Regions: consecutive module calls that save only their input and run again in the backward pass."""

from __future__ import annotations

import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks

from gradcost.checkpointing.call_state import BlockModules, CallState, Generators
from gradcost.checkpointing.containers import packed, tensors_in, unpacked
from gradcost.checkpointing.kept_outputs import KeptOutputs
from gradcost.checkpointing.schedules import Items, parts_of, schedule_length, with_last_region_expanded
from gradcost.checkpointing.versioned_tensor import RecomputationError, VersionedTensor
from gradcost.checkpointing.weight_versions import WeightVersions
from gradcost.core import memory_events
from gradcost.core.evaluation.saved_state import version_of

Forward = Callable[..., Any]


class _PreviousOutput:
    """Placeholder among a call's arguments for tensor number `index` of the previous call's output."""

    def __init__(self, index: int) -> None:
        self.index = index


@dataclass
class Call:
    """One call of a module inside a region."""

    forward: Forward
    arguments: Any  # (args, kwargs), with VersionedTensor or _PreviousOutput in place of tensors, except parameters
    used: set[int]  # indices of the previous call's output tensors that are arguments of this call
    state: CallState  # before the call
    to_end: bool  # False: a rerun that ends with this call stops once it has recomputed the last saved tensor
    first: int  # index of the first value that this call saves
    kept: KeptOutputs | None  # outputs of operators that a rerun reuses
    owner: nn.Module | None  # the module
    weights: WeightVersions | None  # before the call; None: not checked
    saved: list[int | None] = field(default_factory=list)  # per saved tensor: index of its value; None: not dropped


@dataclass
class _RecomputeUnit:
    """Values of calls start, ..., stop - 1 of a region. The calls run again when the backward pass needs a value."""

    start: int
    stop: int
    values: range  # the indices of the values
    items: Items  # the schedule of the next run, a nested tuple (`checkpointing.schedules`)
    inputs: list[VersionedTensor | None]  # output tensors of call start - 1; None: call `start` does not use it


class Region:
    """Consecutive module calls. Their saved tensors are dropped and recomputed in the backward pass.

    A dropped saved tensor is a *value*. Autograd saves the value's index instead. A *unit* is a range of calls that
    run again together; at first the region is one unit. When the backward pass needs a value, the unit with this
    value runs again under the unit's schedule (`checkpointing.schedules`). A schedule has two kinds of items:

    - An int n: the next n calls are *recorded*. Their values go to `values`, until the backward pass takes them.
    - A tuple: the next calls are an *inner region*. They run, and their values are discarded again. The inner region
      becomes a smaller unit in `pending` that keeps only its input. It runs again when the backward pass needs one of
      its values.

    Zeros before a last int n divide the values of the last n calls into parts of nearly equal bytes. The last part is
    recorded. Each other part becomes a unit in `pending`.
    """

    def __init__(
        self,
        generators: Generators,
        before_rerun: Callable[[], None] = lambda: None,
        is_tagged: bool = True,
        has_parts: bool = False,
        checks_weights: bool = False,
    ) -> None:
        self.generators = generators
        self.tag = memory_events.tag if is_tagged else _untagged  # marks a tensor as "saved" for memory trackers
        self.before_rerun = before_rerun
        self.on_value: Callable[[Tensor], None] | None = None  # called with each value that a call saves
        self.checks_weights = checks_weights  # whether other code may change the weights before the backward pass
        self.items: Items = ()  # the schedule, in calls; empty: record all calls in one rerun
        self.calls: list[Call] = []
        self.outputs: list[tuple[weakref.ref[Tensor], int]] = []  # of the latest call: (tensor, its version)
        self.resident: set[int] = set()  # storages of parameters and of tensors made outside: never dropped
        self.value_count = 0
        self.value_bytes: list[int] | None = [] if has_parts else None  # of each value (`_new_bytes`)
        self.values: dict[int, Tensor] = {}
        self.pending: list[_RecomputeUnit] = []

    def continues(self, args: Any, kwargs: Any) -> bool:
        """Return True if the arguments contain an output of the region's latest call."""
        positions = self._positions()
        return any(id(tensor) in positions for tensor in tensors_in((args, kwargs)))

    def _positions(self) -> dict[int, int]:
        """Map the id of each output tensor of the latest call to its index; omit tensors changed in place since."""
        outputs = [(i, output(), version) for i, (output, version) in enumerate(self.outputs)]
        return {id(o): i for i, o, version in outputs if o is not None and version_of(o) == version}

    def forward(
        self, forward: Forward, args: Any, kwargs: Any, block: BlockModules, kept: KeptOutputs | None = None
    ) -> Any:
        """Return `forward(*args, **kwargs)`, recorded as the region's next call.

        Args:
            forward: the function.
            args: its positional arguments.
            kwargs: its keyword arguments.
            block: the modules whose state `forward` reads.
            kept: stores the outputs of some operators for the rerun. None: no outputs are stored.
        """
        arguments, used = self._packed_arguments(args, kwargs)
        state = CallState(self.generators, block)
        weights = WeightVersions(block) if self.checks_weights else None
        call = Call(forward, arguments, used, state, block.to_end, self.value_count, kept, block.owner, weights)
        self.calls.append(call)
        for module in block.modules:
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.resident.add(_storage(parameter))

        seen: weakref.WeakValueDictionary[int, UntypedStorage] = weakref.WeakValueDictionary()

        def pack(tensor: Tensor) -> VersionedTensor | int:
            if _storage(tensor) in self.resident:
                call.saved.append(None)
                return VersionedTensor(tensor)
            if self.on_value is not None:
                self.on_value(tensor)
            if self.value_bytes is not None:
                self.value_bytes.append(_new_bytes(tensor, seen))
            call.saved.append(self.value_count)
            self.value_count += 1
            return self.value_count - 1

        with saved_tensors_hooks(pack, self.unpack), _NOTHING if kept is None else kept.recorded():
            out = forward(*args, **kwargs)
        if weights is not None:
            weights.forget_changed()
        self.outputs = [(weakref.ref(tensor), version_of(tensor)) for tensor in tensors_in(out)]
        return out

    def _packed_arguments(self, args: Any, kwargs: Any) -> tuple[Any, set[int]]:
        positions = self._positions()
        # By id, so that a tensor that is passed twice is one tensor object in the rerun too.
        versioned: dict[int, VersionedTensor] = {}
        used: set[int] = set()

        def pack(tensor: Tensor) -> Any:
            if id(tensor) in positions:
                used.add(positions[id(tensor)])
                return _PreviousOutput(positions[id(tensor)])
            self.resident.add(_storage(tensor))
            if isinstance(tensor, nn.Parameter):
                return tensor
            if id(tensor) not in versioned:
                versioned[id(tensor)] = VersionedTensor(self.tag("saved", tensor))
            return versioned[id(tensor)]

        return packed((args, kwargs), pack), used

    def unpack(self, saved: VersionedTensor | int) -> Tensor:
        if isinstance(saved, VersionedTensor):
            return saved.read()
        while saved not in self.values:  # repeats while the value is in a smaller, pending unit
            self._run_again(self._unit_of(saved))
        return self.values.pop(saved)

    def _unit_of(self, index: int) -> _RecomputeUnit:
        """Remove and return the smallest pending unit with this value. Without one, return a unit of all calls."""
        for number in reversed(range(len(self.pending))):
            if index in self.pending[number].values:
                return self.pending.pop(number)
        # Not stored in `pending`: the region as a unit can run again any number of times.
        count = len(self.calls)
        return _RecomputeUnit(0, count, range(self.value_count), self.items or (count,), [])

    def _call_number(self, index: int) -> int:
        """Return the number of the call that saves value `index`."""
        return bisect_right(self.calls, index, key=lambda call: call.first) - 1

    def _run_again(self, unit: _RecomputeUnit) -> None:
        items = with_last_region_expanded(unit.items)
        first_of_last = unit.stop - schedule_length(items[-1])  # the first call of the last item
        *later, now = self.parts(range(self._first_value(first_of_last), unit.values.stop), parts_of(items))

        def store(index: int, tensor: Tensor) -> None:
            if index not in unit.values or any(index in part for part in later):
                return
            self.values[index] = self.tag("saved", tensor.detach())
            if index == now[-1] and not self.calls[self._call_number(index)].to_end:
                raise _Complete

        self.before_rerun()
        with self.generators.restored(), torch.enable_grad():
            start, previous = unit.start, unit.inputs
            try:
                for item in items:
                    stop = start + schedule_length(item)
                    if isinstance(item, int):
                        if start == first_of_last < stop:
                            self.pending += [_RecomputeUnit(start, stop, p, (item,), list(previous)) for p in later]
                        self._run(start, stop, previous, store)
                    else:
                        if values := range(self._first_value(start), self._first_value(stop)):
                            self.pending.append(_RecomputeUnit(start, stop, values, item, list(previous)))
                        self._run(start, stop, previous, _discard)
                    start = stop
            except _Complete:
                pass

    def parts(self, values: range, count: int) -> list[range]:
        """Divide values into at most `count` parts of nearly equal bytes, none of them empty."""
        if self.value_bytes is None or count == 1:
            return [values]
        sums = [0, *accumulate(self.value_bytes[values.start : values.stop])]
        cuts = [values.start + bisect_left(sums, sums[-1] * part / count) for part in range(1, count)]
        return [range(*bounds) for bounds in pairwise([values.start, *cuts, values.stop]) if range(*bounds)]

    def _first_value(self, call: int) -> int:
        """Return the index of the first value that this call or a later one saves."""
        return self.calls[call].first if call < len(self.calls) else self.value_count

    def _run(
        self, start: int, stop: int, previous: list[VersionedTensor | None], store: Callable[[int, Tensor], None]
    ) -> None:
        """Run calls start, ..., stop - 1 again.

        `previous` is changed in place: on entry it holds the input of call `start`, on return that of call `stop`.
        Gradients are on even if `store` discards the values: without gradients torch may choose other kernels, with
        other last bits.
        """
        leaves = [None if tensor is None else tensor.leaf() for tensor in previous]
        previous.clear()  # so that each tensor can be freed after its last use
        for number in range(start, stop):
            call = self.calls[number]
            if call.weights is not None:
                call.weights.check()
                if self.value_bytes is not None:
                    call.weights = None  # an optimizer may move weights between the reruns for two parts
            out = run_call(call, leaves, store)
            used = self.calls[number + 1].used if number + 1 < len(self.calls) else set()
            leaves = [tensor if i in used else None for i, tensor in enumerate(tensors_in(out))]
            del out
        previous += [None if leaf is None else VersionedTensor(self.tag("saved", leaf)) for leaf in leaves]


class _Complete(Exception):
    """Raised once the last value of a unit is recomputed, to skip the remaining operations."""


_END = object()
_NOTHING: AbstractContextManager[None] = nullcontext()
_FORWARD_DIFFERS = (
    "a block saved another number of tensors in its recomputation than in its first forward pass, so its forward "
    "differs between calls. Use Everything()."
)


def run_call(call: Call, leaves: Sequence[Tensor | None], store: Callable[[int, Tensor], None]) -> Any:
    """Run a call again and return its output.

    Args:
        call: the call.
        leaves: the tensors of the previous call's output.
        store: called with (index, tensor) for each value that the call saves.
    Raises:
        RecomputationError: the call saves another number of tensors than in the forward pass.
    """
    args, kwargs = _unpacked_arguments(call, leaves)
    expected = iter(call.saved)
    with (
        memory_events.runs_again(call.owner),
        call.state.restored(),
        saved_tensors_hooks(partial(_pack_in_rerun, expected, store), _refuse_backward),
        _NOTHING if call.kept is None else call.kept.replayed(),
    ):
        out = call.forward(*args, **kwargs)
    if next(expected, _END) is not _END:
        raise RecomputationError(_FORWARD_DIFFERS)
    return out


def _unpacked_arguments(call: Call, leaves: Sequence[Tensor | None]) -> Any:
    """Return (args, kwargs) for the rerun of a call. leaves: the tensors of the previous call's output."""
    versioned: dict[int, Tensor] = {}

    def unpack(argument: Any) -> Any:
        if isinstance(argument, _PreviousOutput):
            return leaves[argument.index]
        if isinstance(argument, VersionedTensor):
            if id(argument) not in versioned:
                versioned[id(argument)] = argument.leaf()
            return versioned[id(argument)]
        return argument

    return unpacked(call.arguments, unpack)


def _pack_in_rerun(expected: Iterator[int | None], store: Callable[[int, Tensor], None], tensor: Tensor) -> None:
    """Call `store(index, tensor)` for a tensor saved in a rerun. expected: the rest of `Call.saved`."""
    index = next(expected, _END)
    if index is _END:
        raise RecomputationError(_FORWARD_DIFFERS)
    if isinstance(index, int):
        store(index, tensor)


def _new_bytes(tensor: Tensor, seen: weakref.WeakValueDictionary[int, UntypedStorage]) -> int:
    """Return a tensor's bytes; 0 if its storage is in `seen`. Add the storage, until it is freed."""
    storage = tensor.untyped_storage()
    is_new = storage._cdata not in seen
    seen[storage._cdata] = storage
    return tensor.nbytes if is_new else 0


def _untagged(kind: memory_events.Kind, tensor: Tensor) -> Tensor:
    return tensor


def _discard(index: int, tensor: Tensor) -> None:
    pass


def _refuse_backward(packed: None) -> Tensor:
    raise AssertionError("the graph of a rerun is not differentiated")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
