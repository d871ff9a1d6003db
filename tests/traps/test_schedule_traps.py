"""Schedules within a budget: blocks that checkpoint, give objects, or are no plain chain."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcost import Key, Objective, Reverse, backprop, checkpoint, checkpointed, forecast, plan
from gradcost.checkpointing import Blocks, Segments
from gradcost.checkpointing.optimal import frontier
from gradcost.checkpointing.schedule_cost import Epilogue, Stage
from gradcost.checkpointing.schedules import joined, schedule_length
from gradcost.core.notes import Note
from gradcost.planning import Within
from gradcost.planning.schedule_search import neighbours
from gradcost.planning.within import MemoryTradeoff

MEAN = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()  # noqa: E731


def pair(width: int = 8) -> Any:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, width, generator=generator), torch.randn(6, width, generator=generator)


def words() -> Any:
    ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


def model_loss(model: Any, batch: Any) -> Tensor:
    return model(**batch).loss


# ---- blocks that are followed alone

of_a_global = random.Random(3)
DRAWS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand(()),
    "NumPy": lambda: float(np.random.rand()),
    "random": lambda: random.random(),
    "a global": lambda: of_a_global.random(),
}


class Drawing(nn.Linear):
    draw = staticmethod(DRAWS["torch"])

    def forward(self, input: Tensor) -> Tensor:
        return torch.tanh(super().forward(input) * self.draw())


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_blocks_that_are_followed_alone_take_no_draws_of_the_users_generators(draw: Callable[[], Any]):
    class Block(Drawing): ...

    Block.draw = staticmethod(draw)

    def drawn_after(use: Callable[[nn.Module, Tensor], object]) -> list[float]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        of_a_global.seed(3)
        use(nn.Sequential(*(Block(16, 16) for _ in range(6))), torch.randn(64, 16))
        return [float(draw()) for draw in DRAWS.values()]

    def planned(model: nn.Module, x: Tensor) -> None:
        plan(Objective(model, lambda model, x: model(x).square().mean()), x, 60_000)

    def trained(model: nn.Module, x: Tensor) -> None:
        with checkpoint(model, Within(60_000)):
            model(x)

    assert drawn_after(planned) == drawn_after(lambda model, x: None)
    assert drawn_after(trained) == drawn_after(lambda model, x: model(x))


def small_llama(reentrant: bool | None) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=32, use_cache=False,
        )
    ).train()  # fmt: skip
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


@pytest.mark.slow
def test_a_models_own_checkpointing_does_not_change_the_schedule():
    objective = Objective(small_llama(None), model_loss)
    budget = int(0.85 * forecast(backprop(), objective, words()).peak)
    expected = Within(budget).schedule(objective, words())
    for reentrant in (False, True):
        assert Within(budget).schedule(Objective(small_llama(reentrant), model_loss), words()) == expected


@dataclass
class Carried:
    x: Tensor
    depth: int


class Carrying(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, carried: Any) -> Any:
        return Carried(carried.x + torch.tanh(self.linear(carried.x)), carried.depth + 1)


class Chain(nn.Module):
    def __init__(self, block: type[nn.Module], start: Callable[[Tensor], Any], end: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(8, 8), nn.ModuleList([block() for _ in range(4)])
        self.start, self.end = start, end

    def forward(self, x: Tensor) -> Tensor:
        carried = self.start(self.first(x))
        for block in self.blocks:
            carried = block(carried)
        return self.end(carried)


class Nothing(nn.Module):
    """A block that gives no tensor: it writes into a tensor that the model holds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, held: list[Tensor]) -> None:
        held[0] = torch.tanh(self.linear(held[0]))


class Holding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Nothing() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        held = [x]
        for block in self.blocks:
            block(held)
        return held[0]


def test_blocks_that_give_a_dataclass_have_a_schedule():
    objective = Objective(Chain(Carrying, lambda x: Carried(x, 0), lambda carried: carried.x), MEAN)
    tradeoff = MemoryTradeoff(objective, pair())
    assert tradeoff.is_chain
    assert len(tradeoff.points) > 1
    for budget in (tradeoff.least().peak, tradeoff.points[-1].peak):
        assert Reverse(Within(budget)).objection(objective, pair()) is None


