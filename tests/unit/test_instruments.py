"""The memory and FLOP trackers against arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradcost import Estimator, Jvp, Key, Objective, Probing, Reverse, backprop, checkpointed, forward_gradient, mezo
from gradcost.core.isolation import seeded_generators
from gradcost.instruments.flops import Counts, OpCounter
from gradcost.instruments.memory import Memory, MemoryTracker, Purpose


def followed(work: Callable[[], object], model: nn.Module | None = None) -> Memory:
    tracker = MemoryTracker(model or nn.Module())
    with tracker.followed():
        work()
    return tracker.memory()


def counted(work: Callable[[], object], model: nn.Module | None = None) -> Counts:
    with OpCounter(model or nn.Module()).followed() as counts:
        work()
    return counts


def test_a_storage_counts_once_until_its_last_view_is_freed():
    def work() -> None:
        a = torch.zeros(1000)
        view = a[10:]
        del a
        b = torch.zeros(10)
        del view
        del b

    memory = followed(work)
    assert (memory.peak, memory.operator) == (4040, "aten.zeros.default")
    assert memory.timeline == (4000, 4040, 40, 0)


def test_storages_that_existed_before_do_not_count():
    weights = torch.zeros(1000)

    def work() -> None:
        weights.add_(1)
        weights.view(10, 100).t()
        weights.mul(2)

    assert followed(work).peak == weights.nbytes
    tracker = MemoryTracker(nn.Module())
    tracker.register("inputs", [weights, weights[5:]])
    assert tracker.standing == 4000
    with tracker.followed():
        work()
    assert (tracker.memory().peak, tracker.memory().beyond) == (8000, 4000)


def test_sizes_round_up_to_blocks_and_a_resized_storage_is_tracked():
    tracker = MemoryTracker(nn.Module(), block=512)
    with tracker.followed():
        a = torch.zeros(1)
        a.untyped_storage().resize_(5000)
    assert tracker.memory().peak == 5120


def test_a_run_without_operations_is_an_error():
    with pytest.raises(ValueError, match="no operation was followed"):
        MemoryTracker(nn.Module()).memory()


def test_the_breakdown_sums_to_the_peak_with_operator_and_module():
    with seeded_generators(Key(0)):
        model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64))
        x = torch.randn(256, 32)
    objective = Objective(model, lambda model, batch: model(batch).square().mean())
    weights = sum(p.nbytes for p in model.parameters())
    purposes: list[tuple[Estimator, Purpose]]
    purposes = [(backprop(), "saved activations"), (forward_gradient(), "tangents and noise")]
    for estimator, purpose in purposes:
        tracker = MemoryTracker(model)
        tracker.register("inputs", [x])
        with tracker.followed():
            estimator.stream(objective, x, Key(0), lambda name, gradient: None)
        memory = tracker.memory()
        assert sum(memory.breakdown.values()) == memory.peak == max(memory.timeline)
        assert memory.breakdown["parameters"] == weights
        assert memory.breakdown["inputs"] == x.nbytes
        assert memory.breakdown[purpose] > 0
        assert memory.beyond == memory.peak - weights - x.nbytes
        assert memory.operator.startswith("aten.")
        assert memory.module in ("", "0", "1", "2")


def test_flops_of_products_are_counted_in_place_too():
    def work() -> None:
        torch.matmul(torch.zeros(3, 5), torch.zeros(5, 7))
        torch.zeros(3, 7).addmm_(torch.zeros(3, 5), torch.zeros(5, 7))

    counts = counted(work)
    assert (counts.flops, counts.matmuls) == (2 * 2 * 3 * 5 * 7, 2)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d])
def test_each_gradient_of_a_convolution_costs_as_much_as_the_convolution(layer: Callable[..., Any], groups: int):
    """torch counts the gradient of the weight of a convolution in groups as often as there are groups."""
    model = layer(6, 12, 3, padding=1, groups=groups)
    shape = (2, 6, 9, 7)[: 3 if layer is nn.Conv1d else 4]
    x = torch.randn(shape, requires_grad=True)
    forward = counted(lambda: model(x), model).flops
    places = x[:, 0].numel()  # with this padding, as many before as after
    assert forward == 2 * places * model.weight.numel()
    assert counted(lambda: model(x).sum().backward(), model).flops == 3 * forward
    x.requires_grad_(False)
    assert counted(lambda: model(x).sum().backward(), model).flops == 2 * forward


def test_every_byte_that_moves_and_every_module_that_computes_is_counted():
    model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU())
    x = torch.zeros(3, 5)
    with torch.no_grad():
        counts = counted(lambda: model(x), model)
    product, relu = 4 * (3 * 5 + 5 * 7 + 3 * 7), 4 * 2 * 3 * 7
    assert counts.moved == product + relu
    assert counts.work == {(2 * 3 * 5 * 7, product): 1, (0, relu): 1}
    assert counts.flops_by_module == {"0": 2 * 3 * 5 * 7}
    assert counts.elementwise == 3 * 7
    assert not counts.uncounted


def test_an_operator_without_a_formula_is_listed():
    assert counted(lambda: torch.linalg.qr(torch.eye(3))).uncounted == {"aten.linalg_qr": 1}


def test_random_numbers_that_are_added_to_weights_are_counted():
    model = nn.Linear(8, 4, bias=False)
    objective = Objective(model, lambda model, x: model(x).sum())
    x = torch.ones(2, 8)
    assert counted(lambda: mezo().estimate(objective, x, Key(0)), model).drawn == 2 * 32


def smollm2_like(layers: int = 4) -> tuple[Objective, Tensor]:
    """The shapes of SmolLM2-135M with fewer layers: width 576, 9 heads, 3 of keys, vocabulary 49,152, tied."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        use_cache=False,
    )
    with seeded_generators(Key(2)):
        model = transformers.LlamaForCausalLM(config)
        tokens = torch.randint(49152, (2, 65))

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        logits = model(input_ids=tokens[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return Objective(model, loss), tokens


def largest_module(objective: Objective) -> int:
    return max(sum(p.nbytes for p in module.parameters(recurse=False)) for module in objective.model.modules())


def peak(objective: Objective, work: Callable[[], object]) -> int:
    """Peak memory beyond the weights; the batch existed before and does not count."""
    return followed(work, objective.model).beyond


def test_probing_needs_little_more_than_a_forward_on_smollm2_shapes():
    objective, tokens = smollm2_like()
    forward = peak(objective, lambda: objective.evaluate(tokens, Key(0)))
    with sdpa_kernel(SDPBackend.MATH):
        by_math = peak(objective, lambda: objective.evaluate(tokens, Key(0)))
    difference = peak(objective, lambda: mezo().estimate(objective, tokens, Key(0)))
    forward_mode = peak(objective, lambda: Probing(Jvp()).estimate(objective, tokens, Key(0)))
    everything = peak(objective, lambda: Reverse().estimate(objective, tokens, Key(0)))
    assert difference - forward <= largest_module(objective)
    assert forward_mode - by_math <= by_math + largest_module(objective)
    assert difference < forward_mode < everything


def test_checkpointing_keeps_one_block_and_the_inputs_of_the_others():
    width, batch, blocks = 64, 512, 8
    with seeded_generators(Key(3)):
        inside = [nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)) for _ in range(blocks)]
        x = torch.randn(batch, width)
    objective = Objective(nn.Sequential(*(Residual(block) for block in inside)), lambda m, x: m(x).square().mean())
    activation = x.nbytes
    everything = peak(objective, lambda: backprop().stream(objective, x, Key(0), lambda name, gradient: None))
    recomputed = peak(objective, lambda: checkpointed().stream(objective, x, Key(0), lambda name, gradient: None))
    assert everything >= 2 * blocks * activation
    assert recomputed <= (blocks + 8) * activation


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)
