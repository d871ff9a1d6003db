"""Forecasts of deep models from copies with fewer blocks equal those of the whole model."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gradcost
from gradcost.checkpointing.policies import Schedule
from gradcost.checkpointing.schedules import joined, schedule_length
from gradcost.cli import spec
from gradcost.core.key import Key
from gradcost.integrations import transformers as integration
from gradcost.planning import copies
from gradcost.planning.batch import resized
from gradcost.planning.by_depth import ByDepth
from gradcost.planning.forecast import Forecast, evaluation, forecast
from gradcost.planning.forecasts import Forecasts
from gradcost.planning.repeated_blocks import Repeated, find_repeated, with_fewer
from gradcost.planning.visits import labels, shortened, visits
from gradcost.planning.within import Within
from gradcost.tasks.task import Batch, cross_entropy
from gradcost.training.customary import Customary

transformers = pytest.importorskip("transformers")
SLOW = pytest.mark.slow
WIDE = {"vocab_size": 300, "max_position_embeddings": 64, "num_attention_heads": 4}
SIZE = {"hidden_size": 128, "intermediate_size": 192, **WIDE}


@pytest.fixture(autouse=True)
def shallow_models_count_as_deep(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(copies, "_LEAST_BLOCKS", 6)


def llama(depth: int) -> nn.Module:
    config = transformers.LlamaConfig(num_hidden_layers=depth, num_key_value_heads=2, use_cache=False, **SIZE)
    return transformers.LlamaForCausalLM(config)


def gpt2(depth: int) -> nn.Module:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(n_embd=128, n_layer=depth, n_head=4, vocab_size=300, n_positions=64, **ends)
    config.use_cache = False
    return transformers.GPT2LMHeadModel(config)


def bert(depth: int) -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(num_hidden_layers=depth, **SIZE))


def qwen2(depth: int) -> nn.Module:
    config = transformers.Qwen2Config(num_hidden_layers=depth, num_key_value_heads=2, use_cache=False, **SIZE)
    return transformers.Qwen2ForCausalLM(config)


def opt(depth: int) -> nn.Module:
    sizes = {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 192}
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(num_hidden_layers=depth, use_cache=False, **sizes, **WIDE)
    )


def vit(depth: int) -> nn.Module:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(num_hidden_layers=depth, image_size=16, patch_size=4, num_labels=10, **sizes)
    )


def t5(depth: int) -> nn.Module:
    sizes = {"d_model": 128, "d_ff": 192, "d_kv": 32, "num_heads": 4, "vocab_size": 300}
    config = transformers.T5Config(num_layers=depth, decoder_start_token_id=0, use_cache=False, **sizes)
    return transformers.T5ForConditionalGeneration(config)


def alternating(depth: int) -> nn.Module:
    """Gemma-2: layers with a sliding window and layers without, in turn."""
    config = transformers.Gemma2Config(
        num_hidden_layers=depth, num_key_value_heads=2, head_dim=8, sliding_window=8, use_cache=False, **SIZE
    )
    return transformers.Gemma2ForCausalLM(config)


def chain(depth: int) -> nn.Module:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(16, 16), nn.Tanh())]
    return nn.Sequential(nn.Linear(24, 16), *layers, nn.Linear(16, 10))


def objective_of(make: Callable[[int], nn.Module], depth: int, examples: int = 4) -> tuple[gradcost.Objective, Any]:
    with torch.device("meta"):
        model = make(depth).train()
    labels = torch.zeros(examples, dtype=torch.int64)
    if make is chain:
        return gradcost.Objective(model, cross_entropy), Batch(torch.zeros(examples, 24), labels)
    if make is vit:
        batch = {"pixel_values": torch.zeros(examples, 3, 16, 16), "labels": labels}
        return gradcost.Objective(model, lambda model, batch: model(**batch).loss), batch
    tokens = torch.ones(examples, 16, dtype=torch.int64)
    if make is t5:
        batch = {"input_ids": tokens, "labels": tokens}
        return gradcost.Objective(model, lambda model, batch: model(**batch).loss), batch
    return integration.objective(model, examples, 16)


def figures(result: Forecast) -> dict[str, Any]:
    """Every figure of a forecast except the timeline."""
    memory = {name: value for name, value in vars(result.memory).items() if name != "timeline"}
    return {**vars(result), **vars(result.counts), **memory, "memory": None, "counts": None}


def assert_equal(
    estimator: str, objective: gradcost.Objective, batch: Any, optimizer: Any, device: str | None = None
) -> None:
    by_depth, parsed = ByDepth(objective, optimizer, device), spec.method(estimator)
    found, whole = by_depth.forecast(parsed, batch), forecast(parsed, objective, batch, optimizer, device)
    assert figures(found) == {**figures(whole), "cuda": None}
    assert by_depth.computed == [parsed]  # not by a simulation of the whole model


SGD, ADAMW = gradcost.SGD(0.1), gradcost.AdamW(1e-3)
CELLS = [
    (llama, 7, "backprop()", ADAMW),
    (gpt2, 7, "mezo()", SGD),
    pytest.param(bert, 8, "Accumulated(checkpointed(), 2)", ADAMW, marks=SLOW),
]
METHODS = (
    "backprop()",
    "checkpointed()",
    "Reverse(Selective())",
    "Reverse(Segments(3))",
    "mezo()",
    "spsa(probes=2)",
    "forward_gradient(probes=4)",
    "Accumulated(checkpointed(), 2)",
)
MORE = [
    (make, 7 + (place + number) % 3, examples, estimator, (None, SGD, ADAMW)[(place + number) % 3])
    for place, make in enumerate((llama, qwen2, gpt2, opt, bert, vit))
    for number, estimator in enumerate(METHODS)
    for examples in (2, 5)
    if examples % 2 == 0 or not estimator.startswith("Accumulated")
]
PERIODIC = [(alternating, 14, 4, estimator, SGD) for estimator in METHODS if "Segments" not in estimator]


@pytest.mark.parametrize(("make", "depth", "estimator", "optimizer"), CELLS)
def test_a_deep_model_is_computed_from_shallow_copies_to_the_byte(
    make: Any, depth: int, estimator: str, optimizer: Any
):
    assert_equal(estimator, *objective_of(make, depth), optimizer)


NESTED = "Reverse(Schedule(((1, ((1, (1,)),)), ((2,),), 2, (1,), (1,))))"
IN_PARTS = "Reverse(Schedule((((1, 0, 1), (0, 0, 1), 1, 0, 1), (0, 1), 1, (0, 1))))"
SCHEDULES = [
    (llama, 9, NESTED, None),
    pytest.param(gpt2, 8, "Reverse(Schedule(((3,), (1,), 4)))", SGD, marks=SLOW),
    pytest.param(llama, 8, IN_PARTS, SGD, marks=SLOW),
    pytest.param(gpt2, 8, "Reverse(Schedule((-3, (1,), 1, (1, 0, 1), -1)))", SGD, marks=SLOW),
]
MORE_SCHEDULES = [
    (make, 9, f"Reverse(Schedule({items}))", optimizer)
    for make in (llama, gpt2, bert)
    for optimizer in (None, SGD, ADAMW)
    for items in (
        "((4, (((2,),), ((1,),))), ((1,),), (((1,),),))",
        "(((((1,), (1,)),), 5, (1,), (1,)),)",
        "((2, (1,)), (2, (1,)), (((1,),),), 2)",
        "(((1,),), 4, (4,))",
        "(2, (1,), (1,), 1, ((((1,),),), 2), 1)",
        "(-4, 1, -1, (1,), 1, -1)",
        "(((0, 1), ((0, 1), 0, 1), 0, 0, 1), (0, 0, 0, 1), 1, ((1,), 1, 0, 1))",
    )
]


@pytest.mark.parametrize(("make", "depth", "estimator", "optimizer"), SCHEDULES)
def test_a_schedule_is_computed_from_short_ones_to_the_byte(make: Any, depth: int, estimator: str, optimizer: Any):
    assert_equal(estimator, *objective_of(make, depth), optimizer)


@pytest.mark.slow
def test_a_schedule_of_adapters_is_computed_to_the_byte():
    """The backward pass of a block begins with a product with a number, before the block runs again."""
    objective, batch = objective_of(llama, 9)
    objective, batch = integration.objective(integration.with_lora(objective.model, 128), 4, 16)
    assert_equal("Reverse(Schedule(((3, 1), 1, ((1,), 0, 1), (1,), 1)))", objective, batch, ADAMW)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "depth", "estimator", "optimizer"), MORE_SCHEDULES)
def test_every_figure_of_a_schedule_is_that_of_the_whole_model(make: Any, depth: int, estimator: str, optimizer: Any):
    assert_equal(estimator, *objective_of(make, depth), optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_random_schedules_are_computed_to_the_byte(dtype: torch.dtype, seed: int):
    objective, batch = objective_of(llama, 9)
    objective.model.to(dtype)
    optimizer = SGD if dtype is torch.float32 else None  # in 16 bits, leaves are small and move with other blocks'
    by_depth, draw = ByDepth(objective, optimizer, None), random.Random(seed)
    for _ in range(3):
        estimator = gradcost.Reverse(Schedule(random_items(draw, 9)))
        whole = forecast(estimator, objective, batch, optimizer)
        assert figures(by_depth.forecast(estimator, batch)) == figures(whole)
        assert by_depth.computed[-1] == estimator


def random_items(draw: random.Random, blocks: int, level: int = 0) -> Any:
    items: list[Any] = []
    while blocks:
        count = draw.randint(1, blocks)
        is_recorded = draw.random() < 0.4 or level > 3
        recorded = count if level or draw.random() < 0.5 else -count
        items.append(recorded if is_recorded else random_items(draw, count, level + 1))
        blocks -= count
    if level and isinstance(items[-1], int):
        items[-1:] = [*([items[-1] - 1] if items[-1] > 1 else []), *[0] * draw.randint(0, 2), 1]
    return joined(tuple(items))


@pytest.mark.parametrize("items", [(9,), ((1,),) * 9, ((3,), 2, ((2,), (1,), 1)), ((((4,), 2), (1,)), 2)])
def test_the_visits_of_a_step_are_those_of_the_schedule(items: Any):
    steps = visits(items)
    count = schedule_length(items)
    assert [step.block for step in steps[:count]] == list(range(count))
    kinds = [(step.block, fact[0]) for step in steps for fact in step.label[0]]
    backward = [block for block, kind in kinds if kind == "backward"]
    assert backward == list(reversed(range(count)))
    # Each block is recorded once: in the first forward pass or in the rerun before its backward pass.
    assert sorted(block for block, kind in kinds if kind.endswith("recorded")) == list(range(count))
    short = shortened(items, 1, set(labels(items)))
    assert set(labels(short)) >= set(labels(items))
    assert schedule_length(short) <= count


@pytest.mark.parametrize(
    "estimator",
    [pytest.param("checkpointed()", marks=SLOW), "Reverse(Offloaded())", pytest.param("mezo()", marks=SLOW)],
)
def test_a_step_for_cuda_is_computed_with_the_sizes_and_kernels_of_cuda(estimator: str):
    assert_equal(estimator, *objective_of(gpt2, 7), ADAMW, "cuda")


@pytest.mark.parametrize(
    ("device", "optimizer", "cases"),
    [
        ("cpu", ADAMW, [(6, None)]),
        *(
            pytest.param(device, optimizer, [(2, None), (5, None), (6, None), (12, None), (4, 8)], marks=SLOW)
            for device in ("cpu", "cuda")
            for optimizer in (None, ADAMW)
        ),
    ],
)
def test_many_micro_batches_and_other_batches_have_the_figures_of_the_whole_model(
    device: str, optimizer: Any, cases: list[tuple[int, int | None]]
):
    objective, batch = objective_of(llama, 7, examples=12)
    forecasts = Forecasts(objective, batch, optimizer, device)
    for parts, size in cases:
        estimator = gradcost.Accumulated(gradcost.checkpointed(), parts)
        found = forecasts.of(estimator, size)
        whole = forecast(estimator, objective, resized(batch, size or 12), optimizer, device)
        assert isinstance(found, Forecast)
        assert figures(found) == {**figures(whole), "cuda": None}


@pytest.mark.parametrize("estimator", [gradcost.backprop(), gradcost.mezo()], ids=repr)
def test_a_batch_with_fewer_examples_than_micro_batches_has_no_forecast_after_a_larger_one(estimator: Any):
    objective, batch = objective_of(llama, 7, examples=9)
    forecasts = Forecasts(objective, batch, None, None)
    assert isinstance(forecasts.of(gradcost.Accumulated(estimator, 3)), Forecast)
    found = forecasts.of(gradcost.Accumulated(estimator, 3), 2)
    assert found == "a batch of 2 cannot be cut into 3 micro-batches: use at most 2."


@pytest.mark.parametrize("depth", [pytest.param(5, marks=SLOW), 7])
def test_a_tensor_that_is_twice_in_a_batch_counts_once(depth: int):
    objective = objective_of(llama, depth)[0].with_loss(lambda model, batch: model(**batch).loss)
    tokens = torch.ones(12, 16, dtype=torch.int64)
    batch = {"input_ids": tokens, "labels": tokens}
    more = resized(batch, 20)
    assert more["input_ids"] is more["labels"]
    estimator = gradcost.Accumulated(gradcost.checkpointed(), 6)
    found = Forecasts(objective, batch, SGD, None).of(estimator)
    assert isinstance(found, Forecast)
    assert figures(found) == figures(forecast(estimator, objective, batch, SGD))


def test_the_whole_model_evaluates_one_batch_of_a_plan(monkeypatch: pytest.MonkeyPatch):
    depths: list[int] = []

    def recorded(objective: Any, *arguments: Any) -> Any:
        depths.append(len(objective.model.model.layers))
        return evaluation(objective, *arguments)

    monkeypatch.setattr(copies, "evaluation", recorded)
    objective, batch = objective_of(llama, 7, examples=8)
    methods = [gradcost.Accumulated(gradcost.checkpointed(), 2), gradcost.mezo()]
    gradcost.plan(objective, batch, 1 << 30, methods, optimizer=Customary(), device="cuda")
    assert depths.count(7) == 1
    assert {3, 4} < set(depths)


@pytest.mark.parametrize("share", [pytest.param(1.0, marks=SLOW), 0.8, pytest.param(0.6, marks=SLOW)])
def test_a_plan_for_cuda_tells_the_reserved_bytes_of_its_choice(share: float):
    objective, batch = objective_of(llama, 7)
    budget = int(share * forecast(gradcost.backprop(), objective, batch, SGD, "cuda").peak)
    methods = [gradcost.backprop(), gradcost.checkpointed(), gradcost.mezo()]
    found = gradcost.plan(objective, batch, budget, methods, optimizer=SGD, device="cuda")
    assert found.chosen is not None
    assert found.chosen.forecast is not None
    assert found.chosen.forecast.cuda is not None
    whole = forecast(found.chosen.estimator, objective, batch, SGD, "cuda")
    assert found.chosen.forecast.peak == whole.peak
    assert found.chosen.forecast.cuda == whole.cuda
    others = [row.forecast for row in found.rows if row is not found.chosen and row.forecast is not None]
    assert {other.cuda for other in others} == {None}


def test_a_model_of_15_blocks_is_simulated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    objective, batch = objective_of(llama, 15)
    by_depth = ByDepth(objective, None, None)
    by_depth.forecast(gradcost.backprop(), batch)
    assert by_depth.computed == []


@pytest.mark.slow
@pytest.mark.parametrize(("make", "depth", "examples", "estimator", "optimizer"), MORE + PERIODIC)
def test_every_figure_is_that_of_the_whole_model(
    make: Any, depth: int, examples: int, estimator: str, optimizer: Any
):
    assert_equal(estimator, *objective_of(make, depth, examples), optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", METHODS)
@pytest.mark.parametrize("examples", [2, 6])
def test_an_encoder_and_a_decoder_have_the_figures_of_the_whole_model(examples: int, estimator: str):
    objective, batch = objective_of(t5, 8, examples)
    parsed = spec.method(estimator)
    assert figures(ByDepth(objective, SGD, None).forecast(parsed, batch)) == figures(
        forecast(parsed, objective, batch, SGD)
    )


class Wider(nn.Module):
    """Equal layers, of which the one at `place` runs on twice the examples: its attribute is not in its `repr`."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(torch.cat([x, x]))[: len(x)] if number == self.place else layer(x)
        return x


