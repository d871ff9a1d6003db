"""Checkpointing policies: what a forward pass saves for the backward pass, and what is recomputed."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from gradcost.checkpointing.recompute import recomputing
from gradcost.checkpointing.schedules import check_items, schedule_length, uniform
from gradcost.core import memory_events
from gradcost.core.blocks import find_blocks
from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.fake import is_fake, stands_for
from gradcost.core.objective import Objective
from gradcost.core.value import value


class Saving(ABC):
    """A checkpointing policy: which activations the forward pass saves for the backward pass.

    Law: every policy gives the same gradient, bit for bit.
    """

    @abstractmethod
    def applied(self, objective: Objective, batch: Any) -> AbstractContextManager[None]:
        """Return a context manager inside which a forward pass with gradients saves only what this policy selects.

        Args:
            objective: the model and the loss.
            batch: any pytree; the batch of the forward pass.
        Returns:
            A context manager for the forward pass.
        """

    @abstractmethod
    def objection(self, objective: Objective, batch: Any) -> str | None:
        """Return why this policy cannot be used with this model and what to use instead; None if it can be used.

        Args:
            objective: the model and the loss.
            batch: any pytree; passed to the loss as it is.
        """

    def beside_gradients(self, bytes: int) -> Saving:
        """Return the policy for a loop that holds the gradients of all parameters, `bytes` in all.

        Args:
            bytes: memory of the gradients. Only a policy with a memory budget needs it.
        """
        return self


@value
class Everything(Saving):
    """Plain backpropagation: save every activation that the backward pass needs; recompute nothing."""

    def applied(self, objective: Objective, batch: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def objection(self, objective: Objective, batch: Any) -> None:
        return None


@value
class Blocks(Saving):
    """Save only the input of every repeated block; recompute the block in the backward pass.

    `core.blocks.find_blocks` defines the blocks. Source: Chen et al. 2016, section 4.
    """

    def applied(self, objective: Objective, batch: Any) -> AbstractContextManager[None]:
        blocks = find_blocks(objective.model)
        return recomputing(objective, batch, blocks, ((1,),) * len(blocks))

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return _objection_without_blocks(objective.model, self)


@value
class Segments(Saving):
    """Split the chain of blocks into segments of nearly equal length; save only the input of each segment.

    The backward pass recomputes one segment at a time. A segment ends early where a block's input is not the previous
    block's output.

    Args:
        count: number of segments.
    Raises:
        BadInput: count < 1.
    Source: Chen et al. 2016, algorithm 1 (sqrt(n) segments).
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise BadInput(f"a chain is cut into 1 segment or more, not {self.count!r}.")

    def applied(self, objective: Objective, batch: Any) -> AbstractContextManager[None]:
        blocks = find_blocks(objective.model)
        return recomputing(objective, batch, blocks, uniform(len(blocks), self.count))

    def objection(self, objective: Objective, batch: Any) -> str | None:
        blocks = len(find_blocks(objective.model))
        if 0 < blocks < self.count:
            return (
                f"{self} has more segments than {type(objective.model).__name__} has blocks ({blocks}): use at most "
                f"Segments({blocks})."
            )
        return _objection_without_blocks(objective.model, self)


@value
class Schedule(Saving):
    """Nested recomputation of the chain of blocks: regions inside regions.

    An item is one of:

    - an int n: the next n blocks are recorded: they save every activation that the backward pass needs.
    - -n, outside of regions: the next n blocks are recorded as under `Selective()`.
    - a tuple of items: the schedule of one region. Only the region's input is saved. When the backward pass reaches
      the region, the region runs again from that input, under this schedule.

    - k zeros before a last 1 of a region: the region's last block runs again k + 1 times, each time for one part of
      the tensors that it saves, so only one part is in memory.

    On 12 blocks `(12,)` is Everything(), `((4,), (4,), (4,))` is Segments(3), `(((2,), (3,), 1), (2,), 4)` is nested,
    and `((0, 1),) * 12` is Blocks() with each block recomputed in two parts.

    Law: if each block is one linear layer, a rerun of a region of n blocks costs n - 1 forward matmuls, plus the
    reruns of the regions inside it. A region at the end of another region is replaced by its items (recursively), so
    that it runs once.

    Args:
        items: the schedule, a tuple of items.
    Raises:
        BadInput: an item is neither an int nor a tuple of one item or more, or stands where it cannot.
    Source: Herrmann et al. 2019 (arXiv 1911.13214).
    """

    items: tuple[Any, ...]

    def __post_init__(self) -> None:
        check_items(self.items)

    def applied(self, objective: Objective, batch: Any) -> AbstractContextManager[None]:
        objection = self.objection(objective, batch)
        if objection is not None:
            raise Unsupported(objection)
        return recomputing(objective, batch, find_blocks(objective.model), self.items, EXPENSIVE)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        blocks, scheduled = len(find_blocks(objective.model)), schedule_length(self.items)
        if blocks and blocks != scheduled:
            return (
                f"{self} is a schedule of {scheduled} blocks, and {type(objective.model).__name__} has {blocks}: "
                f"make its numbers sum to {blocks}, or use Blocks()."
            )
        return _objection_without_blocks(objective.model, self)


class Operators(ABC):
    """A group of torch operators whose outputs are expensive to recompute."""

    @abstractmethod
    def names(self) -> frozenset[str]:
        """Return the names of the operators in `torch.ops.aten`."""


@value
class Matmuls(Operators):
    """Matrix products and convolutions."""

    def names(self) -> frozenset[str]:
        return frozenset({"mm", "addmm", "bmm", "baddbmm", "convolution"})


