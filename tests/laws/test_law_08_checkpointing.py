"""Law 8. The choice of what is saved for the backward pass changes no bit of the gradient or the loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
from gradcost.checkpointing.schedules import Items, joined
from gradcost.core import memory_events
from gradcost.core.blocks import find_blocks
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.reverse import Reverse
from tables import KEY as BUILD
from tables import OBJECTIVES, cross_entropy
from vectors import assert_same_estimate, estimated

KEY = Key(8)
Made = tuple[Objective, Any]


def assert_same_bits(objective: Objective, batch: Any, saving: Saving) -> None:
    leaves = assert_same_estimate(Reverse(), Reverse(saving), objective, batch, KEY)
    assert any(bool(one.any()) for one in leaves)


def drawn(blocks: int, draw: Random, depth: int = 3) -> Items:
    """Return a random nested schedule of this many blocks."""
    items: list[Any] = []
    while blocks:
        some = draw.randint(1, blocks)
        recorded = some if depth < 3 or draw.random() < 0.5 else -some
        items.append(recorded if depth == 0 or draw.random() < 0.3 else drawn(some, draw, depth - 1))
        blocks -= some
    if depth < 3 and isinstance(items[-1], int):  # the last block of a region may run again in parts
        items[-1:] = [*([items[-1] - 1] if items[-1] > 1 else []), *[0] * draw.randint(0, 3), 1]
    return joined(tuple(items))


def nested(blocks: int, several: int = 6) -> list[Saving]:
    """Return a comb (each region is all but the last block of the one around it), two levels, and random ones."""
    comb: Items = (1,)
    for _ in range(blocks - 1):
        comb = (comb, 1)
    draw = Random(blocks)
    fixed: list[Items] = [(comb,), (((1,),) * blocks,), ((0, 0, 1),) * blocks, (-1, *((1,),) * (blocks - 1))]
    return [*dict.fromkeys(Schedule(items) for items in (*fixed, *(drawn(blocks, draw) for _ in range(several))))]


def savings(blocks: int) -> list[Saving]:
    segments = [Segments(count) for count in range(1, blocks + 1)]
    selective = [Selective(), Selective((Attention(),)), Selective((Matmuls(),))]
    return [Blocks(), *segments, *nested(blocks), *selective, Offloaded()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "saving"),
    [(name, saving) for name, problem in OBJECTIVES.items() if problem.blocks for saving in savings(problem.blocks)],
    ids=str,
)
def test_recomputing_changes_no_bit(name: str, saving: Saving, dtype: torch.dtype):
    assert_same_bits(*OBJECTIVES[name].make(dtype), saving)


@pytest.mark.parametrize("name", ["mlp", "transformer", "cnn"])
@pytest.mark.parametrize("saving", [Blocks(), Segments(2), 0, 1, Selective(), Offloaded()], ids=repr)
def test_recomputing_changes_no_bit_of_micro_batches_nor_under_autocast(name: str, saving: Saving | int):
    objective, batch = OBJECTIVES[name].make()
    if isinstance(saving, int):
        saving = nested(OBJECTIVES[name].blocks)[saving]
    assert_same_bits(objective.in_micro_batches(3), batch, saving)
    cast = Objective(objective.model, lambda model, batch: autocast(objective, batch))
    assert_same_bits(cast, batch, saving)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(objective, batch, saving)


def autocast(objective: Objective, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return objective.loss(objective.model, batch).float()


# ---- models with structures that recomputation must handle


def chain(*modules: nn.Module) -> Made:
    return Objective(nn.Sequential(*modules), cross_entropy), (torch.randn(7, 6), torch.randint(3, (7,)))


def shared_activation() -> Made:
    """`Sequential.children()` lists a module that occurs twice once."""
    tanh = nn.Tanh()
    return chain(nn.Linear(6, 8), tanh, nn.Linear(8, 8), tanh, nn.Linear(8, 3))


def dropped_and_normalised() -> Made:
    half = [nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(inplace=True)]
    return chain(nn.Linear(6, 8), *half, nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 3))


def encoder() -> Made:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 3), nn.Linear(8, 3))
    return Objective(model, cross_entropy), (torch.randn(7, 4, 8), torch.randint(3, (7, 4)))


def mapped() -> Made:
    """Blocks with several inputs and outputs, by position and by name, and a skip over two blocks."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, *, state: dict[str, Tensor], first: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            y = torch.tanh(self.a(x) + state["s"])
            return y + first, {"s": torch.sigmoid(self.b(state["s"])) * y}

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Pair() for _ in range(4)])

        def forward(self, x: Tensor) -> Tensor:
            first, state = x, {"s": x.square()}
            for number, block in enumerate(self.blocks):
                x, state = block(x, state=state, first=first)
                if number == 1:  # what the next block is given is not what the last one gave
                    x = x * 0.5
            return x + state["s"]

    return Objective(Chain(), cross_entropy), (torch.randn(7, 6), torch.randint(6, (7,)))


