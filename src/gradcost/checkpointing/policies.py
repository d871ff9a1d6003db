"""Checkpointing policies: what a forward pass saves for the backward pass, and what is recomputed."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gradcost.checkpointing.optimal import schedule_length
from gradcost.checkpointing.recompute import recomputing, routed_forwards
from gradcost.core import memory_events
from gradcost.core.blocks import find_blocks
from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.fake import is_fake, stands_for
from gradcost.core.objective import Objective
from gradcost.core.value import value


class Saving(ABC):
    """A policy: which activations the forward pass keeps until the backward pass needs them.

    Law: the gradient has the same bits under every policy.
    """

    @abstractmethod
    def applied(self, objective: Objective, batch: Any) -> AbstractContextManager[None]:
        """Make a forward pass of the objective's model with gradients save only what this policy keeps.

        Args:
            objective: the model and the loss.
            batch: any pytree; the batch of that forward pass.
        Returns:
            A context manager for the forward pass.
        """

    @abstractmethod
    def objection(self, objective: Objective, batch: Any) -> str | None:
        """Return why this policy cannot be used here and what to use instead, or None.

        Args:
            objective: the model and the loss.
            batch: any pytree; passed to the loss as it is.
        """


@value
class Everything(Saving):
    """Plain backpropagation: keep all that autograd saves; recompute nothing."""

    def applied(self, objective: Objective, batch: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def objection(self, objective: Objective, batch: Any) -> None:
        return None


@value
class Blocks(Saving):
    """Keep only the input of every repeated block; recompute the block in the backward pass.

    `core.blocks.find_blocks` finds the blocks. Source: Chen et al. 2016, section 4.
    """

    def applied(self, objective: Objective, batch: Any) -> AbstractContextManager[None]:
        blocks = find_blocks(objective.model)
        return recomputing(blocks, ((1,),) * len(blocks))

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return _no_blocks(objective.model, self)


@value
class Segments(Saving):
    """Split the chain of blocks into segments of nearly equal length; keep only the input of each.

    A segment ends early where a block's input is not the previous block's output.

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
        length, remainder = divmod(len(blocks), self.count)
        lengths = [length + (i < remainder) for i in range(self.count)]
        return recomputing(blocks, tuple((blocks_in,) for blocks_in in lengths if blocks_in))

    def objection(self, objective: Objective, batch: Any) -> str | None:
        blocks = len(find_blocks(objective.model))
        if 0 < blocks < self.count:
            return (
                f"{self} has more segments than {type(objective.model).__name__} has blocks ({blocks}): use at most "
                f"Segments({blocks})."
            )
        return _no_blocks(objective.model, self)


@value
class Schedule(Saving):
    """A nested schedule of the chain of blocks: regions inside regions, each recomputed when the backward reaches it.

    An item is one of:

    - an int n: the next n blocks are recorded. All they save is kept.
    - a tuple of items: its blocks are one region. Only its input is kept. When the backward pass reaches its last
      block, the region runs again from that input, under the schedule that the tuple is.

    On 12 blocks `(12,)` is Everything(), `((4,), (4,), (4,))` is Segments(3), `(((2,), (3,), 1), (2,), 4)` is nested.

    Law: on a model of linear layers a rerun of a region of n costs n - 1 forward matmuls, plus the reruns of the
    regions inside it. A region at the end of another is expanded (recursively) and runs once.

    Args:
        items: the schedule.
    Raises:
        BadInput: an item is neither an int of 1 or more nor a tuple of one item or more.
    Source: Herrmann et al. 2019 (arXiv 1911.13214).
    """

    items: tuple[Any, ...]

    def __post_init__(self) -> None:
        _check_items(self.items)

    def applied(self, objective: Objective, batch: Any) -> AbstractContextManager[None]:
        objection = self.objection(objective, batch)
        if objection is not None:
            raise Unsupported(objection)
        return recomputing(find_blocks(objective.model), self.items)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        blocks, scheduled = len(find_blocks(objective.model)), schedule_length(self.items)
        if blocks and blocks != scheduled:
            return (
                f"{self} is a schedule of {scheduled} blocks, and {type(objective.model).__name__} has {blocks}: "
                f"make its numbers sum to {blocks}, or use Blocks()."
            )
        return _no_blocks(objective.model, self)


