"""Nested schedules, selective and offloaded saving: FLOPs, memory held, and when it is freed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from alive import Alive
from counting import Flops
from gradcost.checkpointing.policies import (
    Attention,
    Blocks,
    Everything,
    Matmuls,
    Offloaded,
    Saving,
    Schedule,
    Segments,
    Selective,
)
from gradcost.checkpointing.schedule_cost import Epilogue, Stage
from gradcost.checkpointing.schedule_cost import peak as schedule_peak
from gradcost.checkpointing.schedules import Items, schedule_length
from gradcost.cli import spec
from gradcost.core import memory_events
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective
from gradcost.estimators.reverse import Reverse
from tables import OBJECTIVES, Block

KEY = Key(21)
WIDTH, BATCH = 8, 64
ROW = BATCH * WIDTH * 4  # bytes of one activation
HALVES = ((((2,), 2), (2,), 2), ((2,), 2), (2,), 2)  # of 16 blocks: the first half, then the second in its turn


class TanhBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(torch.sigmoid(x)))


class Chain(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def squared(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).square().mean()


def made(make: Callable[[], nn.Module], blocks: int) -> tuple[Objective, Tensor]:
    with seeded_generators(KEY):
        return Objective(Chain([make() for _ in range(blocks)]), squared), torch.randn(BATCH, WIDTH)


def gradients(objective: Objective, batch: Any, saving: Saving) -> list[Tensor]:
    return [leaf for _, leaf in Reverse(saving).estimate(objective, batch, KEY).gradient.leaves()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


# ---- the value


@pytest.mark.parametrize(
    "saving",
    [
        Schedule((3, (1,))),
        Schedule((((2,), (3,), 1), (2,), 4)),
        Schedule(((2, 0, 1),)),
        Selective(),
        Selective((Matmuls(),)),
    ],
)
def test_a_saving_is_its_text(saving: Saving):
    assert spec.parse(repr(Reverse(saving))) == Reverse(saving)
    assert len({saving, spec.parse(repr(saving))}) == 1


@pytest.mark.parametrize(
    "items",
    [
        (),
        ((),),
        (0,),
        (0, 1),
        ((0, 2),),
        ((0,),),
        ((1, 0, 1, 1),),
        (((0, 1), 0),),
        (1, (2, -1)),
        (True,),
        (1.5,),
        ("2",),
        [2],
        ([1],),
        3,
    ],
)
def test_an_invalid_schedule_is_refused(items: Any):
    with pytest.raises(ValueError, match=r"schedule.*not .*\.$"):
        Schedule(items)


@pytest.mark.parametrize("keep", [(), Matmuls(), ("mm",), (Matmuls(), 1)])
def test_invalid_operators_are_refused(keep: Any):
    with pytest.raises(ValueError, match=r"keep is a tuple of kinds of operators.*use Blocks\(\)\.$"):
        Selective(keep)


def test_a_schedule_of_another_number_of_blocks_states_both():
    objective, batch = made(TanhBlock, 4)
    sentence = Schedule((2, (1,))).objection(objective, batch)
    assert sentence is not None
    assert "a schedule of 3 blocks, and Chain has 4" in sentence
    with pytest.raises(ValueError, match="Chain has 4"):
        Reverse(Schedule((5,))).estimate(objective, batch, KEY)
    assert Schedule((2, (2,))).objection(objective, batch) is None


def test_offloading_from_the_cpu_is_refused_with_an_alternative():
    objective, batch = made(TanhBlock, 2)
    sentence = Offloaded().objection(objective, batch)
    assert sentence is not None
    assert sentence.endswith("use Blocks().")


# ---- arithmetic


def again(items: Items) -> int:
    """Layers that a region of linear layers recomputes. Its last layer only saves its input, so the run ends before
    it. An inner region first runs with nothing kept, and later runs again; the one at the end is expanded."""
    *before, last = items
    inner = sum(again(item) for item in before if isinstance(item, tuple))
    passed = sum(map(schedule_length, before))
    return inner + passed + (last - 1 if isinstance(last, int) else again(last))


def schedules(blocks: int, several: int, depth: int = 4) -> Iterator[Items]:
    draw = Random(several)

    def drawn(left: int, depth: int) -> Items:
        items: list[Any] = []
        while left:
            some = draw.randint(1, left)
            items.append(some if depth == 0 or draw.random() < 0.3 else drawn(some, depth - 1))
            left -= some
        return tuple(items)

    yield from (drawn(blocks, depth) for _ in range(several))


@pytest.mark.parametrize(
    ("items", "more"),
    [
        ((12,), 0),
        (((1,),) * 12, 0),
        (((4,), (4,), (4,)), 9),
        (((12,),), 11),
        ((((12,),),), 11),  # a region of nothing but a region
        ((((4,), (4,), 4),), 11 + 3 + 3),
        ((((4,), (4,), (4,)),), 11 + 3 + 3),
        ((((2,), (3,), 1), (2,), 4), 5 + 1 + 2 + 1),
    ],
)
def test_what_a_nested_schedule_of_linear_layers_computes_again(items: Items, more: int):
    assert sum(again(item) for item in items if isinstance(item, tuple)) == more


@pytest.mark.parametrize("layers", [5, 12])
def test_a_nested_schedule_costs_the_matmuls_that_its_reruns_add(layers: int):
    objective, batch = made(lambda: nn.Linear(WIDTH, WIDTH, bias=False), layers)
    plain = gradients(objective, batch, Everything())
    for items in schedules(layers, 12):
        with Flops() as flops:
            assert same(gradients(objective, batch, Schedule(items)), plain)
        more = sum(again(item) for item in items if isinstance(item, tuple))
        assert flops.total / (2 * BATCH * WIDTH * WIDTH) == 3 * layers - 1 + more, items


@pytest.mark.parametrize("saving", [Selective(), Selective((Matmuls(),)), Offloaded()], ids=repr)
def test_what_is_kept_or_moved_is_not_multiplied_again(saving: Saving):
    objective, batch = made(TanhBlock, 5)
    with Flops() as plain:
        gradients(objective, batch, Everything())
    with Flops() as found:
        gradients(objective, batch, saving)
    assert found.total == plain.total


def test_selective_saving_keeps_the_outputs_of_its_operators_alone():
    made_by: dict[str, int] = {}

    class Recorder:
        def on_tag(self, kind: str, tensor: Tensor) -> None:
            if kind == "saved":
                made_by[str(tuple(tensor.shape))] = made_by.get(str(tuple(tensor.shape)), 0) + 1

    with seeded_generators(KEY):
        objective, batch = Objective(Chain([Block(8, 2, 0.0) for _ in range(2)]), squared), torch.randn(3, 5, 8)
    counts = []
    for keep in ((Matmuls(),), (Attention(),)):
        made_by.clear()
        with memory_events.observe(Recorder()):
            found = gradients(objective, batch, Selective(keep))
        assert same(found, gradients(objective, batch, Everything()))
        counts.append(dict(made_by))
    # Four linear layers a block: qkv of 24, up of 16, out and down of 8; attention gives (3, 2, 5, 4) and (3, 2, 5).
    assert counts == [{"(15, 24)": 2, "(15, 8)": 4, "(15, 16)": 2}, {"(3, 2, 5, 4)": 2, "(3, 2, 5)": 2}]


# ---- memory


def peak(objective: Objective, batch: Tensor, saving: Saving) -> float:
    with Alive() as alive:
        Reverse(saving).estimate(objective, batch, KEY)
    return alive.peak / ROW


def test_nested_schedules_hold_less_than_single_regions_on_a_deep_chain():
    objective, batch = made(TanhBlock, 16)
    plain, blocks, halves = (
        peak(objective, batch, saving) for saving in (Everything(), Blocks(), Schedule((HALVES,)))
    )
    segments = min(peak(objective, batch, Segments(number)) for number in range(1, 17))
    two_levels = peak(objective, batch, Schedule((((1,),) * 4,) * 4))
    assert max(halves, two_levels) < segments < blocks < plain
    # Beyond the inputs of 3 segments and of 3 blocks there is what one block needs, its own input and gradients.
    assert two_levels - 6 < 9 + 16 * WIDTH / BATCH


def test_the_peak_of_every_schedule_is_that_of_the_law_of_memory():
    """`gradcost.checkpointing.optimal` states it. In rows, of a block and of the square of its output."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.tanh(self.up(x)))

    blocks, rows = 10, 2048
    stages = [Stage(output=1, saved=1, dropped=2, recorded=3, backward=3, flops=2, stopped=1)] * blocks
    objective, batch = Objective(Chain([Residual() for _ in range(blocks)]), squared), torch.randn(rows, WIDTH)
    weights = 3 * objective.dimension * 4 / (rows * WIDTH * 4)  # their gradients come on top
    for items in schedules(blocks, 30):
        with Alive() as alive:
            Reverse(Schedule(items)).estimate(objective, batch, KEY)
        law = schedule_peak(items, stages, Epilogue(recorded=1, saved=0, backward=4))
        assert law <= alive.peak / (rows * WIDTH * 4) <= law + weights, items