def shared_block() -> Made:
    """One set of weights used three times over, as in ALBERT."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                for block in self.blocks:
                    x = block(x)
            return x

    return Objective(Recurrent(), cross_entropy), (torch.randn(7, 6), torch.randint(6, (7,)))


def frozen_base() -> Made:
    """Only the last block and a bias in the first train: most inputs need no gradient."""
    objective, batch = chain(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    model = objective.model.requires_grad_(False)
    for parameter in (model[0].bias, model[4].weight):  # type: ignore[index]
        parameter.requires_grad_(True)  # type: ignore[union-attr]
    return Objective(model, cross_entropy), batch


def drawing_between() -> Made:
    """Draws between the blocks, which a layer may be left out by."""

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)) for _ in range(4)])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = nn.functional.dropout(x, 0.2)
                x = x if torch.rand([]) < 0.3 else block(x)
            return x

    return Objective(Dropping(), cross_entropy), (torch.randn(7, 6), torch.randint(6, (7,)))


def spectral() -> Made:
    """Buffers that a forward writes and reads."""
    norm = nn.utils.parametrizations.spectral_norm
    return chain(*(nn.Sequential(norm(nn.Linear(6, 6)), nn.Tanh()) for _ in range(4)), nn.Linear(6, 3))


def recurrent() -> Made:
    """Fused layers that overwrite their products."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.GRU(6, 6, batch_first=True) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)[0]
            return x

    return Objective(Stack(), cross_entropy), (torch.randn(5, 4, 6), torch.randint(6, (5, 4)))


SHAPES: dict[str, Callable[[], Made]] = {
    make.__name__: make
    for make in (
        shared_activation,
        dropped_and_normalised,
        encoder,
        mapped,
        shared_block,
        frozen_base,
        drawing_between,
        spectral,
        recurrent,
    )
}


@pytest.mark.parametrize("shape", SHAPES)
def test_recomputing_changes_no_bit_for_any_shape_of_a_chain(shape: str):
    with seeded_generators(BUILD):
        objective, batch = SHAPES[shape]()
    blocks = len(find_blocks(objective.model))
    assert blocks > 1
    for saving in savings(blocks):
        assert_same_bits(objective, batch, saving)


# ---- transformers' models, from tiny configurations

TINY: dict[str, Any] = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 32}


def llama() -> tuple[Any, Any, int]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**TINY, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)
    return LlamaForCausalLM, config, 3


def bert() -> tuple[Any, Any, int]:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification, BertConfig(**TINY, num_attention_heads=2, num_hidden_layers=2), 2


def gpt2() -> tuple[Any, Any, int]:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel, GPT2Config(vocab_size=31, n_positions=32, n_embd=16, n_layer=3, n_head=2), 3


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [llama, bert, gpt2], ids=lambda make: make.__name__)
def test_recomputing_changes_no_bit_for_transformers_models(make: Callable[[], tuple[Any, Any, int]], attention: str):
    """In training mode, with their dropout."""
    kind, config, layers = make()
    config._attn_implementation = attention
    with seeded_generators(BUILD):
        model = kind(config).train()
        words = torch.randint(31, (3, 9))
        labels = torch.randint(2, (3,)) if make is bert else words
    assert len(find_blocks(model)) == layers
    batch = {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels}
    plain = Objective(model, lambda model, batch: model(**batch, use_cache=False).loss)
    caching = Objective(model, lambda model, batch: model(**batch).loss)
    for saving in savings(layers):
        assert_same_bits(plain, batch, saving)
        # The cache that a model makes by default, and that a block would fill twice, copies keys and values to
        # another memory order: other kernels, so other last bits than without it.
        assert estimated(Reverse(saving), caching, batch, KEY) == pytest.approx(
            estimated(Reverse(), caching, batch, KEY), rel=1e-4, abs=1e-7
        )