@pytest.mark.parametrize("place", [1, 5, 7])
def test_a_block_that_costs_more_than_its_equals_is_simulated(place: int):
    objective = gradcost.Objective(Wider(place), lambda model, x: model(x).square().mean())
    by_depth, batch = ByDepth(objective, SGD, None), torch.zeros(4, 8)
    assert figures(by_depth.forecast(gradcost.backprop(), batch)) == figures(
        forecast(gradcost.backprop(), objective, batch, SGD)
    )
    assert by_depth.computed == []


@pytest.mark.parametrize("estimator", ["Reverse(Segments(2))", "Probing(Jvp(1), Coordinates(), 1)"])
def test_an_estimator_that_depends_on_the_number_of_blocks_is_simulated(estimator: str):
    objective, batch = objective_of(chain, 8)
    by_depth, parsed = ByDepth(objective, None, None), spec.method(estimator)
    assert figures(by_depth.forecast(parsed, batch)) == figures(forecast(parsed, objective, batch))
    assert by_depth.computed == []


def test_a_loss_that_uses_another_reference_to_the_model_is_simulated():
    model = chain(8)
    objective = gradcost.Objective(model, lambda _, batch: cross_entropy(model, batch))
    batch = Batch(torch.zeros(4, 24), torch.zeros(4, dtype=torch.int64))
    by_depth = ByDepth(objective, None, None)
    assert (
        by_depth.forecast(gradcost.backprop(), batch).flops == forecast(gradcost.backprop(), objective, batch).flops
    )
    assert by_depth.computed == []


