"""Measure the memory and FLOPs of each block of a chain, for the choice of a checkpointing schedule."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from gradcost.checkpointing.call_state import BlockModules, Generators
from gradcost.checkpointing.containers import packed, tensors_in, unpacked
from gradcost.checkpointing.kept_outputs import KeptOutputs
from gradcost.checkpointing.policies import EXPENSIVE, Schedule
from gradcost.checkpointing.region import Region
from gradcost.checkpointing.schedule_cost import Epilogue, Stage
from gradcost.core.blocks import Block, find_blocks
from gradcost.core.errors import Unsupported
from gradcost.core.fake import known
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.pytree import tensors
from gradcost.estimators.reverse import Reverse
from gradcost.instruments.cuda_allocator import round_up
from gradcost.instruments.flops import OpCounter
from gradcost.instruments.memory import MemoryTracker

MOST_PARTS = 5  # in which a block runs again


@dataclass(frozen=True)
class Profile:
    """The bytes and FLOPs of a chain of blocks, and of the head and the loss after it.

    Args:
        stages: one per block. For the last block before a break, `output` is the bytes that the blocks since the
            previous break leave allocated.
        epilogue: the head and the loss.
        base: bytes allocated during the complete step, without the chain's activations: parameters, buffers, batch,
            chain input.
        breaks: indices of the blocks whose input is not the previous block's output.
        shared: indices of the blocks with a further input that requires a gradient, such as a skip connection.
    """

    stages: tuple[Stage, ...]
    epilogue: Epilogue
    base: int
    breaks: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()


def profile(objective: Objective, batch: Any, rounding: int) -> Profile:
    """Return the bytes and FLOPs of each block: simulate a backpropagation on fake tensors, then each block alone.

    Blocks with equal modules and equal input shapes are simulated once.

    Args:
        objective: an objective on fake tensors (`on_fakes`).
        batch: a batch of fake tensors.
        rounding: the block size of the allocator, in bytes.
    Returns:
        Profile(stages, epilogue, base, breaks, shared), with one stage per block.
    Raises:
        Unsupported: the blocks do not run exactly once each in their order, or a block returns no tensor.
    """
    blocks = find_blocks(objective.model)
    chain = _Chain(objective, blocks, rounding)
    chain.simulate(batch)
    calls, breaks = chain.calls, chain.breaks()
    stages: dict[Any, Stage] = {}
    kinds = [(repr(block), tuple(call.shapes), _shapes(block)) for block, call in zip(blocks, calls, strict=True)]
    for kind, block, call in zip(kinds, blocks, calls, strict=True):
        if kind not in stages:
            # Also disables the model's own checkpointing.
            with objective.isolation.entered(Key(0)), seeded_generators(Key(0), objective.devices):
                stages[kind] = _stage(block, call, rounding)
    in_order = [stages[kind] for kind in kinds]
    for number, left in zip(breaks, chain.left_at(breaks), strict=True):
        in_order[number - 1] = replace(in_order[number - 1], output=left)
    return Profile(tuple(in_order), *chain.epilogue_and_base(breaks), breaks, chain.shared())


def _call(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return module(*args, **kwargs)


class _Shape(NamedTuple):
    """The shape of a tensor. Storing the tensor itself would prevent its memory from being freed."""

    number: int  # index of the tensor argument
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    def empty(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype).requires_grad_(self.requires_grad)


class _Call:
    """The arguments of one block call, with shapes in place of tensors, and the autocast dtypes of the call."""

    def __init__(self, args: Any, kwargs: Any, previous: set[int]) -> None:
        self.shapes: list[_Shape] = []
        self.continues = False  # whether an argument is an output of the previous block
        self.others = False  # whether another argument requires a gradient
        numbers: dict[int, _Shape] = {}

        def shape_of(tensor: Tensor) -> Any:
            if isinstance(tensor, nn.Parameter) or known(tensor) is not None:
                return tensor  # a block may read the values of known integers
            if id(tensor) not in numbers:
                shape = _Shape(len(numbers), tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad)
                numbers[id(tensor)] = shape
                self.shapes.append(shape)
                self.continues |= id(tensor) in previous
                self.others |= id(tensor) not in previous and tensor.requires_grad
            return numbers[id(tensor)]

        self._arguments = packed(_without_caches(args, kwargs), shape_of)
        self.autocasts = [(d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]

    def inputs(self) -> list[Tensor]:
        return [shape.empty() for shape in self.shapes]

    def run(self, block: Block, inputs: list[Tensor], call: Callable[..., Any] = _call) -> Any:
        """Run a block. call: (module, args, kwargs) -> the module's output."""
        args, kwargs = unpacked(
            self._arguments, lambda leaf: inputs[leaf.number] if isinstance(leaf, _Shape) else leaf
        )
        with ExitStack() as stack:
            for device, dtype in self.autocasts:
                stack.enter_context(torch.autocast(device, dtype))
            out = call(block[0], args, kwargs)
            for module in block[1:]:
                out = call(module, (out,), {})
            return out