@value
class Attention(Operators):
    """The fused kernels of scaled dot-product attention, on any device."""

    def names(self) -> frozenset[str]:
        kernels = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
        return frozenset(f"_scaled_dot_product_{kernel}" for kernel in kernels)


EXPENSIVE = Matmuls().names() | Attention().names()  # the operators whose outputs Selective() saves


@value
class Selective(Saving):
    """Recompute every repeated block in the backward pass, but save the outputs of some operators.

    In each block, every module that has parameters is recomputed alone. An output that a later operator overwrites
    (an in-place activation, the gates of a recurrent layer) is recomputed too.

    Args:
        keep: groups of operators whose outputs are saved.
    Raises:
        BadInput: keep is empty, or contains something other than groups of operators.
    Source: Korthikanti et al. 2022 (arXiv 2205.05198), section 5; torch.utils.checkpoint.
    """

    keep: tuple[Operators, ...] = (Matmuls(), Attention())

    def __post_init__(self) -> None:
        groups = self.keep if isinstance(self.keep, tuple) else ()
        if not groups or not all(isinstance(group, Operators) for group in groups):
            raise BadInput(
                f"keep is a tuple of kinds of operators, such as (Matmuls(),), not {self.keep!r}. To keep none, "
                "use Blocks()."
            )

    def applied(self, objective: Objective, batch: Any) -> AbstractContextManager[None]:
        names = frozenset[str]().union(*(group.names() for group in self.keep))
        blocks = find_blocks(objective.model)
        return recomputing(objective, batch, blocks, (-len(blocks),), names)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return _objection_without_blocks(objective.model, self)


@value
class Offloaded(Saving):
    """Save activations in CPU memory until the backward pass needs them. Weights stay on their device.

    If several operations save the same storage, it is copied to the CPU once. The copy back to the device is shared
    as long as one of the operations uses it.
    Source: Rhu et al. 2016 (vDNN, arXiv 1602.08124); torch.autograd.graph.save_on_cpu.
    """

    def applied(self, objective: Objective, batch: Any) -> AbstractContextManager[None]:
        return _saved_on_cpu([parameter.untyped_storage()._cdata for parameter in objective.model.parameters()])

    def objection(self, objective: Objective, batch: Any) -> str | None:
        devices = {stands_for() if is_fake(p) else p.device.type for p in objective.model.parameters()}
        if devices == {"cpu"}:
            return (
                f"{self} moves saved tensors to CPU memory, and {type(objective.model).__name__} is on the CPU "
                "already: use Blocks()."
            )
        return None


class _OffloadedStorage:
    """The CPU copy of a saved tensor's storage."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copy: Tensor | None = None
        self.device_copy: weakref.ref[Tensor] | None = None

    def save(self, storage: Tensor) -> None:
        self.copy = memory_events.tag("elsewhere", storage.to("cpu", copy=True))

    def fetch(self) -> Tensor:
        """Return the storage on its device; copy it only if no earlier copy is in use."""
        assert self.copy is not None
        tensor = None if self.device_copy is None else self.device_copy()
        if tensor is None:
            tensor = memory_events.tag("saved", self.copy.to(self.device, copy=True))
            self.device_copy = weakref.ref(tensor)
        return tensor


@contextmanager
def _saved_on_cpu(weight_storages: Sequence[int]) -> Iterator[None]:
    """Save tensors in CPU memory inside the context. weight_storages: storages that stay on their device."""
    offloaded: weakref.WeakValueDictionary[Any, _OffloadedStorage] = weakref.WeakValueDictionary()
    latest: deque[tuple[_OffloadedStorage, Tensor] | None] = deque()  # one per call of `pack`; None: no copy due

    def finish(remaining: int = 0) -> None:
        while len(latest) > remaining:
            entry = latest.popleft()
            if entry is not None:
                entry[0].save(entry[1])

    def pack(tensor: Tensor) -> Any:
        finish(remaining=1)
        latest.append(None)
        storage, detached = tensor.untyped_storage(), tensor.detach()
        if storage._cdata in weight_storages:
            return detached
        key: Any = storage._cdata, tensor._version, tensor.dtype
        if not tensor._is_view() and tensor.nbytes < storage.nbytes():
            # A part of a storage with its own version counter (gates of a recurrent layer): other parts may change.
            key = *key, tensor.shape, tensor.storage_offset()
        if key not in offloaded:
            # Copy the full storage, not the tensor: other strides may select other kernels, with other last bits.
            entry = offloaded[key] = _OffloadedStorage(detached.device)
            full = detached.as_strided((storage.nbytes() // tensor.itemsize,), (1,), 0)
            if tensor.grad_fn is not None or tensor._version or not tensor.is_floating_point():
                entry.save(full)
            else:  # its operator may fill it with noise after saving it and one more tensor: copy it later
                latest[-1] = entry, full
            weakref.finalize(storage, offloaded.pop, key, None)
        return offloaded[key], tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> Tensor:
        finish()
        if isinstance(packed, Tensor):
            return packed
        entry, *geometry = packed
        return entry.fetch().as_strided(*geometry)

    with saved_tensors_hooks(pack, unpack):
        yield


def _objection_without_blocks(model: nn.Module, saving: Saving) -> str | None:
    if find_blocks(model):
        return None
    return (
        f"{saving} found no repeated blocks in {type(model).__name__} (a ModuleList of one class, or a Sequential "
        "of at least two modules with parameters): use Everything()."
    )