def test_repeated_parts_have_a_start_a_period_and_a_count():
    objective = objective_of(chain, 8)[0]
    assert find_repeated(objective) == (Repeated("", 1, 2, 8),)
    assert find_repeated(objective_of(alternating, 8)[0]) == (Repeated("model.layers", 0, 2, 4),)
    part = Repeated("model.layers", 2, 2, 4)
    assert part.unit("model.layers.5.mlp.up") == (1, "1.mlp.up")
    assert part.module(1, "1.mlp.up") == "model.layers.5.mlp.up"
    assert [part.unit(name) for name in ("model.layers.1", "model.layers.10", "model.norm")] == [None, None, None]


def test_a_copy_with_fewer_blocks_shares_the_parameters():
    torch.manual_seed(0)
    objective = gradcost.Objective(chain(8), cross_entropy)
    before = len(objective.model)  # type: ignore[arg-type]
    copy, (part,) = with_fewer(objective, find_repeated(objective), 3)
    assert (len(copy.model), len(objective.model), part.count) == (before - 10, before, 3)  # type: ignore[arg-type]
    own = {id(parameter) for parameter in objective.model.parameters()}
    assert {id(parameter) for parameter in copy.model.parameters()} < own
    batch = Batch(torch.zeros(4, 24), torch.zeros(4, dtype=torch.int64))
    assert copy.evaluate(batch, Key(0)).isfinite()


def test_an_unfrozen_subset_of_the_parameters_stays_the_subset():
    objective = gradcost.Objective(chain(8), cross_entropy).only(["0.weight", "17.bias", "5.weight"])
    copy = with_fewer(objective, (Repeated("", 7, 2, 5),), 3)[0]
    assert [leaf.name for leaf in copy.leaves] == ["0.weight", "5.weight", "13.bias"]


def test_the_schedule_of_a_budget_is_not_extrapolated():
    objective, batch = objective_of(chain, 8)
    by_depth = ByDepth(objective, None, None)
    by_depth.forecast(gradcost.Reverse(Within(1 << 30)), batch)
    assert by_depth.computed == []
