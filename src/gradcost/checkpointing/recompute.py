"""Chains of blocks whose forwards run again in the backward, under a schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from gradcost.checkpointing.region import Forward, Items, Region, count
from gradcost.core.blocks import Block
from gradcost.core.errors import Unsupported
from gradcost.core.objective import devices_of
from gradcost.core.pytree import tensors

Route = Callable[[Forward, Any, Any], Any]  # (forward, args, kwargs) -> what the forward gives


def recomputing(blocks: Sequence[Block], items: Items) -> AbstractContextManager[None]:
    """Within, a forward of the blocks with gradients on saves what the schedule keeps of them.

    Law: the gradient has the same bits. A region in which a block is not given what the one before it gave runs
    as several, each of them recorded whole when it runs again. Raises: RuntimeError in the backward, when a
    block's forward is not the same twice or something that it was given has been changed in place.
    """
    routes: list[tuple[nn.Module, Route]] = []
    start = 0
    for item in items:
        stop = start + (item if isinstance(item, int) else count(item))
        if not isinstance(item, int):
            routes += _Stretch(blocks[start:stop], item).routes()
        start = stop
    assert start == len(blocks)
    return rerouted(routes)


def recomputed(forward: Forward, *args: Any) -> Any:
    """`forward(*args)`, which where gradients are on saves its arguments alone and runs again in the backward."""
    if not torch.is_grad_enabled():
        return forward(*args)
    devices = {tensor.device for tensor in tensors(args) if tensor.is_cuda}
    return Region(tuple(devices)).forward(forward, args, {})


@contextmanager
def rerouted(routes: Iterable[tuple[nn.Module, Route]]) -> Iterator[None]:
    """Within, `route(forward, args, kwargs)` stands for each module's forward wherever gradients are on.

    A cache of keys and values is left out of what the module is given: a forward that runs twice would fill it
    twice. Raises: ValueError when a forward is replaced already.
    """
    replaced: list[nn.Module] = []
    try:
        for module, route in routes:
            if "forward" in vars(module):
                raise Unsupported(f"{type(module).__name__}.forward was replaced on the instance: remove that first.")
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


class _Stretch:
    """Consecutive blocks of a chain. Each pass through them is one region, or more if the chain is broken."""

    def __init__(self, blocks: Sequence[Block], items: Items) -> None:
        self.modules = [module for block in blocks for module in block]
        self.items = _in_calls(items, iter([len(block) for block in blocks]))
        self.devices = tuple({d for module in self.modules for d in devices_of(module)})
        self.region: Region | None = None
        self.passed: list[nn.Module] = []

    def routes(self) -> list[tuple[nn.Module, Route]]:
        return [(module, partial(self.run, module)) for module in self.modules]

    def run(self, module: nn.Module, forward: Forward, args: Any, kwargs: Any) -> Any:
        if self.region is None or not self.region.continues(args, kwargs):
            self.region, self.passed = Region(self.devices), []
        region = self.region
        self.passed.append(module)
        if module is self.modules[-1]:
            self.region = None
            if len(self.passed) == len(self.modules) and all(map(_same, self.passed, self.modules)):
                region.items = self.items
        return region.forward(forward, args, kwargs)


def _same(one: object, other: object) -> bool:
    return one is other


def _in_calls(items: Items, lengths: Iterator[int]) -> Items:
    """A schedule that counts calls of modules where `items` counts blocks."""
    return tuple(
        sum(next(lengths) for _ in range(item)) if isinstance(item, int) else _in_calls(item, lengths)
        for item in items
    )
