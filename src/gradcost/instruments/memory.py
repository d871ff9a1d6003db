"""Track each storage that a torch operator allocates, from allocation to free, with its purpose."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from gradcost.core import memory_events
from gradcost.core.errors import BadInput
from gradcost.core.fake import DEVICE
from gradcost.core.pytree import operands
from gradcost.instruments.accumulation import is_accumulation
from gradcost.instruments.cuda_allocator import Event, round_up
from gradcost.instruments.module_tracker import ModuleTracker
from gradcost.instruments.workspaces import Workspace, workspace_bound

Purpose = Literal[
    "parameters", "buffers", "inputs", "optimizer state", "gradients", "saved activations", "tangents and noise",
    "temporaries",
]  # fmt: skip
PURPOSES: tuple[Purpose, ...] = Purpose.__args__  # pyright: ignore[reportAttributeAccessIssue]
STANDING: tuple[Purpose, ...] = ("parameters", "buffers", "inputs")  # not counted by `Memory.beyond`
# Tags of `core.memory_events`. "noise" and "shifted": parameters plus random directions.
_PURPOSE_OF_TAG: dict[str, Purpose] = {
    "gradients": "gradients",
    "tangents": "tangents and noise",
    "noise": "tangents and noise",
    "shifted": "tangents and noise",
    "saved": "saved activations",
}
_ADD = torch.ops.aten.add.Tensor
# A storage with several purposes counts under the one that comes first here.
_PRECEDENCE: tuple[Purpose, ...] = (
    *STANDING,
    "optimizer state",
    "gradients",
    "tangents and noise",
    "saved activations",
)


@dataclass(frozen=True)
class Memory:
    """The peak memory of a run, its purposes, and where it was reached.

    Law: the breakdown sums to `peak`.

    Args:
        peak: the most bytes allocated at once.
        breakdown: bytes by purpose, at the peak.
        operator: the torch operator that reached the peak; "" if none did.
        module: the module whose forward or backward pass ran the operator; "" if none.
        timeline: bytes allocated after each allocation, resize or free of a storage; empty in a plan's forecast that
            is computed from models of fewer blocks. In a forecast of three or more directions, only the first and the
            last one appear.
        within_kernels: bound of the bytes by which workspaces inside CPU kernels raise the peak; 0 on other devices.
        kernel: the operator that reaches this bound; "" if it is 0.
    """

    peak: int
    breakdown: dict[Purpose, int]
    operator: str
    module: str
    timeline: tuple[int, ...]
    within_kernels: int = 0
    kernel: str = ""

    @property
    def beyond(self) -> int:
        """Return the peak less parameters, buffers and batch."""
        return self.peak - sum(self.breakdown[purpose] for purpose in STANDING)


def strided_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the strided tensors that contain a tensor's data: itself, or the indices and values of a sparse one."""
    if tensor.layout == torch.strided:
        return (tensor,)
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return ()  # an opaque layout of a library


class Change(NamedTuple):
    """An allocation, a resize or a free.

    Args:
        size: bytes by which the allocated memory grows; negative for a free.
        purpose: the purpose of the storage.
        operator: the torch operator that allocated; "" for a free, and for memory from before the run.
        module: the module whose forward or backward pass ran the operator; "" if none.
    """

    size: int
    purpose: Purpose
    operator: str
    module: str


class _Storage:
    """One storage: its current bytes, its purpose, and whether it holds tangents or was moved to another device."""

    __slots__ = ("elsewhere", "purpose", "size", "tangent")

    def __init__(self) -> None:
        self.size = 0
        self.purpose: Purpose = "temporaries"
        self.tangent = False
        self.elsewhere = False

    def assign(self, purpose: Purpose) -> None:
        if self.purpose == "temporaries" or _PRECEDENCE.index(purpose) < _PRECEDENCE.index(self.purpose):
            self.purpose = purpose