@pytest.mark.parametrize("make", [llama, bert, gpt2], ids=lambda make: make.__name__)
def test_nested_schedules_change_no_bit_for_transformers_models_in_bfloat16(
    make: Callable[[], tuple[Any, Any, int]],
):
    kind, config, _ = make()
    config.num_hidden_layers = layers = 5
    with seeded_generators(BUILD):
        model = kind(config).train().to(torch.bfloat16)
        words = torch.randint(31, (3, 9))
        labels = torch.randint(2, (3,)) if make is bert else words
    batch = {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels}
    objective = Objective(model, lambda model, batch: model(**batch, use_cache=False).loss)
    for saving in [*nested(layers), Selective(), Offloaded()]:
        assert_same_bits(objective, batch, saving)


def test_accumulated_checkpointing_is_accumulated_backprop():
    objective, batch = OBJECTIVES["transformer"].make()
    plain, found = (
        Accumulated(Reverse(saving), 3).estimate(objective, batch, KEY) for saving in (Everything(), Blocks())
    )
    for (_, one), (_, other) in zip(plain.gradient.leaves(), found.gradient.leaves(), strict=True):
        assert torch.equal(one, other)


# ---- refusals


@pytest.mark.parametrize("saving", [Blocks(), Segments(2), Selective(), Schedule((1,))], ids=repr)
def test_a_model_without_blocks_is_refused_with_a_way_out(saving: Saving):
    for problem in OBJECTIVES.values():
        objective, batch = problem.make()
        objection = Reverse(saving).objection(objective, batch)
        if problem.blocks and saving == Schedule((1,)):
            assert objection is not None
            assert (
                f"is a schedule of 1 blocks, and {type(objective.model).__name__} has {problem.blocks}" in objection
            )
        elif problem.blocks:
            assert objection is None
        else:
            assert objection is not None
            assert "found no repeated blocks" in objection
            assert "use Everything()" in objection


def test_more_segments_than_blocks_are_refused_with_the_most_there_can_be():
    objective, batch = OBJECTIVES["mlp"].make()
    assert Reverse(Segments(3)).objection(objective, batch) is None
    objection = Reverse(Segments(4)).objection(objective, batch)
    assert objection is not None
    assert "use at most Segments(3)" in objection


class Observer:
    def on_tag(self, kind: str, tensor: Tensor) -> None:
        pass


def test_a_block_that_is_not_the_same_twice_is_kept_or_an_error_and_not_another_gradient():
    turns = itertools.cycle([False, True])

    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(torch.tanh(self.linear(x))) if next(turns) else self.linear(x)

    objective = Objective(nn.Sequential(Moody(), Moody()), lambda model, batch: model(batch).square().mean())
    batch = torch.randn(4, 6)
    # Nothing is checked while memory is observed.
    with memory_events.observe(Observer()), pytest.raises(RuntimeError, match=r"between calls. Use Everything\(\)"):
        Reverse(Blocks()).estimate(objective, batch, KEY)


def test_a_block_that_counts_its_calls_is_the_same_when_it_runs_again():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.calls = nn.Linear(6, 6), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return torch.tanh(torch.tanh(self.linear(x))) if self.calls == 1 else self.linear(x)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Counting(), Counting()])

        def forward(self, x: Tensor) -> Tensor:
            for block in (*self.blocks, *self.blocks):
                x = block(x)
            return x

    objective = Objective(Twice(), lambda model, batch: model(batch).square().mean())
    for saving in (Blocks(), Segments(1), Segments(2), Selective()):
        assert_same_bits(objective, torch.randn(4, 6), saving)
