"""A model of CUDA's caching allocator: the bytes that it reserves for a sequence of allocations and frees.

Source: PyTorch's CUDACachingAllocator, with the defaults of PYTORCH_CUDA_ALLOC_CONF and one stream.
"""

from __future__ import annotations

import pickle
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gradcost.core.files import write_whole

BLOCK = 512  # bytes: each request is rounded up to a multiple of this
SMALL = 1 << 20  # requests up to this come from the small pool, whose segments have SMALL_SEGMENT bytes
SMALL_SEGMENT, LARGE_SEGMENT = 2 << 20, 20 << 20
LEAST_OWN_SEGMENT = 10 << 20  # larger requests get a segment of their own size, rounded up to SMALL_SEGMENT
CONTEXT = (400 << 20, 600 << 20)  # bytes: what a process needs on a GPU before its first tensor, by card and driver
# Bytes of cuBLAS's workspaces, by card: each thread that multiplies matrices has one, and backprop has two threads.
# An H200 had 32 MiB for each thread and 1 MiB for cublasLt; cards before Hopper have 8.1 MiB for each thread.
WORKSPACES = (9 << 20, 65 << 20)
_STEPS = 5  # repetitions of a step within which the reserved bytes are expected to settle


def round_up(size: int, block: int) -> int:
    """Return the least multiple of `block` that is at least `size`.

    Args:
        size: bytes.
        block: block size of the allocator, in bytes; 1 for no rounding.
    Returns:
        Bytes.
    """
    return -(-size // block) * block


class Event(NamedTuple):
    """A change of a storage: its allocation, its free, or a new size.

    Args:
        storage: a number that names the storage.
        size: its bytes after the event; 0: it is freed.
        place: the operator and the module that made it, for a snapshot.
    """

    storage: int
    size: int
    place: str = ""


@dataclass(eq=False)
class _Block:
    """A part of a segment. `before` and `after` are its neighbours in the segment."""

    address: int
    size: int
    is_small: bool
    is_free: bool = True
    before: _Block | None = None
    after: _Block | None = None
    requested: int = 0

    @property
    def order(self) -> tuple[int, int]:
        return self.size, self.address


class CachingAllocator:
    """Reserves segments as CUDA's caching allocator does: best fit, splits, and merges of free neighbours.

    A request is rounded up to 512 bytes. It gets the smallest free block that holds it, and all of it where the rest
    is too small to be split off: up to 1 MiB of a large block. `reserved` is the sum of the segments, which are never
    given back.

    Attributes:
        allocated: bytes in use.
        reserved: bytes of all segments.
        trace: what happened, as (action, address, bytes, place), for `snapshot`.
    """

    def __init__(self) -> None:
        self.allocated = self.reserved = 0
        self.trace: list[tuple[str, int, int, str]] = []
        self._free: dict[bool, list[tuple[tuple[int, int], _Block]]] = {True: [], False: []}  # by size, then address
        self._used: dict[int, _Block] = {}  # by storage
        self._segments: list[_Block] = []  # the first block of each segment
        self._end = 0x7F0000000000  # the address of the next segment

    def play(self, events: Sequence[Event]) -> int:
        """Apply events in order. Return the most bytes in use at once.

        Args:
            events: allocations, frees and changes of size. Storages that are still in use stay so.
        """
        most = self.allocated
        for event in events:
            if event.storage in self._used:
                self._release(event.storage)
            if event.size:
                self._take(event)
            most = max(most, self.allocated)
        return most

    @property
    def used(self) -> set[int]:
        """The numbers of the storages in use."""
        return set(self._used)

    def snapshot(self) -> dict[str, Any]:
        """Return a snapshot in the format of `torch.cuda.memory._snapshot`."""
        return {
            "segments": [self._segment(first) for first in self._segments],
            "device_traces": [[_entry(*entry) for entry in self.trace]],
            "allocator_settings": {},
            "external_annotations": [],
        }

    def _take(self, event: Event) -> None:
        size = round_up(event.size, BLOCK)
        is_small = size <= SMALL
        free = self._free[is_small]
        at = bisect_left(free, (size, 0), key=lambda entry: entry[0])
        block = free.pop(at)[1] if at < len(free) else self._new_segment(size, is_small)
        rest = block.size - size
        if rest >= BLOCK if is_small else rest > SMALL:
            after = _Block(block.address + size, rest, is_small, before=block, after=block.after)
            if block.after is not None:
                block.after.before = after
            block.size, block.after = size, after
            self._put(after)
        block.is_free, block.requested = False, event.size
        self._used[event.storage] = block
        self.allocated += block.size
        self.trace.append(("alloc", block.address, event.size, event.place))

    def _release(self, storage: int) -> None:
        block = self._used.pop(storage)
        self.allocated -= block.size
        for action in ("free_requested", "free_completed"):
            self.trace.append((action, block.address, block.requested, ""))
        if (after := block.after) is not None and after.is_free:
            self._remove(after)
            block.size, block.after = block.size + after.size, after.after
            if block.after is not None:
                block.after.before = block
        if (before := block.before) is not None and before.is_free:
            self._remove(before)
            before.size, before.after = before.size + block.size, block.after
            if before.after is not None:
                before.after.before = before
            block = before
        block.is_free = True
        self._put(block)

    def _new_segment(self, size: int, is_small: bool) -> _Block:
        if is_small:
            total = SMALL_SEGMENT
        elif size < LEAST_OWN_SEGMENT:
            total = LARGE_SEGMENT
        else:
            total = -(-size // SMALL_SEGMENT) * SMALL_SEGMENT
        block = _Block(self._end, total, is_small)
        self._segments.append(block)
        self._end += total + SMALL_SEGMENT  # a gap: segments are not neighbours
        self.reserved += total
        self.trace.append(("segment_alloc", block.address, total, ""))
        return block

    def _put(self, block: _Block) -> None:
        insort(self._free[block.is_small], (block.order, block), key=lambda entry: entry[0])

    def _remove(self, block: _Block) -> None:
        free = self._free[block.is_small]
        del free[bisect_left(free, block.order, key=lambda entry: entry[0])]

    def _segment(self, first: _Block) -> dict[str, Any]:
        blocks = [*_chain(first)]
        used = [block for block in blocks if not block.is_free]
        return {
            "device": 0,
            "address": first.address,
            "total_size": sum(block.size for block in blocks),
            "allocated_size": sum(block.size for block in used),
            "active_size": sum(block.size for block in used),
            "requested_size": sum(block.requested for block in used),
            "stream": 0,
            "segment_type": "small" if first.is_small else "large",
            "segment_pool_id": (0, 0),
            "is_expandable": False,
            "frames": [],
            "blocks": [
                {
                    "address": block.address,
                    "size": block.size,
                    "requested_size": 0 if block.is_free else block.requested,
                    "state": "inactive" if block.is_free else "active_allocated",
                    "frames": [],
                }
                for block in blocks
            ],
        }


@dataclass(frozen=True)
class Reserved:
    """The bytes of training on a CUDA device, by three counts.

    Args:
        requested: the peak of the bytes that tensors have.
        allocated: the peak of the allocator's blocks in use: `torch.cuda.max_memory_allocated()`.
        reserved: the bytes of the allocator's segments once they no longer grow: `torch.cuda.max_memory_reserved()`.
            With PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True they lie between `allocated` and this.
        snapshot: the allocations of the first step, in the format of `torch.cuda.memory._snapshot`.
    """

    requested: int
    allocated: int
    reserved: int
    snapshot: dict[str, Any]

    def save_snapshot(self, path: str | Path) -> Path:
        """Write the snapshot as PyTorch's memory visualiser reads it.

        Args:
            path: the file.
        Returns:
            The path.
        """
        return write_whole(Path(path), pickle.dumps(self.snapshot))


def replay_step(standing: Sequence[Event], step: Sequence[Event]) -> Reserved:
    """Replay training steps through the model of the allocator, until it reserves no more.

    Law: requested <= allocated <= reserved.

    Args:
        standing: allocations before the step: weights, buffers, batch, optimizer's state.
        step: the events of one step. What it leaves allocated is freed before the next one.
    Returns:
        Peaks of requested, allocated and reserved bytes.
    """
    allocator = CachingAllocator()
    allocator.play(standing)
    kept, most, snapshot, before = allocator.used, 0, {}, -1
    for number in range(_STEPS):
        if allocator.reserved == before:
            break
        before = allocator.reserved
        most = max(most, allocator.play(step))
        if number == 0:
            snapshot = allocator.snapshot()
        allocator.play([Event(storage, 0) for storage in allocator.used - kept])
    return Reserved(_peak([*standing, *step]), most, allocator.reserved, snapshot)


def _peak(events: Sequence[Event]) -> int:
    sizes: dict[int, int] = {}
    now = most = 0
    for event in events:
        now += event.size - sizes.get(event.storage, 0)
        sizes[event.storage] = event.size
        most = max(most, now)
    return most


def _chain(block: _Block | None) -> Iterator[_Block]:
    while block is not None:
        yield block
        block = block.after


def _entry(action: str, address: int, size: int, place: str) -> dict[str, Any]:
    frames = [{"name": place, "filename": "", "line": 0}] if place else []
    return {"action": action, "addr": address, "size": size, "stream": 0, "frames": frames, "time_us": 0}
