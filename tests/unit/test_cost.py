"""The instruments of cost/, each against what arithmetic says."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradcost import SGD, Adam, Jvp, Key, Objective, Probing, Reverse, backprop, checkpointed, mezo, spsa
from gradcost.cost.clock import Timing, time_steps
from gradcost.cost.flops import CountedFlops
from gradcost.cost.measure import measure_step
from gradcost.cost.storage import LiveBytes
from gradcost.estimators.estimator import Estimator
from gradcost.objective import randomness


def test_live_bytes_counts_a_storage_once_and_until_its_last_view_is_gone():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        view = a[10:]
        assert live.now == 4000
        del a
        assert live.now == 4000
        del view
        assert live.now == 0
    assert live.peak == 4000


def test_live_bytes_does_not_count_what_was_there_before():
    weights = torch.zeros(1000)
    live = LiveBytes()
    live.ignore(weights)
    with live:
        weights.add_(1)
        weights.view(10, 100).t()
        product = weights * 2
    assert live.peak == product.nbytes


def test_flops_of_products_are_counted_in_place_too():
    with CountedFlops() as counted:
        torch.matmul(torch.zeros(3, 5), torch.zeros(5, 7))
        torch.zeros(3, 7).addmm_(torch.zeros(3, 5), torch.zeros(5, 7))
    assert (counted.flops, counted.matmuls) == (2 * 2 * 3 * 5 * 7, 2)


def test_a_clock_doubts_a_wide_spread_and_keeps_its_samples():
    assert Timing((1.0,) * 30, 0.0).doubt is None
    assert Timing((1.0,) * 30).doubt is None
    wide = Timing((1.0, 2.0) * 15, 0.0)
    assert wide.doubt is not None
    assert "spreads over" in wide.doubt
    turn = itertools.count()
    reading = time_steps(lambda: next(turn), samples=5, warmup=2, attempts=1)
    assert next(turn) == 2 + len(reading.samples) >= 7


def test_a_clock_sees_that_others_use_the_machine():
    """A spread is blind to it: threads that wait for one another on a shared core are slow in lock step."""
    spin = [sys.executable, "-c", "import time\nend = time.time() + 20\nwhile time.time() < end: pass"]
    others = [subprocess.Popen(spin) for _ in range(2)]
    try:
        reading = time_steps(lambda: time.sleep(0.01), samples=60, attempts=1)
    finally:
        for other in others:
            other.kill()
    if Path("/proc/stat").exists():
        assert (reading.others or 0.0) > 0.5
        assert "other programs" in (reading.doubt or "")
    else:
        assert reading.others is None


def linears(count: int, width: int) -> tuple[Objective, Tensor]:
    with randomness(Key(1)):
        layers = [nn.Linear(width, width, bias=False) for _ in range(count)]
        x = torch.randn(16, width)
    return Objective(nn.Sequential(*layers), lambda model, batch: model(batch).square().mean()), x


def test_an_optimizer_pays_for_its_state():
    objective, x = linears(4, 64)
    state = measure_step(objective, x, backprop(), Adam(1e-9)).peak_bytes
    none = measure_step(objective, x, backprop(), SGD(1e-9)).peak_bytes
    weights = 4 * 64 * 64 * 4
    assert state - none >= 2 * weights


@pytest.mark.parametrize(("estimator", "forwards"), [(backprop(), 11 / 4), (spsa(), 2), (mezo(probes=3), 6)])
def test_a_step_in_forwards_is_what_theory_says(estimator: Estimator, forwards: float):
    objective, x = linears(4, 64)
    assert measure_step(objective, x, estimator, SGD(1e-9)).forwards == forwards


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
    with randomness(Key(2)):
        model = transformers.LlamaForCausalLM(config)
        tokens = torch.randint(49152, (2, 65))

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        logits = model(input_ids=tokens[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return Objective(model, loss), tokens


def largest_module(objective: Objective) -> int:
    return max(sum(p.nbytes for p in module.parameters(recurse=False)) for module in objective.model.modules())


def peak(objective: Objective, work: object) -> int:
    live = LiveBytes()
    live.ignore(*objective.model.parameters(), *objective.model.buffers())
    with live:
        work()  # type: ignore[operator]
    return live.peak


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
    with randomness(Key(3)):
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