def _without_caches(args: Any, kwargs: Any) -> Any:
    """Replace empty key-value caches by None, because recomputation runs without them."""

    def is_empty(value: Any) -> bool:
        return hasattr(value, "get_seq_length") and not value.get_seq_length()

    without = {name: None if is_empty(value) else value for name, value in kwargs.items()}
    return tuple(None if is_empty(value) else value for value in args), without


def _shapes(block: Block) -> Any:
    return tuple((p.shape, p.dtype, p.requires_grad) for module in block for p in module.parameters())


def _outputs(block: nn.Module, output: Any) -> list[Tensor]:
    """Return the tensors in a block's output. Those that require a gradient come first."""
    outputs = tensors_in(output)
    if not outputs:
        raise Unsupported(
            f"a block of class {type(block).__name__} returns {type(output).__name__}, in which no tensor was found, "
            "so its memory is unknown: use Blocks()."
        )
    return sorted(outputs, key=lambda tensor: not tensor.requires_grad)


class _Chain:
    """A simulated backpropagation that saves only the chain's input."""

    def __init__(self, objective: Objective, blocks: Sequence[Block], rounding: int) -> None:
        self.objective, self.blocks, self.rounding = objective, blocks, rounding
        self.tracker = MemoryTracker(objective.model, block=rounding)
        self.order: list[int] = []
        self.calls: list[_Call] = []
        self.starts: list[int] = []  # index into the timeline at the start of each call, then of the head
        self.output = 0  # bytes of the last block's output
        self.back: int | None = None  # index into the timeline when that output's gradient is complete
        self._previous: list[weakref.ref[Tensor]] = []
        self._numbers = {id(block[0]): number for number, block in enumerate(blocks)}

    def simulate(self, batch: Any) -> None:
        objective, blocks = self.objective, self.blocks
        self.tracker.register("inputs", tensors(batch))
        with ExitStack() as stack:
            for block in blocks:
                stack.callback(block[0].register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                stack.callback(block[-1].register_forward_hook(self._leave).remove)
            stack.enter_context(self.tracker.followed())
            Reverse(Schedule(((len(blocks),),))).stream(objective, batch, Key(0), lambda name, gradient: None)
        if self.order != list(range(len(blocks))) * objective.parts or self.back is None:
            raise Unsupported(
                f"the blocks of {type(objective.model).__name__} do not run once each, one after the other, so they "
                "have no schedule: use Blocks()."
            )

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        number = self._numbers[id(module)]
        self.order.append(number)
        if number == 0:
            self.calls, self.starts, self._previous = [], [], []
        previous = {id(reference()) for reference in self._previous if reference() is not None}
        self.calls.append(_Call(args, kwargs, previous))
        self.starts.append(self.tracker.moment)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        outputs = _outputs(module, output)
        self._previous = [weakref.ref(tensor) for tensor in outputs]
        if module is self.blocks[-1][-1]:
            self.output = _rounded(outputs[0], self.rounding)
            self.starts.append(self.tracker.moment)
            if outputs[0].requires_grad:
                outputs[0].register_hook(self._set_back)

    def _set_back(self, gradient: Tensor) -> None:
        self.back = self.tracker.moment

    def breaks(self) -> tuple[int, ...]:
        return tuple(number for number, call in enumerate(self.calls) if number and not call.continues)

    def shared(self) -> tuple[int, ...]:
        return tuple(number for number, call in enumerate(self.calls) if number and call.continues and call.others)

    def left_at(self, breaks: tuple[int, ...]) -> list[int]:
        """Return, for each break, the bytes that the blocks since the previous break leave allocated."""
        timeline = self.tracker.memory().timeline
        allocated = [timeline[self.starts[number] - 1] for number in (0, *breaks)]
        return [max(after - before, 0) for before, after in pairwise(allocated)]

    def epilogue_and_base(self, breaks: tuple[int, ...]) -> tuple[Epilogue, int]:
        timeline = self.tracker.memory().timeline
        assert self.back is not None
        start, end = timeline[self.starts[0] - 1], self.starts[-1]
        left = sum(self.left_at(breaks))
        # The head's backward may leave tensors, such as the gradient of a tied embedding, until the end of the step.
        base = start + max(timeline[self.back - 1] - start - self.output - left, 0)
        head_peak = max(timeline[end - 1 : self.back])
        return Epilogue(max(head_peak - base - self.output - left, 0), 0, 0), base


def _stage(block: Block, call: _Call, rounding: int) -> Stage:
    """Measure one block: a recorded forward, a forward that saves nothing, and a backward."""
    modules, inputs = nn.ModuleList(block), call.inputs()
    counter, flops_at_last_save = OpCounter(modules), 0

    def record_flops(tensor: Tensor) -> Tensor:
        nonlocal flops_at_last_save
        flops_at_last_save = counter.counts.flops
        return tensor.detach()  # saving the tensor itself would keep its graph in memory: a reference cycle

    with torch.enable_grad():
        with counter.followed(), saved_tensors_hooks(record_flops, lambda tensor: tensor):
            call.run(block, inputs)
        unsaved_tracker = MemoryTracker(modules, block=rounding)
        with unsaved_tracker.followed(), saved_tensors_hooks(lambda tensor: None, lambda nothing: torch.empty(0)):
            call.run(block, inputs)
        timeline, output, forward = _followed(block, lambda: call.run(block, inputs), rounding)
    saved = max(timeline[forward - 1] - output, 0)
    backward = max(max(timeline[forward:], default=saved) - saved, 0)
    dropped, recorded = unsaved_tracker.memory().beyond, max(timeline[:forward])
    flops, parts = counter.counts.flops, tuple(_in_parts(block, call, rounding))
    selective = _selective(block, call, rounding)
    return Stage(output, saved, dropped, recorded, backward, flops, flops_at_last_save, parts, selective)


def _selective(block: Block, call: _Call, rounding: int) -> tuple[int, int, int, int]:
    """Return `Stage.selective` of a block."""
    regions: list[Region] = []

    def through(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not any(True for _ in module.parameters()):
            return module(*args, **kwargs)
        regions.append(Region(Generators((), python=False, numpy=False), is_tagged=False))
        return regions[-1].forward(module, args, kwargs, BlockModules(module, {}), KeptOutputs(EXPENSIVE))

    counter = OpCounter(nn.ModuleList(block))
    with counter.followed():
        timeline, output, forward = _followed(block, partial(call.run, block, call.inputs(), through), rounding)
    saved = max(timeline[forward - 1] - output, 0)
    again = OpCounter(nn.ModuleList(block))
    with again.followed():
        _followed(block, partial(call.run, block, call.inputs()), rounding)
    backward = max(max(timeline[forward:], default=saved) - saved, 0)
    return saved, max(timeline[:forward]), backward, counter.counts.flops - again.counts.flops


def _followed(block: Block, run: Callable[[], Any], rounding: int) -> tuple[list[int], int, int]:
    """Follow a forward and a backward of one block.

    Args:
        block: the block.
        run: runs its forward and returns its output.
        rounding: the block size of the allocator, in bytes.
    Returns:
        The bytes beyond the parameters after each event, the bytes of the output, and the number of events in the
        forward.
    """
    modules = nn.ModuleList(block)
    tracker = MemoryTracker(modules, block=rounding)
    standing = tracker.standing
    with tracker.followed(), ExitStack() as stack:
        for parameter in (p for p in modules.parameters() if p.requires_grad):
            handle = parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            stack.callback(handle.remove)
        out = _outputs(block[-1], run())
        output, forward = _rounded(out[0], rounding), tracker.moment
        edges = [get_gradient_edge(tensor) for tensor in out if tensor.requires_grad]
        gradients = [torch.empty_like(tensor) for tensor in out if tensor.requires_grad]
        del out
        if edges:
            torch.autograd.backward(edges, gradients)
    return [allocated - standing for allocated in tracker.memory().timeline], output, forward


def _in_parts(block: Block, call: _Call, rounding: int) -> Iterator[tuple[int, int]]:
    """Yield the peak bytes of a rerun and backward in 2, 3, ... parts, and the FLOPs of the rerun (`Stage.parts`)."""
    counter, flops = OpCounter(nn.ModuleList(block)), list[int]()

    def through(region: Region) -> Callable[..., Any]:
        return lambda module, args, kwargs: region.forward(module, args, kwargs, BlockModules(module, {}))

    def new() -> Region:
        return Region(Generators((), python=False, numpy=False), has_parts=True)

    inputs, first = call.inputs(), new()
    first.on_value = lambda tensor: flops.append(counter.counts.flops)
    with counter.followed():
        call.run(block, inputs, through(first))
    for count in range(2, MOST_PARTS + 1):
        parts = first.parts(range(first.value_count), count)
        if len(parts) < count:
            return
        region = new()
        region.items = (*(0,) * (count - 1), len(block))
        timeline, _, forward = _followed(block, partial(call.run, block, call.inputs(), through(region)), rounding)
        yield max(timeline[forward:], default=0), sum(flops[part[-1]] for part in parts)


def _rounded(tensor: Tensor, rounding: int) -> int:
    return round_up(tensor.nbytes, rounding)