class MemoryTracker(TorchDispatchMode):
    """Tracks every storage that an operator allocates inside `followed()`; `memory()` returns the peak.

    Law: a storage counts once, however many tensors view it, until the last of them is freed. The breakdown uses the
    final purpose: a tensor that becomes a gradient counts as one from its allocation. Fake tensors count too.

    Not counted:

    - storages on another type of device;
    - autograd's zero tensors (`torch._efficientzerotensor`), which have no memory;
    - storages allocated before `followed()` and not registered;
    - workspaces inside kernels: `Memory.within_kernels` bounds them, and `allocator` counts them.

    Args:
        model: its parameters and buffers are registered; `Memory.module` names one of its modules.
        device: the type of device whose memory is tracked.
        block: each size is rounded up to a multiple of these bytes; CUDA's allocator uses 512.
    """

    def __init__(self, model: nn.Module, device: str = "cpu", block: int = 1) -> None:
        super().__init__()
        self.device, self.block = device, block
        self.modules = ModuleTracker(model)
        self._model = model
        self._storages: dict[int, _Storage | None] = {}  # by address; None: from before tracking, not counted
        self._references: dict[int, Any] = {}  # `weakref.finalize` would keep this tracker, and with it the model
        self._events: list[tuple[_Storage, int]] = []
        self._requests: list[int] = []  # of each event: the bytes of the storage after it, not rounded
        self._origins: dict[int, tuple[str, str]] = {}  # index of an event -> operator and module
        self._has_tangents = False
        self.workspaces: list[Workspace] = []
        self.on_operator: Callable[[Any, Any, Any, Any], None] = lambda func, args, kwargs, out: None
        self.register("parameters", model.parameters())
        self.register("buffers", model.buffers())

    def register(self, purpose: Purpose, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were allocated before `followed()`.

        Args:
            purpose: the purpose of the tensors.
            tensors: the tensors.
        """
        for tensor in tensors:
            for part in self._counted(tensor):
                self._follow(part.untyped_storage(), "").assign(purpose)

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Track inside the context."""
        with ExitStack() as stack:
            stack.enter_context(self.modules.followed())
            stack.enter_context(memory_events.observe(self))
            stack.enter_context(self._gradients_tagged())
            stack.enter_context(self._resizes_tracked())
            stack.enter_context(_transforms_allowed())
            stack.enter_context(saved_tensors_hooks(self._tag_saved, lambda tensor: tensor))
            stack.enter_context(self)
            yield

    def memory(self) -> Memory:
        """Return the peak so far.

        Raises:
            BadInput: no operator ran inside `followed()`.
        """
        events = [(storage, 0 if storage.elsewhere else size) for storage, size in self._events]
        timeline = tuple(accumulate(size for _, size in events))
        if not timeline:
            raise BadInput("no operation was followed: run the work inside `followed()`.")
        peak = max(timeline)
        at = timeline.index(peak)
        breakdown: dict[Purpose, int] = dict.fromkeys(PURPOSES, 0)
        for storage, size in events[: at + 1]:
            breakdown[storage.purpose] += size
        inside = [(timeline[max(count - 1, 0)] + bound - peak, name) for count, bound, name in self.workspaces]
        most, kernel = max(inside, default=(0, ""))
        return Memory(
            peak, breakdown, *self._origins.get(at, ("", "")), timeline, *((most, kernel) if most > 0 else (0, ""))
        )

    def changes(self) -> list[Change]:
        """Return all events so far, in order. The first ones are those of `register`."""
        return [
            Change(0 if storage.elsewhere else size, storage.purpose, *self._origins.get(index, ("", "")))
            for index, (storage, size) in enumerate(self._events)
        ]

    @property
    def moment(self) -> int:
        """Return the number of allocations, resizes and frees so far: an index into the timeline."""
        return len(self._events)

    def log(self) -> list[Event]:
        """Return the allocations, resizes and frees so far, for `cuda_allocator.replay_step`."""
        numbers: dict[int, int] = {}  # by the identity of the storage
        events = []
        for at, ((storage, _), size) in enumerate(zip(self._events, self._requests, strict=True)):
            if not storage.elsewhere:
                number = numbers.setdefault(id(storage), len(numbers))
                events.append(Event(number, size, " in ".join(filter(None, self._origins.get(at, ())))))
        return events

    @property
    def standing(self) -> int:
        """Return the registered bytes. Call it before `followed()`; later it returns the bytes allocated now."""
        return sum(size for _, size in self._events)

    def on_tag(self, kind: memory_events.Kind, tensor: Tensor) -> None:
        for storage in self._storages_of(tensor):
            if kind == "elsewhere":
                storage.elsewhere = True
            else:
                storage.assign(_PURPOSE_OF_TAG[kind])
                storage.tangent |= kind == "tangents"
                self._has_tangents |= storage.tangent

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:
            return args[0].device
        kwargs = kwargs or {}
        inputs = operands((args, kwargs))
        for part in (part for tensor in inputs for part in self._counted(tensor)):
            self._add(part.untyped_storage(), None)  # if new, it existed before tracking
        if func is _ADD and not kwargs and is_accumulation(*args):
            out = args[0].add_(args[1])
        else:
            out = func(*args, **kwargs)
        if self.device == "cpu" and (bound := workspace_bound(func, args, out)):
            self.workspaces.append(Workspace(len(self._events), bound, str(func)))
        tangent = self._has_tangents and any(
            storage.tangent for tensor in inputs for storage in self._storages_of(tensor)
        )
        for tensor in operands((out,)):
            for part in self._counted(tensor):
                self._follow(part.untyped_storage(), str(func))
            if tangent:
                self.on_tag("tangents", tensor)
        self.on_operator(func, args, kwargs, out)
        return out

    def _counted(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return the strided tensors whose storages count."""
        if tensor.device.type != self.device or tensor._is_zerotensor():
            return ()
        return strided_parts(tensor)

    def _storages_of(self, tensor: Tensor) -> list[_Storage]:
        storages = [self._storages.get(part.untyped_storage()._cdata) for part in self._counted(tensor)]
        return [storage for storage in storages if storage is not None]

    def _add(self, untyped: torch.UntypedStorage, storage: _Storage | None) -> None:
        if untyped._cdata not in self._storages:
            self._references[untyped._cdata] = weakref.ref(untyped, partial(self._free, untyped._cdata))
            self._storages[untyped._cdata] = storage

    def _follow(self, untyped: torch.UntypedStorage, operator: str) -> _Storage:
        """Record a new storage or a new size, and return it. A storage from before tracking stays uncounted."""
        self._add(untyped, _Storage())
        storage = self._storages[untyped._cdata]
        if storage is None:
            return _Storage()
        size = round_up(untyped.nbytes(), self.block)
        if size != storage.size:
            self._origins[len(self._events)] = (operator, self.modules.here)
            self._events.append((storage, size - storage.size))
            self._requests.append(untyped.nbytes())
            storage.size = size
        return storage

    def _free(self, address: int, reference: Any) -> None:
        self._references.pop(address, None)
        storage = self._storages.pop(address, None)
        if storage is not None:
            self._events.append((storage, -storage.size))
            self._requests.append(0)

    def _tag_saved(self, tensor: Tensor) -> Tensor:
        self.on_tag("saved", tensor)
        return tensor.detach()  # saving the tensor itself would keep its graph in memory: a reference cycle

    @contextmanager
    def _gradients_tagged(self) -> Iterator[None]:
        def tag_gradient(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.on_tag("gradients", parameter.grad)

        leaves = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        handles = [leaf.register_post_accumulate_grad_hook(tag_gradient) for leaf in leaves]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _resizes_tracked(self) -> Iterator[None]:
        """Track `UntypedStorage.resize_`, which is not dispatched (FSDP calls it)."""
        resize = torch.UntypedStorage.resize_

        def resized(untyped: torch.UntypedStorage, size: int) -> Any:
            result = resize(untyped, size)
            if self._storages.get(untyped._cdata) is not None:
                self._follow(untyped, "UntypedStorage.resize_")
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize


@contextmanager
def _transforms_allowed() -> Iterator[None]:
    """Allow `torch.func.grad`, `vjp` and their kin although hooks on saved tensors are set."""
    autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    disable = autograd._saved_tensors_hooks_disable
    autograd._saved_tensors_hooks_disable = partial(disable, fail_if_non_empty=False)
    try:
        yield
    finally:
        autograd._saved_tensors_hooks_disable = disable
