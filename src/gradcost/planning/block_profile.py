"""Measure the memory and FLOPs of each block of a chain, for the choice of a checkpointing schedule."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils import _pytree as pytree

from gradcost.checkpointing.optimal import Epilogue, Stage
from gradcost.checkpointing.policies import Schedule
from gradcost.core.blocks import Block, find_blocks
from gradcost.core.errors import Unsupported
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.pytree import tensors
from gradcost.estimators.reverse import Reverse
from gradcost.instruments.flops import OpCounter
from gradcost.instruments.memory import MemoryTracker, round_up


@dataclass(frozen=True)
class Profile:
    """The bytes and FLOPs of a chain of blocks, and of the head and the loss after it.

    base: bytes allocated throughout, in addition to what the chain saves: parameters, buffers, batch, chain input.
    """

    stages: tuple[Stage, ...]
    epilogue: Epilogue
    base: int


def profile(objective: Objective, batch: Any, rounding: int) -> Profile:
    """Simulate one backpropagation on fake tensors, and then each block alone.

    Blocks with equal modules and equal input shapes are simulated once.

    Args:
        objective: an objective on fake tensors (`on_fakes`).
        batch: a batch of fake tensors.
        rounding: the block size of the allocator, in bytes.
    Returns:
        Profile(stages, epilogue, base), with one stage per block.
    Raises:
        Unsupported: the blocks do not run exactly once each, in their order.
    """
    blocks = find_blocks(objective.model)
    calls, epilogue, base = _simulate_chain(objective, batch, blocks, rounding)
    known: dict[Any, Stage] = {}
    kinds = [(repr(block), call.shapes(), _shapes(block)) for block, call in zip(blocks, calls, strict=True)]
    for kind, block, call in zip(kinds, blocks, calls, strict=True):
        if kind not in known:
            known[kind] = _stage(block, call, rounding)
    return Profile(tuple(known[kind] for kind in kinds), epilogue, base)


class _Shape(NamedTuple):
    """The shape of a tensor. Storing the tensor itself would keep it allocated and distort the count."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    def empty(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype).requires_grad_(self.requires_grad)


class _Call:
    """The arguments of one call of a block, tensors as shapes, and the autocast dtypes of that call."""

    def __init__(self, args: Any, kwargs: Any) -> None:
        self.leaves, self.structure = pytree.tree_flatten((args, kwargs))
        self.leaves = [_shape_of(leaf) for leaf in self.leaves]
        self.autocasts = [(d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]

    def shapes(self) -> Any:
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, _Shape))

    def inputs(self) -> list[Any]:
        return [leaf.empty() if isinstance(leaf, _Shape) else leaf for leaf in self.leaves]

    def run(self, block: Block, leaves: list[Any]) -> Any:
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        with ExitStack() as stack:
            for device, dtype in self.autocasts:
                stack.enter_context(torch.autocast(device, dtype))
            out = block[0](*args, **kwargs)
            for module in block[1:]:
                out = module(out)
            return out


def _shape_of(leaf: Any) -> Any:
    if hasattr(leaf, "get_seq_length"):
        return None  # a key-value cache: recomputation also runs without it
    if isinstance(leaf, Tensor):
        return _Shape(leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad)
    return leaf


def _shapes(block: Block) -> Any:
    return tuple((p.shape, p.dtype, p.requires_grad) for module in block for p in module.parameters())


def _simulate_chain(
    objective: Objective, batch: Any, blocks: Sequence[Block], rounding: int
) -> tuple[list[_Call], Epilogue, int]:
    """Simulate a backpropagation that saves only the chain's input; return the calls, the epilogue and `base`."""
    tracker = MemoryTracker(objective.model, block=rounding)
    tracker.register("inputs", tensors(batch))
    numbers = {id(block[0]): number for number, block in enumerate(blocks)}
    order: list[int] = []
    calls: list[_Call] = []
    marks: dict[str, int] = {}  # "output": bytes; the others: indices into the timeline

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        number = numbers[id(module)]
        order.append(number)
        if number == 0:
            calls.clear()
            marks["start"] = tracker.moment
        calls.append(_Call(args, kwargs))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        last = tensors(output)[0]
        marks["output"], marks["end"] = _rounded(last, rounding), tracker.moment
        if last.requires_grad:
            last.register_hook(lambda gradient: marks.update(back=tracker.moment))

    with ExitStack() as stack:
        for block in blocks:
            handle = block[0].register_forward_pre_hook(enter, with_kwargs=True)
            stack.callback(handle.remove)
        stack.callback(blocks[-1][-1].register_forward_hook(leave).remove)
        stack.enter_context(tracker.followed())
        Reverse(Schedule(((len(blocks),),))).stream(objective, batch, Key(0), lambda name, gradient: None)
    if order != list(range(len(blocks))) * objective.parts or "back" not in marks:
        raise Unsupported(
            f"the blocks of {type(objective.model).__name__} do not run once each, one after the other, so they have "
            "no schedule: use Blocks()."
        )
    timeline = tracker.memory().timeline
    start, output = timeline[marks["start"] - 1], marks["output"]
    # The head's backward may leave tensors, such as the gradient of a tied embedding, until the end of the step.
    base = start + max(timeline[marks["back"] - 1] - start - output, 0)
    head_peak = max(timeline[marks["end"] - 1 : marks["back"]])
    return calls, Epilogue(max(head_peak - base - output, 0), 0, 0), base


def _stage(block: Block, call: _Call, rounding: int) -> Stage:
    """Measure one block: a recorded forward, a forward that saves nothing, and a backward."""
    modules, leaves = nn.ModuleList(block), call.inputs()
    inputs = [tensor for tensor in tensors(leaves) if tensor.requires_grad]
    counter, stopped = OpCounter(modules), 0

    def record_flops(tensor: Tensor) -> Tensor:
        nonlocal stopped
        stopped = counter.counts.flops
        return tensor

    with torch.enable_grad():
        with counter.followed(), saved_tensors_hooks(record_flops, lambda tensor: tensor):
            call.run(block, leaves)
        unsaved_tracker = MemoryTracker(modules, block=rounding)
        with unsaved_tracker.followed(), saved_tensors_hooks(lambda tensor: None, lambda nothing: torch.empty(0)):
            call.run(block, leaves)
        tracker = MemoryTracker(modules, block=rounding)
        standing = tracker.standing
        with tracker.followed(), ExitStack() as stack:
            parameters = [p for p in modules.parameters() if p.requires_grad]
            for parameter in parameters:
                handle = parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
                stack.callback(handle.remove)
            out = tensors(call.run(block, leaves))
            output, forward = _rounded(out[0], rounding), tracker.moment
            edges = [get_gradient_edge(tensor) for tensor in out if tensor.requires_grad]
            gradients = [torch.empty_like(tensor) for tensor in out if tensor.requires_grad]
            del out
            if edges:
                torch.autograd.backward(edges, gradients, inputs=[*parameters, *inputs])
    timeline = [allocated - standing for allocated in tracker.memory().timeline]
    saved = max(timeline[forward - 1] - output, 0)
    backward = max(max(timeline[forward:], default=saved) - saved, 0)
    dropped, recorded = unsaved_tracker.memory().beyond, max(timeline[:forward])
    return Stage(output, saved, dropped, recorded, backward, counter.counts.flops, stopped)


def _rounded(tensor: Tensor, rounding: int) -> int:
    return round_up(tensor.nbytes, rounding)
