"""Recompute the blocks of a chain in the backward pass, under a schedule."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from gradcost.checkpointing.optimal import Items, schedule_length
from gradcost.checkpointing.region import Forward, Region
from gradcost.core.blocks import Block
from gradcost.core.errors import Unsupported
from gradcost.core.objective import devices_of
from gradcost.core.pytree import tensors

Route = Callable[[Forward, Any, Any], Any]  # (forward, args, kwargs) -> the output of forward


def recomputing(blocks: Sequence[Block], items: Items) -> AbstractContextManager[None]:
    """Return a context manager inside which a forward pass with gradients saves only what the schedule keeps.

    Law: the gradient equals that without recomputation, bit for bit. A region is split where a block's input is not
    the previous block's output. Each part is then recomputed at once, without the schedule inside the region.

    Args:
        blocks: the chain of blocks.
        items: a schedule of all blocks.
    Returns:
        A context manager for the forward pass.
    Raises:
        RuntimeError: in the backward pass, if a block saves another number of tensors when it runs again, or if a
            tensor that the backward pass needs was changed in place.
    """
    routes: list[tuple[nn.Module, Route]] = []
    start = 0
    for item in items:
        stop = start + schedule_length(item)
        if not isinstance(item, int):
            routes += _RegionRoutes(blocks[start:stop], item).routes()
        start = stop
    assert start == len(blocks)
    return routed_forwards(routes)


def recompute_in_backward(forward: Forward, *args: Any) -> Any:
    """Return `forward(*args)`. With gradients on, save only `args` and call `forward` again in the backward pass."""
    if not torch.is_grad_enabled():
        return forward(*args)
    devices = {tensor.device for tensor in tensors(args) if tensor.is_cuda}
    return Region(tuple(devices)).forward(forward, args, {})


@contextmanager
def routed_forwards(routes: Iterable[tuple[nn.Module, Route]]) -> Iterator[None]:
    """Inside the context, while gradients are on, call `route(forward, args, kwargs)` instead of a module's forward.

    Key-value caches are removed from the module's arguments: a forward that runs twice would fill them twice.

    Args:
        routes: pairs of a module and its route.
    Raises:
        Unsupported: the forward of a module instance is already replaced.
    """
    replaced: list[nn.Module] = []
    try:
        for module, route in routes:
            if "forward" in vars(module):
                raise Unsupported(
                    f"a {type(module).__name__} has its own `forward` attribute: delete it, or use Everything()."
                )
            module.forward = _routed(module.forward, route)  # type: ignore[method-assign]
            replaced.append(module)
        yield
    finally:
        for module in replaced:
            del module.forward


def _routed(forward: Forward, route: Route) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        args = tuple(None if hasattr(argument, "get_seq_length") else argument for argument in args)
        kwargs = {k: None if k.startswith(("past_key_value", "layer_past")) else v for k, v in kwargs.items()}
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        return route(forward, args, kwargs)

    return run


class _RegionRoutes:
    """Routes of the modules of one region.

    Each forward pass creates one Region, or several if a block's input is not the previous block's output.
    """

    def __init__(self, blocks: Sequence[Block], items: Items) -> None:
        self.modules = [module for block in blocks for module in block]
        self.items = _call_counts(items, iter([len(block) for block in blocks]))
        self.devices = tuple({d for module in self.modules for d in devices_of(module)})
        self.region: Region | None = None
        self.visited: list[nn.Module] = []

    def routes(self) -> list[tuple[nn.Module, Route]]:
        return [(module, partial(self.run, module)) for module in self.modules]

    def run(self, module: nn.Module, forward: Forward, args: Any, kwargs: Any) -> Any:
        if self.region is None or not self.region.continues(args, kwargs):
            self.region, self.visited = Region(self.devices), []
        region = self.region
        self.visited.append(module)
        if module is self.modules[-1]:
            self.region = None
            # The schedule counts calls, so it applies only if each module ran once and in order.
            if len(self.visited) == len(self.modules) and all(map(operator.is_, self.visited, self.modules)):
                region.items = self.items
        return region.forward(forward, args, kwargs)


def _call_counts(items: Items, lengths: Iterator[int]) -> Items:
    """Convert a schedule that counts blocks into one that counts module calls. lengths: modules of each block."""
    return tuple(
        sum(next(lengths) for _ in range(item)) if isinstance(item, int) else _call_counts(item, lengths)
        for item in items
    )
