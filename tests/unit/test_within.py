"""Backpropagation within a budget: never over it, as little recomputed as can be, and the same bits."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradcost
from gradcost import SGD, AdamW, Key, Objective, Reverse, backprop, forecast
from gradcost.checkpointing import Schedule
from gradcost.checkpointing.schedule_cost import peak, recomputed
from gradcost.checkpointing.schedules import has_parts
from gradcost.core.isolation import seeded_generators
from gradcost.core.pytree import tensors
from gradcost.core.units import size
from gradcost.instruments.flops import OpCounter
from gradcost.instruments.memory import MemoryTracker
from gradcost.planning import Within, block_profile
from gradcost.planning.forecasts import Forecasts
from gradcost.planning.within import MemoryTradeoff
from gradcost.tasks.architectures import Gpt
from gradcost.training.train_state import TrainState
from tables import OBJECTIVES, cross_entropy

KEY = Key(24)
Made = tuple[Objective, Any]


def gpt(layers: int = 24, dropout: float = 0.0) -> Made:
    with seeded_generators(Key(1)):
        words = torch.randint(17, (4, 13))
        model = Gpt(layers=layers, width=16, heads=2, dropout=dropout).build((12,), 17)
    return Objective(model, cross_entropy), (words[:, :-1], words[:, 1:])


def unequal() -> Made:
    """Twelve blocks of other widths, depths and activations each."""
    widths = (8, 64, 16, 128, 32, 8, 96, 24, 64, 8, 48, 16, 4)
    with seeded_generators(Key(2)):
        blocks = []
        for number, (one, other) in enumerate(pairwise(widths)):
            wide = 32 * (1 + number % 3)
            blocks.append(nn.Sequential(nn.Linear(one, wide), nn.Tanh(), nn.Linear(wide, other), nn.GELU()))
        batch = torch.randn(32, 8), torch.randint(4, (32,))
    return Objective(nn.Sequential(*blocks), cross_entropy), batch


def followed(objective: Objective, batch: Any, estimator: Reverse) -> tuple[int, int]:
    """The tracked peak and the FLOPs of a real estimate."""
    live, counted = MemoryTracker(objective.model), OpCounter(objective.model)
    live.register("inputs", (leaf for leaf in batch if isinstance(leaf, Tensor)))
    for instrument in (live, counted):
        with instrument.followed():
            TrainState(objective, estimator, None).step(batch, KEY)
    return live.memory().peak, counted.counts.flops


@pytest.mark.parametrize("make", [pytest.param(gpt, marks=pytest.mark.slow), unequal])
def test_at_ten_budgets_the_peak_keeps_to_it_and_no_bit_changes(make: Callable[[], Made]):
    objective, batch = make()
    tradeoff = MemoryTradeoff(objective, batch)
    plain = dict(backprop().estimate(objective, batch, KEY).gradient.leaves())
    most, flops = followed(objective, batch, backprop())
    least = tradeoff.peak(0)
    again = []
    for tenth in range(10):
        budget = least + (most - least) * tenth // 9
        estimator = Reverse(Within(budget))
        measured, needed = followed(objective, batch, estimator)
        assert measured <= budget
        chosen = tradeoff.cheapest(budget)
        assert measured == chosen.peak
        assert needed - flops == chosen.flops
        again.append(chosen.flops)
        for name, gradient in estimator.estimate(objective, batch, KEY).gradient.leaves():
            assert torch.equal(gradient, plain[name])
    assert again == sorted(again, reverse=True)
    assert again[-1] == 0, "with room for everything nothing is computed again"
    assert again[0] > 0


@pytest.mark.parametrize(("make", "slack"), [pytest.param(gpt, 0.002, marks=pytest.mark.slow), (unequal, 0.015)])
def test_the_figures_of_single_blocks_tell_the_peak_of_the_whole(make: Callable[[], Made], slack: float):
    """So the choice by them is the best there is: next to nothing is lost between the figures and the step.

    (Of unequal blocks some keep less beside their input than is thought, never more.)
    """
    objective, batch = make()
    tradeoff = MemoryTradeoff(objective, batch)
    for index in range(0, len(tradeoff.points), max(1, len(tradeoff.points) // 8)):
        assert tradeoff.peak(index) == pytest.approx(tradeoff.points[index].peak, rel=slack)


@pytest.mark.parametrize("name", ["mlp", "transformer", "cnn"])
def test_it_serves_the_objectives_of_the_laws(name: str):
    """With dropout, in-place activations, a tied head; whole and in micro-batches."""
    objective, batch = OBJECTIVES[name].make()
    for whole in (objective, objective.in_micro_batches(3)):
        least = MemoryTradeoff(whole, batch).peak(0)
        plain, found = (e.estimate(whole, batch, KEY) for e in (backprop(), Reverse(Within(least))))
        for (_, one), (_, other) in zip(plain.gradient.leaves(), found.gradient.leaves(), strict=True):
            assert torch.equal(one, other)


def test_a_budget_that_is_too_small_names_the_least_that_would_do():
    objective, batch = gpt(4)
    least = MemoryTradeoff(objective, batch).peak(0)
    objection = Reverse(Within(least - 1)).objection(objective, batch)
    assert objection is not None
    fixed = [*objective.model.parameters(), *objective.model.buffers(), *tensors(batch)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in fixed}
    assert objection == (
        f"{least - 1:,} bytes are too few: the smallest peak of an exact gradient of the whole batch is {least:,} "
        f"bytes ({size(least)}), with the checkpointing schedules that were tried. Of these, "
        f"{sum(storages.values()):,} bytes are parameters, buffers and batch. Micro-batches (Accumulated) may need "
        "less."
    )
    assert Reverse(Within(least)).objection(objective, batch) is None
    with pytest.raises(ValueError, match="bytes are too few: the smallest peak"):
        Reverse(Within(1000)).estimate(objective, batch, KEY)
    with pytest.raises(ValueError, match="bytes are too few: the smallest peak"):
        forecast(Reverse(Within(1000)), objective, batch)


def test_a_budget_for_the_whole_step_leaves_room_for_the_optimizer():
    objective, batch = gpt(3)
    for optimizer in (SGD(1e-3, momentum=0.9), AdamW(1e-3)):
        least = MemoryTradeoff(objective, batch, optimizer).peak(0)
        for budget in (least, least * 5 // 4):
            choice, found = Forecasts(objective, batch, optimizer, None).within(budget)
            assert isinstance(choice, Reverse)
            assert isinstance(choice.saving, Within)
            assert choice.saving.bytes == budget
            assert choice.saving.beside > 0
            again = forecast(choice, objective, batch, optimizer)
            assert again.peak <= budget
            assert not isinstance(found, str)
            assert found.peak == again.peak


def test_a_model_without_a_chain_is_refused_with_a_way_out():
    objective, batch = OBJECTIVES["tiny"].make()
    objection = Reverse(Within(2**20)).objection(objective, batch)
    assert objection is not None
    assert "no repeated blocks" in objection
    assert "use Everything()" in objection


def test_blocks_that_are_used_out_of_order_are_refused_with_a_way_out():
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for number in (0, 2, 1, 2):
                x = torch.tanh(self.blocks[number](x))
            return x

    objective = Objective(Skips(), lambda model, x: model(x).square().mean())
    objection = Reverse(Within(2**20)).objection(objective, torch.randn(4, 6))
    assert objection is not None
    assert "not run once each, one after the other" in objection


@pytest.mark.parametrize(("bytes", "beside"), [(0, 0), (-1, 0), (5, 5), (5, -1)])
def test_a_budget_is_more_than_what_lies_beside(bytes: int, beside: int):
    with pytest.raises(ValueError, match="the budget must exceed beside"):
        Within(bytes, beside)


def test_finding_a_schedule_disturbs_nothing():
    objective, batch = gpt(4, dropout=0.1)
    before = {name: tensor.clone() for name, tensor in objective.model.state_dict().items()}
    ids = [id(parameter) for parameter in objective.model.parameters()]
    state = torch.random.get_rng_state()
    least = MemoryTradeoff(objective, batch).peak(0)
    Reverse(Within(least)).estimate(objective, batch, KEY)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [id(parameter) for parameter in objective.model.parameters()] == ids
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.model.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in objective.modules)


def test_a_schedule_by_hand_costs_what_the_laws_of_schedules_say():
    """`schedules.peak` and `schedules.recomputed` on the figures of a real chain, against the real run."""
    from gradcost.planning.block_profile import profile
    from gradcost.planning.fake_model import on_fakes

    objective, batch = gpt(8)
    with on_fakes(objective, batch, "cpu") as (fake, fake_batch):
        figures = profile(fake, fake_batch, 1)
    _, flops = followed(objective, batch, backprop())
    nested = ((1,),) * 8, ((2,), (2,), 4), (((1,), (1,), 1), ((1,), 2), 2), (8,)
    for items in (*nested, ((0, 1),) * 8, (((0, 0, 1), 1, 0, 1), (0, 0, 1), 4)):
        measured, needed = followed(objective, batch, Reverse(Schedule(items)))
        assert measured == pytest.approx(figures.base + peak(items, figures.stages, figures.epilogue), rel=0.002)
        assert needed - flops == recomputed(items, figures.stages)


def test_parts_of_a_block_need_less_memory_than_the_block(monkeypatch: pytest.MonkeyPatch):
    objective, batch = gpt(8)
    least = MemoryTradeoff(objective, batch).least()
    assert has_parts(least.items)
    assert followed(objective, batch, Reverse(Schedule(least.items)))[0] == least.peak
    monkeypatch.setattr(block_profile, "MOST_PARTS", 1)
    whole = MemoryTradeoff(*gpt(8)).least()
    assert not has_parts(whole.items)
    assert least.peak < 0.93 * whole.peak


def test_casting_is_followed():
    """Blocks are looked at with the autocast that is on when they run, and a schedule keeps to its budget."""
    objective, batch = gpt(6)

    def cast(model: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[0])
        return F.cross_entropy(logits.float().flatten(0, 1), batch[1].flatten())

    casting = Objective(objective.model, cast)
    tradeoff = MemoryTradeoff(casting, batch)
    for budget in (tradeoff.peak(0), (tradeoff.peak(0) + tradeoff.points[-1].peak) // 2):
        assert followed(casting, batch, Reverse(Within(budget)))[0] <= budget


def test_it_is_public_and_prints_itself():
    assert repr(gradcost.planning.Within(2**20)) == "Within(bytes=1048576, beside=0)"
    assert re.fullmatch(r"Reverse\(saving=Within\(bytes=9, beside=0\)\)", repr(Reverse(Within(9))))
