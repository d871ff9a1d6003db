"""Memory: the storages that torch operations make, from birth to death, and what each is for."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from gradcost.core import memory_events
from gradcost.core.errors import BadInput
from gradcost.core.pytree import tensors
from gradcost.instruments.module_tracker import ModuleTracker

Purpose = Literal[
    "parameters", "buffers", "inputs", "optimizer state", "gradients", "saved activations", "tangents and noise",
    "temporaries",
]  # fmt: skip
PURPOSES: tuple[Purpose, ...] = Purpose.__args__  # pyright: ignore[reportAttributeAccessIssue]
STANDING: tuple[Purpose, ...] = ("parameters", "buffers", "inputs")
_TOLD: dict[str, Purpose] = {
    "gradients": "gradients",
    "tangents": "tangents and noise",
    "noise": "tangents and noise",
    "shifted": "tangents and noise",
    "saved": "saved activations",
}
_ADD = torch.ops.aten.add.Tensor
# Of several things that a storage was said to be, the first here holds.
_RANK: tuple[Purpose, ...] = (*STANDING, "optimizer state", "gradients", "tangents and noise", "saved activations")


@dataclass(frozen=True)
class Memory:
    """The most bytes alive at once, what they were for, and where that was.

    Law: the breakdown, of one moment, sums to `peak`. operator, module: which torch operation reached the peak,
    in which module's forward or backward. timeline: the bytes alive after each birth and death of a storage.
    """

    peak: int
    breakdown: dict[Purpose, int]
    operator: str
    module: str
    timeline: tuple[int, ...]

    @property
    def beyond(self) -> int:
        """The peak without the weights, the buffers and the batch."""
        return self.peak - sum(self.breakdown[purpose] for purpose in STANDING)


class _Storage:
    """One storage: its bytes now, what it was said to be for, whether it carries tangents."""

    __slots__ = ("elsewhere", "purpose", "size", "tangent")

    def __init__(self) -> None:
        self.size = 0
        self.purpose: Purpose = "temporaries"
        self.tangent = False
        self.elsewhere = False

    def serves(self, purpose: Purpose) -> None:
        if self.purpose == "temporaries" or _RANK.index(purpose) < _RANK.index(self.purpose):
            self.purpose = purpose


class MemoryTracker(TorchDispatchMode):
    """Within `followed()`, every storage that an operation makes is followed; `memory()` then tells the peak.

    Exact for what it follows: a storage counts once, however many tensors view it, until the last is gone. What
    it was for is settled after the run, so a tensor that becomes a gradient is one from its birth. Not counted:
    what is on another type of device, zeros that autograd only pretends, storages that were there before and
    not registered, and the workspaces inside of kernels. Fake tensors count as real ones.

    device: the type whose memory is followed. block: sizes are rounded up to a multiple of it, as CUDA's
    allocator does to 512 bytes.
    """

    def __init__(self, model: nn.Module, device: str = "cpu", block: int = 1) -> None:
        super().__init__()
        self.device, self.block = device, block
        self.where = ModuleTracker(model)
        self._model = model
        self._alive: dict[int, _Storage | None] = {}  # None: was there before, and is nobody's
        self._events: list[tuple[_Storage, int]] = []
        self._places: dict[int, tuple[str, str]] = {}  # event -> operator and module
        self.register("parameters", model.parameters())
        self.register("buffers", model.buffers())

    def register(self, purpose: Purpose, tensors: Iterable[Tensor]) -> None:
        """Tensors that exist already and are to be counted."""
        for tensor in tensors:
            if self._counts(tensor):
                self._follow(tensor.untyped_storage(), "").serves(purpose)

    @contextmanager
    def followed(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self.where.followed())
            stack.enter_context(memory_events.observe(self))
            stack.enter_context(self._gradients_seen())
            stack.enter_context(self._resizing_seen())
            stack.enter_context(saved_tensors_hooks(self._saved, lambda tensor: tensor))
            stack.enter_context(self)
            yield

    def memory(self) -> Memory:
        """The peak of what has been followed so far. Raises: ValueError when that was nothing."""
        here = [(storage, 0 if storage.elsewhere else size) for storage, size in self._events]
        timeline = tuple(accumulate(size for _, size in here))
        if not timeline:
            raise BadInput("no operation was followed: run the work within `followed()`.")
        peak = max(timeline)
        at = timeline.index(peak)
        breakdown: dict[Purpose, int] = dict.fromkeys(PURPOSES, 0)
        for storage, size in here[: at + 1]:
            breakdown[storage.purpose] += size
        return Memory(peak, breakdown, *self._places.get(at, ("", "")), timeline)

    @property
    def moment(self) -> int:
        """How many births and deaths there have been so far: an index into the timeline."""
        return len(self._events)

    @property
    def standing(self) -> int:
        """Bytes of what is registered, before any operation is followed."""
        return sum(size for _, size in self._events)

    def on_tag(self, kind: memory_events.Kind, tensor: Tensor) -> None:
        storage = self._of(tensor)
        if storage is None:
            return
        if kind == "elsewhere":
            storage.elsewhere = True
        else:
            storage.serves(_TOLD[kind])
            storage.tangent |= kind == "tangents"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors((args, kwargs))
        for tensor in given:
            if self._counts(tensor):
                self._know(tensor.untyped_storage(), None)
        if func is _ADD and not kwargs and _is_accumulation(*args):
            out = args[0].add_(args[1])
        else:
            out = func(*args, **kwargs)
        tangent = any(storage is not None and storage.tangent for storage in map(self._of, given))
        for tensor in tensors(out):
            if self._counts(tensor):
                self._follow(tensor.untyped_storage(), str(func))
                if tangent:
                    self.on_tag("tangents", tensor)
        return out

    def _counts(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.device and not tensor._is_zerotensor()

    def _of(self, tensor: Tensor) -> _Storage | None:
        return self._alive.get(tensor.untyped_storage()._cdata) if self._counts(tensor) else None

    def _know(self, untyped: torch.UntypedStorage, storage: _Storage | None) -> None:
        if untyped._cdata not in self._alive:
            weakref.finalize(untyped, self._release, untyped._cdata)
            self._alive[untyped._cdata] = storage

    def _follow(self, untyped: torch.UntypedStorage, operator: str) -> _Storage:
        """Take a storage up, or note that it has another size than before; one that is nobody's stays so."""
        self._know(untyped, _Storage())
        storage = self._alive[untyped._cdata]
        if storage is None:
            return _Storage()
        size = -(-untyped.nbytes() // self.block) * self.block
        if size != storage.size:
            self._places[len(self._events)] = (operator, self.where.here)
            self._events.append((storage, size - storage.size))
            storage.size = size
        return storage

    def _release(self, name: int) -> None:
        storage = self._alive.pop(name, None)
        if storage is not None:
            self._events.append((storage, -storage.size))

    def _saved(self, tensor: Tensor) -> Tensor:
        self.on_tag("saved", tensor)
        return tensor.detach()  # itself, it would hold the graph that saved it: a cycle, and a longer life

    @contextmanager
    def _gradients_seen(self) -> Iterator[None]:
        def finished(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.on_tag("gradients", parameter.grad)

        leaves = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        handles = [leaf.register_post_accumulate_grad_hook(finished) for leaf in leaves]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _resizing_seen(self) -> Iterator[None]:
        """Storages are resized behind the dispatcher's back (by FSDP, for one)."""
        resize = torch.UntypedStorage.resize_

        def resized(untyped: torch.UntypedStorage, size: int) -> Any:
            found = resize(untyped, size)
            if self._alive.get(untyped._cdata) is not None:
                self._follow(untyped, "UntypedStorage.resize_")
            return found

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize


def _is_accumulation(old: Any, new: Any) -> bool:
    """Whether autograd adds a gradient to one that nobody else holds: it does so in place, but not under a mode
    (torch's `can_accumulate_inplace`). Four owners are its buffer, the call, this one's and Python's."""
    if torch._C._current_graph_task_id() < 0 or torch.is_grad_enabled():
        return False
    if not (isinstance(old, Tensor) and isinstance(new, Tensor)) or (old.shape, old.dtype) != (new.shape, new.dtype):
        return False
    alone = torch._C._storage_Use_Count(old.untyped_storage()._cdata) == 2  # its tensor's, and the one asked with
    return alone and old._use_count() <= 4 and old.is_contiguous()  # type: ignore[attr-defined]