def _check_items(items: Any) -> None:
    if not isinstance(items, tuple) or not items:
        raise BadInput(f"a schedule is a tuple of one item or more, such as ((2,), 1), not {items!r}.")
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int):
            _check_items(item)
        elif item < 1:
            raise BadInput(f"a number in a schedule is how many blocks are recorded: 1 or more, not {item!r}.")


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


@value
class Selective(Saving):
    """Recompute every repeated block in the backward pass, but keep the outputs of some operators.

    Applies torch's selective checkpointing to each module with parameters in a block.

    Args:
        keep: groups of operators whose outputs are kept.
    Raises:
        BadInput: keep is empty, or contains something other than groups of operators.
        RuntimeError: in the backward pass, if a later operator overwrites a kept output (an in-place activation).
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

        def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            if operator.namespace != "aten" or getattr(operator, "_opname", None) not in names:
                return CheckpointPolicy.PREFER_RECOMPUTE
            for output in pytree.tree_leaves(context.op_output):
                if isinstance(output, Tensor):
                    memory_events.tag("saved", output)
            return CheckpointPolicy.MUST_SAVE

        def route(forward: Any, args: Any, kwargs: Any) -> Any:
            contexts = partial(create_selective_checkpoint_contexts, policy)
            return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

        modules = [module for block in find_blocks(objective.model) for module in block]
        # A module without parameters may overwrite its input, and saves little more than that input.
        return routed_forwards((module, route) for module in modules if any(True for _ in module.parameters()))

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return _no_blocks(objective.model, self)


@value
class Offloaded(Saving):
    """Keep all that autograd saves in CPU memory until the backward pass needs it. Weights stay on their device.

    A storage saved by several operations is copied to the CPU once, and back once while any of them holds it.
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
    """The storage of a saved tensor, in CPU memory."""

    def __init__(self, storage: Tensor) -> None:
        self.copy = memory_events.tag("elsewhere", storage.to("cpu", copy=True))
        self.device = storage.device
        self.fetched: weakref.ref[Tensor] | None = None

    def fetch(self) -> Tensor:
        tensor = None if self.fetched is None else self.fetched()
        if tensor is None:
            tensor = memory_events.tag("saved", self.copy.to(self.device, copy=True))
            self.fetched = weakref.ref(tensor)
        return tensor


@contextmanager
def _saved_on_cpu(weights: Sequence[int]) -> Iterator[None]:
    """Offload saved tensors. weights: the storages that stay on their device."""
    offloaded: weakref.WeakValueDictionary[tuple[int, int, torch.dtype], _OffloadedStorage]
    offloaded = weakref.WeakValueDictionary()

    def pack(tensor: Tensor) -> Any:
        storage, plain = tensor.untyped_storage(), tensor.detach()
        if storage._cdata in weights:
            return plain
        name = storage._cdata, tensor._version, tensor.dtype
        if name not in offloaded:
            # Copy the whole storage in its order: kernels dispatch on strides, and other strides change last bits.
            held = _OffloadedStorage(plain.as_strided((storage.nbytes() // tensor.itemsize,), (1,), 0))
            offloaded[name] = held
            weakref.finalize(storage, offloaded.pop, name, None)
        return offloaded[name], tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        held, *geometry = packed
        return held.fetch().as_strided(*geometry)

    with saved_tensors_hooks(pack, unpack):
        yield


def _no_blocks(model: nn.Module, saving: Saving) -> str | None:
    if find_blocks(model):
        return None
    return (
        f"{saving} found no repeated blocks in {type(model).__name__} (a ModuleList of one class, or a Sequential "
        "of at least two modules with parameters): use Everything()."
    )