def test_blocks_that_give_no_tensor_are_refused_with_a_way_out():
    objection = Reverse(Within(1 << 20)).objection(Objective(Holding(), MEAN), pair())
    assert objection is not None
    assert "Nothing" in objection
    assert "use Blocks()" in objection


# ---- blocks that are no plain chain


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return self.down(F.gelu(self.up(x if skip is None else x + skip)))


class Stream(nn.Module):
    """The residual stream lies outside of the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(8, 16), nn.ModuleList([Wide() for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.first(x)
        for block in self.blocks:
            x = block(x) + first
        return x[:, :8]


class Skips(Stream):
    """A small U-Net: later blocks also get the outputs of earlier ones."""

    def forward(self, x: Tensor) -> Tensor:
        one = self.blocks[0](self.first(x))
        two = self.blocks[1](one)
        return self.blocks[3](self.blocks[2](two, two), one)[:, :8]


class EncoderDecoder(Stream):
    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        memory = self.blocks[1](self.blocks[0](first))
        return self.blocks[3](self.blocks[2](first, memory), memory)[:, :8]


def big_pair() -> Any:
    return torch.randn(64, 8), torch.randn(64, 8)


@pytest.mark.parametrize("model", [Stream, Skips, EncoderDecoder])
def test_within_serves_what_blocks_serves_where_blocks_are_no_chain(model: type[nn.Module]):
    batch = big_pair()
    objective = Objective(model(), MEAN)
    assert not MemoryTradeoff(objective, batch).is_chain
    peaks = {saving: forecast(Reverse(saving), objective, batch) for saving in (Blocks(), Segments(1), Segments(2))}
    plain = dict(backprop().estimate(objective, batch, Key(1)).gradient.leaves())
    for budget in {result.peak for result in peaks.values()}:
        estimator = Reverse(Within(budget))
        assert estimator.objection(objective, batch) is None
        result = forecast(estimator, objective, batch)
        assert result.peak <= budget
        assert result.flops <= min(other.flops for other in peaks.values() if other.peak <= budget)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Note)
            for name, gradient in estimator.estimate(objective, batch, Key(1)).gradient.leaves():
                assert torch.equal(gradient, plain[name])


def test_a_note_says_that_the_schedule_was_searched():
    batch = big_pair()
    objective = Objective(Skips(), MEAN)
    budget = forecast(checkpointed(), objective, batch).peak
    with pytest.warns(Note, match="block 3 of Skips does not get the output of block 2 alone"):
        Reverse(Within(budget)).estimate(objective, batch, Key(1))


def test_one_byte_below_the_least_is_refused_and_the_sentence_is_true():
    batch = big_pair()
    for model in (Stream(), Skips(), EncoderDecoder()):
        objective = Objective(model, MEAN)
        least = MemoryTradeoff(objective, batch).least().peak
        assert least <= forecast(checkpointed(), objective, batch).peak
        assert f"of the whole batch is {least:,} bytes" in str(Reverse(Within(least - 1)).objection(objective, batch))


def test_neighbours_of_a_schedule_are_schedules_of_the_same_blocks():
    items: Any = (2, ((1,), 2), (3,), 1)
    found = set(neighbours(items))
    assert {schedule_length(other) for other in found} == {schedule_length(items)}
    assert {(3, (1,), (3,), 1)} <= set(neighbours((3, ((1,),), (3,), 1)))
    assert {(8,)} <= set(neighbours(((8,),)))
    assert all(joined(other) == other for other in found)


def test_no_region_contains_a_break():
    stages = [Stage(8, 32, 16, 48, 40, 10, 10)] * 4

    points = frontier(stages, Epilogue(8, 8, 8), breaks=(2,))
    assert len(points) > 2
    for point in points:
        start = 0
        for item in point.items:
            stop = start + schedule_length(item)
            assert isinstance(item, int) or not start < 2 < stop
            start = stop