def test_a_recorded_item_holds_what_it_records_and_a_region_its_input():
    objective, batch = made(TanhBlock, 8)
    held = [peak(objective, batch, Schedule(items)) for items in (((8,),), ((4,), 4), ((4,), (4,)), ((1,),) * 8)]
    assert held == sorted(held, reverse=True)


class Watching:
    """Weak references to all tensors tagged as saved."""

    def __init__(self) -> None:
        self.saved: list[weakref.ref[torch.UntypedStorage]] = []

    def on_tag(self, kind: str, tensor: Tensor) -> None:
        if kind == "saved":
            self.saved.append(weakref.ref(tensor.untyped_storage()))

    def alive(self) -> set[int]:
        return {id(storage) for ref in self.saved if (storage := ref()) is not None}


@pytest.mark.parametrize(
    "saving", [Blocks(), Segments(2), Schedule(((((2,), 1), 1), (2,), 2)), Selective(), Offloaded()], ids=repr
)
def test_nothing_is_held_after_the_backward_nor_by_a_cycle(saving: Saving):
    objective, batch = made(TanhBlock, 8)
    watching = Watching()
    gc.collect()
    gc.disable()
    try:
        with memory_events.observe(watching):
            Reverse(saving).estimate(objective, batch, KEY)
        alive = watching.alive() - {id(batch.untyped_storage())}
    finally:
        gc.enable()
    assert watching.saved
    assert alive == set()


