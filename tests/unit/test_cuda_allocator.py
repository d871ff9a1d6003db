"""The model of CUDA's caching allocator, against hand-made cases and a naive one; forecasts for CUDA use it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.cuda._memory_viz as viz
from hypothesis import given, settings
from hypothesis import strategies as st

import gradcost
from gradcost import Key, backprop, checkpointed, forward_gradient, mezo
from gradcost.instruments.cuda_allocator import CachingAllocator, Event, replay_step
from gradcost.tasks import CharLm
from gradcost.tasks.architectures import Gpt
from gradcost.training import Adam

KIB, MIB = 1 << 10, 1 << 20


def after(*events: tuple[int, int]) -> tuple[int, int]:
    """Return the allocated and the reserved bytes after events (storage, size)."""
    allocator = CachingAllocator()
    allocator.play([Event(*event) for event in events])
    return allocator.allocated, allocator.reserved


@pytest.mark.parametrize(
    ("events", "allocated", "reserved"),
    [
        ([(0, 1)], 512, 2 * MIB),
        ([(0, 513)], 1024, 2 * MIB),
        ([(0, MIB)], MIB, 2 * MIB),  # still small
        ([(0, MIB), (1, MIB), (2, 1)], 2 * MIB + 512, 4 * MIB),
        ([(0, MIB + 1)], MIB + 512, 20 * MIB),  # large: a segment of 20 MiB, the rest split off
        ([(0, 10 * MIB - 512)], 10 * MIB - 512, 20 * MIB),
        ([(0, 10 * MIB)], 10 * MIB, 10 * MIB),  # a segment of its own
        ([(0, 11 * MIB + 512 * KIB)], 12 * MIB, 12 * MIB),  # rounded up to 2 MiB; half a MiB is not split off
        ([(0, 12 * MIB), (0, 0), (1, 11 * MIB)], 12 * MIB, 12 * MIB),  # nor is one MiB of a reused block
        ([(0, 12 * MIB), (0, 0), (1, 11 * MIB - 512)], 11 * MIB - 512, 12 * MIB),  # but more than one
        ([(0, 16 * MIB), (1, 16 * MIB), (0, 0), (1, 0), (2, 32 * MIB)], 32 * MIB, 64 * MIB),  # no merge of segments
        ([(0, 6 * MIB), (1, 6 * MIB), (0, 0), (1, 0), (2, 12 * MIB)], 12 * MIB, 20 * MIB),  # neighbours merge
        ([(0, 40 * MIB), (1, 30 * MIB), (0, 0), (1, 0), (2, 28 * MIB)], 28 * MIB, 70 * MIB),  # best fit: the second
        ([(0, 3 * MIB), (0, 5 * MIB)], 5 * MIB, 20 * MIB),  # another size: freed, and allocated anew
    ],
)
def test_cases_worked_out_by_hand(events: list[tuple[int, int]], allocated: int, reserved: int):
    assert after(*events) == (allocated, reserved)


class Naive:
    """The rules written down again: every segment is a list of (size, storage or None), searched from the start."""

    def __init__(self) -> None:
        self.segments: list[tuple[bool, list[list[Any]]]] = []

    def take(self, storage: int, size: int) -> None:
        size = max(512, (size + 511) // 512 * 512)
        small = size <= MIB
        found = [
            (block[0], number, at)
            for number, (kind, blocks) in enumerate(self.segments)
            for at, block in enumerate(blocks)
            if kind == small and block[1] is None and block[0] >= size
        ]
        if not found:
            total = 2 * MIB if small else 20 * MIB if size < 10 * MIB else (size + 2 * MIB - 1) // (2 * MIB) * 2 * MIB
            self.segments.append((small, [[total, None]]))
            found = [(total, len(self.segments) - 1, 0)]
        _, number, at = min(found)
        blocks = self.segments[number][1]
        rest = blocks[at][0] - size
        if (small and rest >= 512) or (not small and rest > MIB):
            blocks[at : at + 1] = [[size, storage], [rest, None]]
        else:
            blocks[at][1] = storage

    def release(self, storage: int) -> None:
        for _, blocks in self.segments:
            for block in blocks:
                if block[1] == storage:
                    block[1] = None
            at = 0
            while at + 1 < len(blocks):
                if blocks[at][1] is None and blocks[at + 1][1] is None:
                    blocks[at : at + 2] = [[blocks[at][0] + blocks[at + 1][0], None]]
                else:
                    at += 1

    @property
    def reserved(self) -> int:
        return sum(block[0] for _, blocks in self.segments for block in blocks)

    @property
    def allocated(self) -> int:
        return sum(block[0] for _, blocks in self.segments for block in blocks if block[1] is not None)


SIZES = st.one_of(st.integers(1, 4 * KIB), st.integers(1, 3 * MIB), st.integers(8 * MIB, 30 * MIB))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.one_of(st.just(0), SIZES)), max_size=80))
def test_it_reserves_what_a_naive_allocator_of_the_same_rules_does(events: list[tuple[int, int]]):
    ours, naive, used = CachingAllocator(), Naive(), set[int]()
    for storage, size in events:
        ours.play([Event(storage, size)])
        if storage in used:
            naive.release(storage)
            used.remove(storage)
        if size:
            naive.take(storage, size)
            used.add(storage)
        assert (ours.allocated, ours.reserved) == (naive.allocated, naive.reserved)
    assert ours.used == used
    blocks = [[(b["size"], b["state"] == "inactive") for b in s["blocks"]] for s in ours.snapshot()["segments"]]
    assert blocks == [[(block[0], block[1] is None) for block in blocks] for _, blocks in naive.segments]
    ours.play([Event(storage, 0) for storage in used])
    assert [len(segment["blocks"]) for segment in ours.snapshot()["segments"]] == [1] * len(naive.segments)


def test_reserved_bytes_are_those_after_which_steps_need_no_more():
    """A segment of 20 MiB holds 3 MiB of weights, and then what a step allocates first; its free parts merge."""
    standing = [Event(0, 12 * MIB), Event(1, 3 * MIB)]
    step = [Event(2, 14 * MIB), Event(3, 15 * MIB), Event(2, 0), Event(4, 13 * MIB), Event(3, 0)]
    found = replay_step(standing, step)
    assert found.requested == (12 + 3 + 14 + 15) * MIB
    assert found.allocated == (12 + 3 + 14 + 16) * MIB  # 15 MiB get a segment of 16 MiB, and 1 MiB is not split off
    assert found.reserved == (12 + 20 + 16) * MIB


MODEL = CharLm(model=Gpt(layers=2, width=64, heads=4), batch=4, length=64)


@pytest.mark.parametrize("estimator", [backprop(), checkpointed(), forward_gradient(2), mezo()], ids=repr)
def test_a_forecast_for_cuda_has_requested_allocated_and_reserved_bytes(estimator: Any, tmp_path: Path):
    objective, batch = MODEL.objective(Key(0)), MODEL.batch_at(Key(0), 0)
    found = gradcost.forecast(estimator, objective, batch, Adam(1e-3), device="cuda")
    assert found.cuda is not None
    assert found.cuda.requested <= found.peak <= found.cuda.allocated <= found.cuda.reserved
    assert found.peak - found.cuda.requested < 512 * len(found.memory.timeline)
    assert f"reserved by CUDA's allocator up to {found.cuda.reserved:,}" in str(found)
    snapshot = pickle.loads(found.cuda.save_snapshot(tmp_path / "snapshot.pickle").read_bytes())
    assert sum(segment["total_size"] for segment in snapshot["segments"]) <= found.cuda.reserved
    assert "cudaMalloc" in viz.trace(snapshot)
    assert "aten." in viz.trace_plot(snapshot) or len(viz.segsum(snapshot)) > 0
    assert gradcost.forecast(estimator, objective, batch, Adam(1e-3)).cuda is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_allocator_of_cuda_reserves_what_the_model_says():
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    generator = torch.Generator().manual_seed(0)
    events = []
    for _ in range(400):
        storage = int(torch.randint(20, (), generator=generator))
        size = (
            int(torch.randint(24 * MIB, (), generator=generator)) if torch.rand((), generator=generator) < 0.6 else 0
        )
        events.append(Event(storage, size))
    held: dict[int, torch.Tensor] = {}
    for storage, size, _ in events:
        held.pop(storage, None)
        if size:
            held[storage] = torch.empty(size, dtype=torch.uint8, device="cuda")
    allocator = CachingAllocator()
    allocator.play(events)
    assert torch.cuda.memory_allocated() - before[0] == allocator.allocated
    assert torch.cuda.memory_reserved() - before[1] == allocator.reserved
