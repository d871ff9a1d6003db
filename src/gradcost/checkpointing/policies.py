"""What backpropagation saves for the way back, and what it computes again."""

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

from gradcost.checkpointing.recompute import recomputing, rerouted
from gradcost.checkpointing.region import count
from gradcost.core import memory_events
from gradcost.core.blocks import find_blocks
from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.fake import is_fake, stands_for
from gradcost.core.objective import Objective
from gradcost.core.value import value


class Saving(ABC):
    """A choice of which activations of the forward are kept until the backward asks for them.

    Law: the gradient has the same bits whatever is saved.
    """

    @abstractmethod
    def applied(self, objective: Objective, batch: Any) -> AbstractContextManager[None]:
        """Within, a forward of the objective's model with gradients on saves only what this choice keeps."""

    @abstractmethod
    def objection(self, objective: Objective, batch: Any) -> str | None:
        """Why this choice cannot be made here, and what to use instead, or None."""


@value
class Everything(Saving):
    """Plain backpropagation: all that autograd saves, no recomputation."""

    def applied(self, objective: Objective, batch: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def objection(self, objective: Objective, batch: Any) -> None:
        return None


@value
class Blocks(Saving):
    """Every repeated block keeps its input alone and is computed again on the way back.

    Blocks are found by themselves (`chain.find_blocks`). Source: Chen et al. 2016, section 4.
    """

    def applied(self, objective: Objective, batch: Any) -> AbstractContextManager[None]:
        blocks = find_blocks(objective.model)
        return recomputing(blocks, ((1,),) * len(blocks))

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return _no_blocks(objective.model, self)


@value
class Segments(Saving):
    """The chain of blocks in `count` segments of nearly equal length, each keeping its input alone.

    A segment ends early where the next block is not given the output of the last one. Source: Chen et al.
    2016, algorithm 1 (sqrt(n) segments). Raises: ValueError when count < 1.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise BadInput(f"a chain is cut into 1 segment or more, not {self.count!r}.")

    def applied(self, objective: Objective, batch: Any) -> AbstractContextManager[None]:
        blocks = find_blocks(objective.model)
        short, longer = divmod(len(blocks), self.count)
        lengths = [short + (i < longer) for i in range(self.count)]
        return recomputing(blocks, tuple((length,) for length in lengths if length))

    def objection(self, objective: Objective, batch: Any) -> str | None:
        blocks = len(find_blocks(objective.model))
        if 0 < blocks < self.count:
            return (
                f"{self} asks for more segments than the {blocks} blocks there are: use at most Segments({blocks})."
            )
        return _no_blocks(objective.model, self)


@value
class Schedule(Saving):
    """A nested schedule of the chain of blocks: regions within regions, each computed again in its turn.

    An item is a whole number n, and the next n blocks are recorded: all that they save is kept. Or it is a tuple
    of items, and the blocks in it are one region: its input alone is kept, and when the backward comes to its
    last block it is run again from there under the schedule that it is. On 12 blocks `(12,)` is Everything(),
    `((4,), (4,), (4,))` is Segments(3) and `(((2,), (3,), 1), (2,), 4)` is nested.

    Law: on L linear layers alone a region of n of them costs n - 1 forward matmuls when it is run again, and what
    the regions in it cost, but one at its end (and the one at the end of that) is opened: it is run once.
    Source: Herrmann et al. 2019 (arXiv 1911.13214). Raises: ValueError when there is no item, or one that is
    neither a whole number of 1 or more nor a tuple of items.
    """

    items: tuple[Any, ...]

    def __post_init__(self) -> None:
        _check(self.items)

    def applied(self, objective: Objective, batch: Any) -> AbstractContextManager[None]:
        sentence = self.objection(objective, batch)
        if sentence is not None:
            raise Unsupported(sentence)
        return recomputing(find_blocks(objective.model), self.items)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        blocks, scheduled = len(find_blocks(objective.model)), count(self.items)
        if blocks and blocks != scheduled:
            return (
                f"{self} is a schedule of {scheduled} blocks, and {type(objective.model).__name__} has {blocks}: "
                f"make its numbers sum to {blocks}, or use Blocks()."
            )
        return _no_blocks(objective.model, self)


def _check(items: Any) -> None:
    if not isinstance(items, tuple) or not items:
        raise BadInput(f"a schedule is a tuple of one item or more, as ((2,), 1) is, not {items!r}.")
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int):
            _check(item)
        elif item < 1:
            raise BadInput(f"a number in a schedule is how many blocks are recorded: 1 or more, not {item!r}.")


class Operators(ABC):
    """A kind of torch operators whose outputs are dear to compute again."""

    @abstractmethod
    def names(self) -> frozenset[str]:
        """Of the operators in `torch.ops.aten`."""


@value
class Matmuls(Operators):
    """Matrix products and convolutions."""

    def names(self) -> frozenset[str]:
        return frozenset({"mm", "addmm", "bmm", "baddbmm", "convolution"})


@value
class Attention(Operators):
    """The fused kernels of scaled dot-product attention, on whatever device."""

    def names(self) -> frozenset[str]:
        kernels = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
        return frozenset(f"_scaled_dot_product_{kernel}" for kernel in kernels)


@value
class Selective(Saving):
    """Every repeated block is computed again on the way back, but what the operators in `keep` gave is kept.

    Torch's own selective checkpointing, of each module with parameters that a block consists of. Where a later
    operator overwrites what is kept (an in-place activation within a block), the backward raises RuntimeError.

    Source: Korthikanti et al. 2022 (arXiv 2205.05198), section 5; torch.utils.checkpoint. Raises: ValueError
    when keep is empty or holds something else than operators.
    """

    keep: tuple[Operators, ...] = (Matmuls(), Attention())

    def __post_init__(self) -> None:
        kinds = self.keep if isinstance(self.keep, tuple) else ()
        if not kinds or not all(isinstance(kind, Operators) for kind in kinds):
            raise BadInput(
                f"keep is a tuple of kinds of operators, such as (Matmuls(),), and not {self.keep!r}. To keep none, "
                "use Blocks()."
            )

    def applied(self, objective: Objective, batch: Any) -> AbstractContextManager[None]:
        names = frozenset[str]().union(*(kind.names() for kind in self.keep))

        def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            if operator.namespace != "aten" or getattr(operator, "_opname", None) not in names:
                return CheckpointPolicy.PREFER_RECOMPUTE
            for made in pytree.tree_leaves(context.op_output):
                if isinstance(made, Tensor):
                    memory_events.tag("saved", made)
            return CheckpointPolicy.MUST_SAVE

        def route(forward: Any, args: Any, kwargs: Any) -> Any:
            contexts = partial(create_selective_checkpoint_contexts, policy)
            return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

        modules = [module for block in find_blocks(objective.model) for module in block]
        # One without parameters may write over its input; what it saves for itself is little more than that.
        return rerouted((module, route) for module in modules if any(True for _ in module.parameters()))

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return _no_blocks(objective.model, self)


@value
class Offloaded(Saving):
    """All that autograd saves, in the CPU's memory until the backward asks for it; weights stay where they are.

    A storage that several operations save is copied once, and brought back once while any of them holds it.
    Source: Rhu et al. 2016 (vDNN, arXiv 1602.08124); torch.autograd.graph.save_on_cpu.
    """

    def applied(self, objective: Objective, batch: Any) -> AbstractContextManager[None]:
        return _elsewhere([parameter.untyped_storage()._cdata for parameter in objective.model.parameters()])

    def objection(self, objective: Objective, batch: Any) -> str | None:
        devices = {stands_for() if is_fake(p) else p.device.type for p in objective.model.parameters()}
        if devices == {"cpu"}:
            return (
                f"{self} moves what is saved to the CPU's memory, and {type(objective.model).__name__} computes "
                "there already: use Blocks()."
            )
        return None


class _Away:
    """The storage of a saved tensor, in the CPU's memory."""

    def __init__(self, whole: Tensor) -> None:
        self.copy = memory_events.tag("elsewhere", whole.to("cpu", copy=True))
        self.device = whole.device
        self.back: weakref.ref[Tensor] | None = None

    def fetched(self) -> Tensor:
        found = None if self.back is None else self.back()
        if found is None:
            found = memory_events.tag("saved", self.copy.to(self.device, copy=True))
            self.back = weakref.ref(found)
        return found


@contextmanager
def _elsewhere(weights: Sequence[int]) -> Iterator[None]:
    away: weakref.WeakValueDictionary[tuple[int, int, torch.dtype], _Away] = weakref.WeakValueDictionary()

    def pack(tensor: Tensor) -> Any:
        storage, plain = tensor.untyped_storage(), tensor.detach()
        if storage._cdata in weights:
            return plain
        name = storage._cdata, tensor._version, tensor.dtype
        if name not in away:
            # All of it and in its order: kernels choose their way by strides, and would give other last bits.
            held = _Away(plain.as_strided((storage.nbytes() // tensor.itemsize,), (1,), 0))
            away[name] = held
            weakref.finalize(storage, away.pop, name, None)
        return away[name], tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        held, *geometry = packed
        return held.fetched().as_strided(*geometry)

    with saved_tensors_hooks(pack, unpack):
        yield


def _no_blocks(model: nn.Module, saving: Saving) -> str | None:
    if find_blocks(model):
        return None
    return (
        f"{saving} found no repeated blocks in {type(model).__name__} (a ModuleList of one class, or a Sequential "
        "of two trainable modules or more): use Everything()."
    )