def test_regions_are_freed_as_the_backward_passes_them():
    """When a block's gradient is computed, only the inputs of the regions before it remain."""
    objective, batch = made(TanhBlock, 16)
    watching, seen = Watching(), []

    def use(name: str, gradient: Tensor) -> None:
        seen.append(len(watching.alive()))

    with memory_events.observe(watching):
        Reverse(Schedule((((1,),) * 4,) * 4)).stream(objective, batch, KEY, use)
    assert len(seen) == 16
    # Inputs of the segments up to here, and of the blocks of this one up to here: of the last block, 4 and 3.
    for block, held in zip(reversed(range(16)), seen, strict=True):
        assert held <= (block // 4 + 1) + block % 4 + 2, (block, held)
    assert seen[-1] <= 3


class Skipping(nn.Module):
    """The last block takes the first one's output: inside one region, but not from the block before."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Joining() for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.blocks[0](x, x)
        for block in self.blocks[1:]:
            x = block(x, first)
        return x


class Joining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) * torch.sigmoid(skip)


@pytest.mark.parametrize("saving", [Blocks(), Segments(1), Schedule((((1, (1,), 1), 1),))], ids=repr)
def test_a_backward_that_is_never_run_leaves_nothing_behind(saving: Saving):
    """A region that held the graph of an input from inside it would never be freed."""
    objective, batch = Objective(Skipping(), squared), torch.randn(BATCH, WIDTH)
    assert same(gradients(objective, batch, saving), gradients(objective, batch, Everything()))
    watching = Watching()
    with memory_events.observe(watching), torch.enable_grad(), saving.applied(objective, batch):
        loss = squared(objective.model, batch * 1.0)
    assert watching.alive()
    del loss
    assert watching.alive() == set()


# ---- what a block may do


def test_an_input_that_is_changed_in_place_is_kept_or_an_error_and_not_another_gradient():
    class Changing(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.sin(x @ torch.eye(WIDTH))
            out = self.blocks[0](x)
            x.mul_(2.0)
            return self.blocks[1](out)

    objective, batch = Objective(Changing([TanhBlock(), TanhBlock()]), squared), torch.randn(BATCH, WIDTH)
    # Nothing is checked while memory is observed.
    with (
        memory_events.observe(Watching()),
        pytest.raises(RuntimeError, match=r"changed in place before the backward.*Use Everything\(\)"),
    ):
        Reverse(Blocks()).estimate(objective, batch, KEY)
    with pytest.warns(Note, match=r"blocks\.0 \(TanhBlock\) is not recomputed .* changed in place"):
        found = gradients(objective, batch, Blocks())
    assert same(found, gradients(objective, batch, Everything()))


def test_a_kept_output_that_is_overwritten_is_computed_again():
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True))

    objective, batch = made(block, 2)
    for saving in (Selective(), Blocks()):
        assert same(gradients(objective, batch, saving), gradients(objective, batch, Everything()))


def test_a_block_sees_that_two_of_its_arguments_are_one():
    class Twice(Chain):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, x)
            return x

    class Either(Joining):
        def forward(self, x: Tensor, skip: Tensor) -> Tensor:
            return torch.tanh(self.linear(x)) if x is skip else self.linear(x) * torch.sigmoid(skip)

    objective, batch = Objective(Twice([Either(), Either()]), squared), torch.randn(BATCH, WIDTH)
    for saving in (Blocks(), Segments(1)):
        assert same(gradients(objective, batch, saving), gradients(objective, batch, Everything()))


def test_a_graph_that_is_kept_can_be_differentiated_twice():
    objective, batch = made(TanhBlock, 6)
    weights = [leaf.parameter for leaf in objective.leaves]
    with torch.enable_grad(), Schedule((((2,), (1,), 1), 2)).applied(objective, batch):
        loss = squared(objective.model, batch)
        twice = [torch.autograd.grad(loss, weights, retain_graph=True) for _ in range(2)]
    assert same([*twice[0]], [*twice[1]])


# ---- fakes and modes


@pytest.mark.parametrize(
    "saving",
    [Blocks(), Schedule((((1,), 1), 1)), Schedule((((1,), (1,), 1),)), Selective(), Offloaded()],
    ids=repr,
)
def test_a_saving_runs_on_fake_tensors_with_the_peak_of_real_ones(saving: Saving):
    real, batch = OBJECTIVES["transformer"].make()
    peaks = []
    with Alive() as alive:
        Reverse(saving).estimate(real, batch, KEY)
    peaks.append(alive.peak)
    with FakeTensorMode() as mode:
        model, _, _ = OBJECTIVES["transformer"].build()
        objective = Objective(model, real.loss)
        fakes = tuple(mode.from_tensor(part) for part in batch)
        with Alive() as alive:
            Reverse(saving).estimate(objective, fakes, KEY)
        peaks.append(alive.peak)
    assert peaks[0] == peaks[1]


def test_offloading_copies_a_storage_once_and_never_a_weight():
    offloaded: list[Tensor] = []

    class Recorder:
        def on_tag(self, kind: str, tensor: Tensor) -> None:
            if kind == "elsewhere":
                offloaded.append(tensor)

    objective, batch = made(TanhBlock, 3)
    with memory_events.observe(Recorder()):
        gradients(objective, batch, Offloaded())
    # A block's sigmoid and tanh (linear saves the sigmoid again), and the square's input.
    assert len(offloaded) == 3 * 2 + 1
    assert {tensor.numel() for tensor in offloaded} == {BATCH * WIDTH}
