"""What backpropagation saves for the way back, and what it computes again."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from gradcost.chain import Block, find_blocks
from gradcost.objective import devices_of, kept_generators
from gradcost.value import value


class Saving(ABC):
    """A choice of which activations of the forward are kept until the backward asks for them.

    Law: the gradient has the same bits whatever is saved.
    """

    @abstractmethod
    def applied(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within, a forward of the model with gradients on saves only what this choice keeps."""

    @abstractmethod
    def objection(self, model: nn.Module) -> str | None:
        """Why this choice cannot be made for the model, and what to use instead, or None."""


@value
class Everything(Saving):
    """Plain backpropagation: all that autograd saves, no recomputation."""

    def applied(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def objection(self, model: nn.Module) -> None:
        return None


@value
class Blocks(Saving):
    """Every repeated block keeps its input alone and is computed again on the way back.

    Blocks are found by themselves (`chain.find_blocks`). Source: Chen et al. 2016, section 4.
    """

    def applied(self, model: nn.Module) -> AbstractContextManager[None]:
        return _recomputing(model, [[block] for block in find_blocks(model)])

    def objection(self, model: nn.Module) -> str | None:
        return _no_blocks(model, self)


@value
class Segments(Saving):
    """The chain of blocks in `count` segments of nearly equal length, each keeping its input alone.

    A segment ends early where the next block is not given the output of the last one. Source: Chen et al.
    2016, algorithm 1 (sqrt(n) segments). Raises: ValueError when count < 1.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"a chain is cut into 1 segment or more, not {self.count!r}.")

    def applied(self, model: nn.Module) -> AbstractContextManager[None]:
        return _recomputing(model, self._cut(find_blocks(model)))

    def objection(self, model: nn.Module) -> str | None:
        blocks = len(find_blocks(model))
        if 0 < blocks < self.count:
            return (
                f"{self} asks for more segments than the {blocks} blocks there are: use at most Segments({blocks})."
            )
        return _no_blocks(model, self)

    def _cut(self, blocks: list[Block]) -> list[list[Block]]:
        short, longer = divmod(len(blocks), self.count)
        lengths = [short + (i < longer) for i in range(self.count)]
        ends = [sum(lengths[: i + 1]) for i in range(self.count)]
        return [blocks[end - length : end] for end, length in zip(ends, lengths, strict=True) if length]


def _no_blocks(model: nn.Module, saving: Saving) -> str | None:
    if find_blocks(model):
        return None
    return (
        f"{saving} found no repeated blocks in {type(model).__name__} (a ModuleList of one class, or a Sequential "
        "of two trainable modules or more): use Everything()."
    )


@contextmanager
def _recomputing(model: nn.Module, segments: Sequence[Sequence[Block]]) -> Iterator[None]:
    """Within, the modules of each segment run as one region that saves its inputs alone."""
    replaced: list[nn.Module] = []
    try:
        for blocks in segments:
            modules = [module for block in blocks for module in block]
            segment = _Segment(modules)
            for module in modules:
                if "forward" in vars(module):
                    raise ValueError(
                        f"{type(module).__name__}.forward was replaced on the instance: remove that first."
                    )
                module.forward = segment.wrap(module, module.forward)  # type: ignore[method-assign]
                replaced.append(module)
        yield
    finally:
        for module in replaced:
            del module.forward


class _Segment:
    """Consecutive modules of a chain. Each pass through them is one region, or more if the chain is broken."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.last = modules[-1]
        self.devices = tuple({d for module in modules for d in devices_of(module)})
        self.region: _Region | None = None

    def wrap(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            # A cache of keys and values would be filled twice by a forward that runs twice.
            args = tuple(None if hasattr(argument, "get_seq_length") else argument for argument in args)
            kwargs = {k: None if k.startswith(("past_key_value", "layer_past")) else v for k, v in kwargs.items()}
            if "use_cache" in kwargs:
                kwargs["use_cache"] = False
            if self.region is None or not self.region.continues(args, kwargs):
                self.region = _Region(self.devices)
            region = self.region
            if module is self.last:
                self.region = None
            return region.forward(forward, args, kwargs)

        return run


class _Previous:
    """Stands for the n-th tensor of the previous module's output in the arguments of the next."""

    def __init__(self, index: int) -> None:
        self.index = index


class _Region:
    """A run of modules whose saved tensors are dropped, and made again when the backward asks for the first."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = devices
        self.calls: list[tuple[Callable[..., Any], Any]] = []
        self.outputs: list[weakref.ref[Tensor]] = []
        self.kept: set[int] = set()  # storages that stay alive anyway: parameters and the region's inputs
        self.count = 0
        self.values: dict[int, Tensor] = {}
        with kept_generators(devices) as generators:
            self.random = [generator.get_state() for generator in generators]
        self.autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]

    def continues(self, args: Any, kwargs: Any) -> bool:
        """Whether these arguments hold the output of the last module that ran."""
        outputs = {id(output()) for output in self.outputs if output() is not None}
        return any(id(leaf) in outputs for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))

    def forward(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        positions = {id(output()): i for i, output in enumerate(self.outputs) if output() is not None}

        def record(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and id(leaf) in positions:
                return _Previous(positions[id(leaf)])
            if isinstance(leaf, Tensor):
                self.kept.add(_storage(leaf))
            return leaf

        self.calls.append((forward, pytree.tree_map(record, (args, kwargs))))
        owner = getattr(forward, "__self__", None)
        if isinstance(owner, nn.Module):
            self.kept.update(_storage(parameter) for parameter in owner.parameters())
        with saved_tensors_hooks(self.pack, self.unpack):
            out = forward(*args, **kwargs)
        self.outputs = [weakref.ref(leaf) for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        return out

    def pack(self, tensor: Tensor) -> Tensor | int:
        if _storage(tensor) in self.kept:
            return tensor.detach()
        self.count += 1
        return self.count - 1

    def unpack(self, packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if packed not in self.values:
            self._recompute()
        return self.values.pop(packed)

    def _recompute(self) -> None:
        made = 0

        def pack(tensor: Tensor) -> int:
            nonlocal made
            if _storage(tensor) not in self.kept:
                self.values[made] = tensor.detach()
                made += 1
                if made == self.count:
                    raise _Complete
            return 0

        with kept_generators(self.devices) as generators, torch.enable_grad():
            for generator, state in zip(generators, self.random, strict=True):
                generator.set_state(state)
            with self._cast(0), self._cast(1), saved_tensors_hooks(pack, lambda _: torch.empty(0)):
                try:
                    self._replay()
                except _Complete:
                    return
        raise RuntimeError(
            f"a block saved {self.count} tensors in its forward and {made} when it was computed again: its forward "
            "is not the same twice. Use Everything()."
        )

    def _replay(self) -> None:
        previous: list[Any] = []
        for forward, recorded in self.calls:

            def restore(leaf: Any, previous: list[Any] = previous) -> Any:
                if isinstance(leaf, _Previous):
                    return previous[leaf.index]
                if isinstance(leaf, Tensor) and leaf.requires_grad and not isinstance(leaf, nn.Parameter):
                    return leaf.detach().requires_grad_()
                return leaf

            args, kwargs = pytree.tree_map(restore, recorded)
            out = forward(*args, **kwargs)
            previous = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]

    def _cast(self, which: int) -> AbstractContextManager[Any]:
        device, enabled, dtype = self.autocast[which]
        return torch.autocast(device, dtype=dtype, enabled=enabled) if enabled else nullcontext()


class _Complete(Exception):
    """All that the backward needs has been computed again: the rest of the region need not run."""


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
