"""The peak memory and the recomputed FLOPs of a checkpointing schedule of a chain of blocks.

A chain is a sequence of blocks and an epilogue (the head and the loss), which is always recorded.
`checkpointing.schedules` defines schedules of the blocks.

Law of memory. M(S, g) is the peak in bytes of the forward and the backward pass of schedule S, without the input of
S. g is the bytes of a gradient that is in memory during that forward pass: in a rerun the gradient of the region's
output; in the first forward pass g = 0. R is S without its first item; x_k is field x of `Stage` k. By first item:

    recorded block s            max(g + recorded_s, saved_s + output_s + M(R, g), saved_s + backward_s)
    recorded selectively        the same with the figures of `Stage.selective`
    region s..e, schedule I     max(g + dropped_k + output_{k-1} for k in s..e [output_{s-1} counts as 0],
                                    output_e + M(R, g), M(I, output_e))
    epilogue                    max(recorded, saved + backward)

The last item of a rerun has other terms. A recorded block has max(g + recorded, saved + backward): its forward pass
stops at its last saved tensor. A block in parts has its peak in `Stage.parts`. A region has M(I, g): its items
replace it, as it would otherwise run twice in a row.

Law of work. The first forward pass is not counted. A rerun costs the FLOPs of its blocks plus the reruns of its inner
regions, with exceptions at its end: a recorded last block costs `stopped`, or the FLOPs in `Stage.parts`; a last
region costs its rerun alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import NamedTuple

from gradcost.checkpointing.schedules import Items, check_items, parts_of, schedule_length
from gradcost.core.errors import BadInput


@dataclass(frozen=True)
class Stage:
    """One block of a chain.

    Args:
        output: bytes of the block's output, which is the next block's input.
        saved: bytes that a recorded forward saves for the backward, without input and output.
        dropped: peak bytes of a forward that saves nothing, without the input, with the output.
        recorded: peak bytes of a recorded forward, without the input, with the output.
        backward: peak bytes of the backward, without the input and `saved`, with the gradient of the output.
        flops: FLOPs of one forward.
        stopped: FLOPs of a forward that stops at its last saved tensor.
        parts: for 2, 3, ... parts, the peak bytes of the block's rerun and backward, without the input, and the FLOPs
            of the rerun. Empty: the block has no schedule in parts.
        selective: `saved`, `recorded` and `backward` of a block that is recorded selectively, and the FLOPs of its
            rerun. None: it cannot be.
    Raises:
        BadInput: a number is negative, or `stopped` exceeds `flops`.
    """

    output: int
    saved: int
    dropped: int
    recorded: int
    backward: int
    flops: int
    stopped: int
    parts: tuple[tuple[int, int], ...] = ()
    selective: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        _check_not_negative(self)
        if self.stopped > self.flops:
            raise BadInput(
                f"stopped={self.stopped} is more than flops={self.flops}: `stopped` is the FLOPs of a forward up to "
                "its last saved tensor."
            )


@dataclass(frozen=True)
class Epilogue:
    """The head and the loss, after the last block.

    Args:
        recorded: peak bytes of the forward, without the input.
        saved: bytes that the forward saves for the backward, without the input.
        backward: peak bytes of the backward, without the input and `saved`.
    Raises:
        BadInput: a number is negative.
    """

    recorded: int
    saved: int
    backward: int

    def __post_init__(self) -> None:
        _check_not_negative(self)


def _check_not_negative(counts: Stage | Epilogue) -> None:
    for field in fields(counts):
        value = getattr(counts, field.name)
        parts = value if isinstance(value, tuple) else () if value is None else (value,)
        for number in chain.from_iterable(part if isinstance(part, tuple) else (part,) for part in parts):
            if number < 0:
                name = f"{field.name} of {type(counts).__name__}"
                raise BadInput(f"{name} is a count of bytes or FLOPs, not {number}: give 0 or more.")


class Point(NamedTuple):
    """A schedule with its peak memory in bytes and its recomputed FLOPs."""

    peak: int
    flops: int
    items: Items


# ---- peak and FLOPs of one schedule


def peak(items: Items, stages: Sequence[Stage], epilogue: Epilogue) -> int:
    """Return the peak bytes of a schedule: M(items, 0) of the law of memory at the head of this file.

    Raises:
        BadInput: items is not a schedule of len(stages) blocks.
    """
    _check_schedule(items, stages)
    return _peak(items, stages, 0, epilogue_peak(epilogue))


def recomputed(items: Items, stages: Sequence[Stage]) -> int:
    """Return the FLOPs of all reruns, by the law of work at the head of this file. Raises: as `peak`."""
    _check_schedule(items, stages)
    parts = list(_parts(items, stages))
    again = sum(_rerun_flops(item, part) for item, part in parts if not isinstance(item, int))
    selective = (stage for item, part in parts if isinstance(item, int) and item < 0 for stage in part)
    return again + sum(_selective_figures(stage)[3] for stage in selective)


def _peak(items: Items, stages: Sequence[Stage], g: int, rest: int | None) -> int:
    """Return M(items, g). rest: M of the items that follow `items`, or None if a rerun ends there."""
    in_parts = parts_of(items)
    for item, part in reversed(list(_parts(items, stages))):
        if isinstance(item, int):
            for stage in reversed(part if item > 0 else list(map(selective, part))):
                own = recorded_peak(stage, g) if rest is not None or in_parts == 1 else _in_parts(stage, in_parts)[0]
                rest = own if rest is None else max(own, stage.saved + stage.output + rest)
        else:
            output = part[-1].output
            inner = _peak(item, part, output, None)
            *_, (forward, _) = unrecorded(part)
            rest = inner if rest is None else max(g + forward, output + rest, inner)
    assert rest is not None
    return rest


def _rerun_flops(items: Items, stages: Sequence[Stage]) -> int:
    """Return the FLOPs of one rerun, including the reruns of its inner regions."""
    parts = list(_parts(items, stages))
    inner = sum(_rerun_flops(item, part) for item, part in parts if not isinstance(item, int))
    last, part = parts[-1]
    in_parts = parts_of(items)
    at_end = part[-1].stopped if in_parts == 1 else _in_parts(part[-1], in_parts)[1]
    end = sum(stage.flops for stage in part[:-1]) + at_end if isinstance(last, int) else 0
    return inner + end + sum(stage.flops for _, part in parts[:-1] for stage in part)


def _parts(items: Items, stages: Sequence[Stage]) -> Iterator[tuple[int | Items, Sequence[Stage]]]:
    """Yield each item with the stages of its blocks."""
    start = 0
    for item in items:
        end = start + schedule_length(item)
        yield item, stages[start:end]
        start = end


def _check_schedule(items: Items, stages: Sequence[Stage]) -> None:
    check_items(items)
    blocks = schedule_length(items)
    if blocks != len(stages):
        raise BadInput(f"{items} is a schedule of {blocks} blocks and the chain has {len(stages)}: cover each once.")


# ---- terms of the two laws


def recorded_peak(stage: Stage, g: int) -> int:
    """Return the peak of a recorded block's own forward and backward, without the blocks after it."""
    return max(g + stage.recorded, stage.saved + stage.backward)


