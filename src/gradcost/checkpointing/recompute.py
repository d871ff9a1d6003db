"""Recompute the blocks of a chain in the backward pass, under a schedule."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]

from gradcost.checkpointing.caches import CacheRule
from gradcost.checkpointing.call_state import BlockModules, Generators
from gradcost.checkpointing.kept_outputs import KeptOutputs
from gradcost.checkpointing.region import Forward, Region
from gradcost.checkpointing.replay import DrawWatch, RegionCall, Replay, checked_replay
from gradcost.checkpointing.schedules import Items, has_parts, schedule_length
from gradcost.core.blocks import Block
from gradcost.core.errors import Unsupported
from gradcost.core.evaluation.compiled import is_compiled
from gradcost.core.interrupts import undoing
from gradcost.core.notes import Note
from gradcost.core.objective import Objective
from gradcost.core.pytree import tensors

Route = Callable[[Forward, Any, Any], Any]  # (forward, args, kwargs) -> the output of forward


def recomputing(
    objective: Objective, batch: Any, blocks: Sequence[Block], items: Items, keep: frozenset[str] = frozenset()
) -> AbstractContextManager[None]:
    """Return a context manager inside which a forward pass with gradients saves only what the schedule keeps.

    Law: the gradient equals that without recomputation, bit for bit. Blocks get no empty key-value cache, so for a
    language model with a cache the bits may be those with `use_cache=False`. A region is split where a block's input
    is not the previous block's output. Each part then runs again as one, and the schedule in it does not apply.

    The first use of a model and a loss runs a check (`checked_replay`), a forward pass that runs each block twice.
    If the second run of a block differs, the block is not recomputed: it saves its activations.

    Args:
        objective: the model and the loss.
        batch: any pytree; the batch of the forward pass.
        blocks: the chain of blocks.
        items: a schedule of all blocks.
        keep: names of the operators in `torch.ops.aten` whose outputs selectively recorded blocks save.
    Returns:
        A context manager for the forward pass.
    Raises:
        Unsupported: a module that contains the blocks is compiled.
        RecomputationError: in the backward pass, if a block saves a different number of tensors in its rerun, or if
            a tensor that the backward pass needs was changed in place.
    """

    def routed(
        replay: Replay, call: RegionCall = Region.forward, caches: CacheRule | None = None
    ) -> AbstractContextManager[None]:
        found = (*replay.generators_of(blocks), *(value for _, value in objective.isolation.generators))
        own = list({id(generator): generator for generator in found}.values())
        generators = Generators(objective.devices, replay.draws_python, replay.draws_numpy, own)
        settings = _Settings(generators, replay, DrawWatch(replay), frozenset(), call)
        routes: list[tuple[nn.Module, Route]] = []
        start = 0
        for item in items:
            stop = start + schedule_length(item)
            if not isinstance(item, int):
                routes += _RegionRoutes(blocks[start:stop], item, settings).routes()
            elif item < 0:
                for module in _with_parameters(blocks[start:stop]):
                    routes += _RegionRoutes([(module,)], (1,), settings._replace(keep=keep)).routes()
            elif has_caches:
                routes += [(module, _recorded) for block in blocks[start:stop] for module in block]
            start = stop
        assert start == len(blocks)
        return routed_forwards(routes, caches or CacheRule(replay.keeps_caches))

    if all(isinstance(item, int) and item > 0 for item in items):
        return nullcontext()  # nothing is recomputed
    # If one block gets no key-value cache, none does: attention may round keys that a cache has copied otherwise.
    has_caches = any(hasattr(getattr(module, "config", None), "use_cache") for module in objective.modules)
    keep = keep if any(isinstance(item, int) and item < 0 for item in items) else frozenset()
    _refuse_compiled(objective, {module for block in blocks for module in block})
    return routed(checked_replay(objective, batch, routed, keep))


def _recorded(forward: Forward, args: Any, kwargs: Any) -> Any:
    return forward(*args, **kwargs)


def _with_parameters(blocks: Sequence[Block]) -> list[nn.Module]:
    """Return the modules of blocks that are recomputed alone.

    Modules without parameters are not: they may overwrite their input, and recomputing them frees little memory.
    """
    return [module for block in blocks for module in block if any(True for _ in module.parameters())]


def _refuse_compiled(objective: Objective, blocks: set[nn.Module]) -> None:
    for module in objective.modules:
        has_other_forward = "forward" in module.__dict__ or "_compiled_call_impl" in module.__dict__
        if has_other_forward and is_compiled(module) and not blocks.isdisjoint(list(module.modules())[1:]):
            raise Unsupported(
                f"a {type(module).__name__} is compiled, and compiled code does not run the blocks inside it under "
                "another schedule. Compile the blocks instead, or use backprop()."
            )


def recompute_in_backward(forward: Forward, *args: Any) -> Any:
    """Return `forward(*args)`. With gradients on, save only `args` and call `forward` again in the backward pass."""
    if not torch.is_grad_enabled() or functorch.maybe_current_level() is not None:
        return forward(*args)
    devices = {tensor.device for tensor in tensors(args) if tensor.is_cuda}
    return Region(Generators(tuple(devices), python=False, numpy=False)).forward(forward, args, {}, _NO_MODULES)


_NO_MODULES = BlockModules(None, {})


@contextmanager
def routed_forwards(routes: Iterable[tuple[nn.Module, Route]], caches: CacheRule) -> Iterator[None]:
    """Inside the context, while gradients are on, call `route(forward, args, kwargs)` instead of a module's forward.

    Args:
        routes: pairs of a module and its route.
        caches: removes empty key-value caches from the arguments of the modules.
    Raises:
        Unsupported: a module instance has its own `forward` attribute.
    """
    replaced: list[nn.Module] = []

    def restore() -> None:
        for module in replaced:
            vars(module).pop("forward", None)

    with undoing(restore):
        for module, route in routes:
            if "forward" in vars(module):
                raise Unsupported(
                    f"a {type(module).__name__} has its own `forward` attribute: delete it, or use Everything()."
                )
            forward = module.forward
            replaced.append(module)
            module.forward = _routed(module, forward, route, caches)  # type: ignore[method-assign]
        yield


def _routed(module: nn.Module, forward: Forward, route: Route, caches: CacheRule) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if functorch.maybe_current_level() is not None:
            _note_transforms()
            return forward(*args, **kwargs)
        return route(forward, *caches.arguments(module, args, kwargs))

    return run


@functools.cache
def _note_transforms() -> None:
    warnings.warn(
        "blocks that run inside a torch.func transform of the loss are not recomputed: they save their activations.",
        Note,
        stacklevel=2,
    )


class _Settings(NamedTuple):
    """The settings of all regions of a forward pass."""

    generators: Generators
    replay: Replay
    watch: DrawWatch
    keep: frozenset[str]
    call: RegionCall


class _RegionRoutes:
    """Routes of the modules of one region.

    Each forward pass creates one Region, or several if a block's input is not the previous block's output.
    """

    def __init__(self, blocks: Sequence[Block], items: Items, settings: _Settings) -> None:
        self.modules = [module for block in blocks for module in block]
        self.inside = {module: settings.replay.modules_of(module) for module in self.modules}
        self.items = _call_counts(items, iter([len(block) for block in blocks]))
        self.has_parts = has_parts(items)
        self.settings = settings
        self.region: Region | None = None
        self.visited: list[nn.Module] = []

    def routes(self) -> list[tuple[nn.Module, Route]]:
        reasons = self.settings.replay.reasons
        return [(module, partial(self.run, module)) for module in self.modules if module not in reasons]

    def run(self, module: nn.Module, forward: Forward, args: Any, kwargs: Any) -> Any:
        settings = self.settings
        if self.region is None or not self.region.continues(args, kwargs):
            settings.watch.start()
            # With `keep`, memory trackers count only the kept outputs as saved.
            self.region = Region(
                settings.generators,
                settings.watch.check,
                is_tagged=not settings.keep,
                has_parts=self.has_parts,
                checks_weights=settings.replay.is_in_loop,
            )
            self.visited = []
        region = self.region
        self.visited.append(module)
        if module is self.modules[-1]:
            self.region = None
            # The schedule counts calls, so it applies only if each module ran once and in order.
            if len(self.visited) == len(self.modules) and all(map(operator.is_, self.visited, self.modules)):
                region.items = self.items
        kept = KeptOutputs(settings.keep) if settings.keep else None
        return settings.call(region, forward, args, kwargs, self.inside[module], kept)


def _call_counts(items: Items, lengths: Iterator[int]) -> Items:
    """Convert a schedule that counts blocks into one that counts module calls. lengths: modules of each block."""
    return tuple(
        sum(next(lengths) for _ in range(item)) if isinstance(item, int) else _call_counts(item, lengths)
        for item in items
    )