def selective(stage: Stage) -> Stage:
    """Return the figures of a block that is recorded selectively."""
    saved, recorded, backward, _ = _selective_figures(stage)
    return replace(stage, saved=saved, recorded=recorded, backward=backward)


def _selective_figures(stage: Stage) -> tuple[int, int, int, int]:
    if stage.selective is None:
        raise BadInput("the figures of a block that is recorded selectively are not known: use a number above 0.")
    return stage.selective


def _in_parts(stage: Stage, parts: int) -> tuple[int, int]:
    """Return the peak bytes and the FLOPs of a block that runs again in 2 parts or more."""
    if parts - 2 >= len(stage.parts):
        raise BadInput(f"the figures of a block in {parts} parts are not known: use {len(stage.parts) + 1} or fewer.")
    return stage.parts[parts - 2]


def epilogue_peak(epilogue: Epilogue) -> int:
    return max(epilogue.recorded, epilogue.saved + epilogue.backward)


def unrecorded(stages: Sequence[Stage]) -> Iterator[tuple[int, int]]:
    """Yield the peak and the FLOPs of a forward pass that saves nothing, through the first 1, 2, ... stages."""
    peak_bytes = flops = previous_output = 0
    for stage in stages:
        peak_bytes, flops = max(peak_bytes, previous_output + stage.dropped), flops + stage.flops
        yield peak_bytes, flops
        previous_output = stage.output
