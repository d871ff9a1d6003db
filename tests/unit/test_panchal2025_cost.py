"""The costs of the models of Panchal et al. 2025: layers in 4 bits, the forecasts, their records and the page."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn

from gradcost.core.errors import BadInput
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.estimators.presets import backprop
from gradcost.instruments.flops import OpCounter
from gradcost.instruments.memory import MemoryTracker
from gradcost.integrations.four_bit import GROUP, FourBitLinear, in_four_bits
from gradcost.papers.panchal2025 import cost_models
from gradcost.papers.panchal2025.cost import EAGER, FILE, FUSED, METHODS, CostKey, forecast_costs, read_costs
from gradcost.papers.panchal2025.cost_models import COST_MODELS, Case, CostModel, answers, classifier
from gradcost.papers.panchal2025.cost_page import REPRODUCED, CostTable, cost_page
from gradcost.papers.panchal2025.methods import method, methods
from gradcost.planning.forecast import forecast
from gradcost.tasks.pretrained import Lora
from gradcost.training.train_state import TrainState
from in_process import inside

RESULTS = Path(__file__).parents[2] / "docs" / "results"
LLAMA = dict(cost_models.LLAMA_8B) | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
QWEN: dict[str, Any] = dict(cost_models.QWEN2_VL_7B) | {
    key: LLAMA[key] for key in LLAMA if key.endswith("size") or key.startswith("num")
}
QWEN |= {"image_token_id": 30, "vision_start_token_id": 31, "vision_end_token_id": 32, "video_token_id": 33}
QWEN |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "bos_token_id": 1, "eos_token_id": 2}
QWEN |= {
    "vision_config": cost_models.QWEN2_VL_7B["vision_config"]
    | {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
}

# ---- layers in 4 bits


def layer(dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, FourBitLinear]:
    with seeded_generators(Key(4)):
        plain = nn.Linear(2 * GROUP, 6, dtype=dtype)
    return plain, FourBitLinear(plain.weight, plain.bias)


def test_a_weight_in_4_bits_is_within_half_a_level_of_the_weight():
    plain, stored = layer()
    groups = plain.weight.detach().view(6, 2, GROUP)
    half = groups.abs().amax(-1, keepdim=True) / 14
    error = (stored.dequantized().view_as(groups) - groups).abs()
    assert (error <= half * (1 + 1e-9)).all()
    assert error.max() > 0
    assert sum(each.nbytes for each in (stored.packed, stored.scale)) == 6 * GROUP + 6 * 2 * 8
    with pytest.raises(BadInput, match="multiple of 64 inputs, not 3"):
        FourBitLinear(torch.ones(2, 3))


def test_the_product_its_gradient_and_its_tangent_are_those_of_the_stored_weights():
    _, stored = layer()
    x = torch.randn(3, 2 * GROUP, dtype=torch.float64, requires_grad=True)
    weight, bias = stored.dequantized(), stored.bias
    assert bias is not None
    torch.testing.assert_close(stored(x), x @ weight.mT + bias)
    (gradient,) = torch.autograd.grad(stored(x).square().sum(), x)
    torch.testing.assert_close(gradient, 2 * (x @ weight.mT + bias) @ weight)
    tangent = torch.randn(3, 2 * GROUP, dtype=torch.float64)
    with torch.no_grad(), forward_ad.dual_level():
        found = forward_ad.unpack_dual(stored(forward_ad.make_dual(x.detach(), tangent))).tangent
    torch.testing.assert_close(found, tangent @ weight.mT)


def test_only_frozen_layers_of_the_blocks_are_stored_in_4_bits():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(GROUP, 2), nn.Linear(GROUP, 2)])})
    model["head"] = nn.Linear(GROUP, 2).requires_grad_(False)
    model["layers"][0].requires_grad_(False)  # type: ignore[index]
    stored = [type(each) for each in in_four_bits(nn.ModuleDict({"a": model}), ".layers.").modules()]
    assert stored.count(FourBitLinear) == 1
    assert stored.count(nn.Linear) == 2


# ---- forecasts


def real(case: Case) -> Case:
    """Give a case on the `meta` device random weights."""
    with seeded_generators(Key(7)):
        model = case.objective.model.to_empty(device="cpu")
        for parameter in model.parameters():
            if parameter.is_floating_point():
                nn.init.normal_(parameter, std=0.05)
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_(torch.linspace(1, 0.1, buffer.numel()))
    batch = case.batch
    if hasattr(batch, "pixels"):
        batch = batch._replace(pixels=torch.randn(batch.pixels.shape))
    return Case(Objective(model, case.objective.loss), batch)


CASES = {
    "Llama, base in 4 bits": partial(classifier, LLAMA, torch.float32, Lora(), True, FUSED),
    "Llama, all weights": partial(classifier, LLAMA, torch.float32, None, False, EAGER),
    "Qwen2-VL, base in 4 bits": partial(answers, QWEN, torch.float32, True, (4, 6), FUSED),
}


# The others are slow.
IN_DEFAULT = [("Llama, base in 4 bits", "FmAD-Vanilla"), ("Qwen2-VL, base in 4 bits", "BP-Checkpointing")]


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(*pair, marks=[] if pair in IN_DEFAULT else pytest.mark.slow)
        for pair in product(CASES, ["BP-Vanilla", "BP-Checkpointing", "FmAD-Vanilla", "MeZO"])
    ],
)
def test_the_forecast_is_the_measured_cost_of_a_step(case: str, name: str):
    """Layers in 4 bits and the vision-language model too: peak bytes and FLOPs of tiny models."""
    objective, batch = real(CASES[case]())
    estimator = method(name).estimator
    expected = forecast(estimator, objective, batch)
    state = TrainState(objective, estimator, None)
    state.step(batch, Key(1))
    tracker, counter = MemoryTracker(objective.model), OpCounter(objective.model)
    tracker.register("inputs", list(batch))
    with counter.followed(), tracker.followed():
        estimate = state.step(batch, Key(0))
    assert estimate.loss.isfinite()
    assert (expected.peak, expected.flops) == (tracker.memory().peak, counter.counts.flops)


def test_a_base_in_4_bits_saves_weights_and_no_activations_more():
    costs = {}
    for four_bits in (False, True):
        case = classifier(LLAMA, torch.bfloat16, Lora(), four_bits, FUSED)
        costs[four_bits] = forecast(backprop(), *case)
    assert costs[True].breakdown["saved activations"] == costs[False].breakdown["saved activations"]
    assert costs[True].flops == costs[False].flops
    saved = costs[False].breakdown["parameters"] - costs[True].breakdown["parameters"]
    quantized = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert saved == quantized * 2 - quantized // 2 - quantized // GROUP * 2


def test_the_flops_of_roberta_base_are_those_of_an_independent_reproduction():
    """An independent reproduction counted 879,526,633,088 FLOPs per step; arithmetic from shapes gives this one."""
    found = forecast(backprop(), *COST_MODELS[0].make(EAGER))
    assert (COST_MODELS[0].name, COST_MODELS[0].trained) == ("RoBERTa-base", "LoRA, rank 1")
    assert found.flops == 879_239_577_600
    assert abs(found.flops / REPRODUCED - 1) < 0.001


# ---- records


def tiny(name: str = "tiny") -> CostModel:
    make = partial(classifier, LLAMA, torch.float32, Lora(), False)
    return CostModel(name, "LoRA, rank 1", "float32", "a batch", make)


@pytest.mark.slow
def test_an_interrupted_forecast_resumes_where_it_was(tmp_path: Path):
    chosen = ("BP-Vanilla", "MeZO")
    done: list[CostKey] = []
    records = forecast_costs(tmp_path, [tiny()], done.append, chosen)
    assert [record.key for record in records] == done
    assert [(key.attention, key.method) for key in done] == [
        (kind, name) for kind in (EAGER, FUSED) for name in chosen
    ]
    file = tmp_path / FILE
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]) + lines[2][:40])  # killed while it wrote the third line
    assert read_costs(tmp_path) == records[:2]
    done.clear()
    again = forecast_costs(tmp_path, [tiny()], done.append, chosen)
    assert [(key.attention, key.method) for key in done] == [(FUSED, name) for name in chosen]
    assert [(each.key, each.peak, each.flops) for each in again] == [
        (each.key, each.peak, each.flops) for each in records
    ]
    file.write_text(lines[0].replace("peak", "peek"))
    with pytest.raises(BadInput, match=r"line 1: other fields than those of a forecast\. Delete the file"):
        read_costs(tmp_path)


def test_a_model_that_cannot_be_forecast_is_a_sentence_on_the_page(tmp_path: Path):
    def broken(attention: str) -> Case:
        case = tiny().make(attention)
        return Case(case.objective, case.batch._replace(y=torch.zeros(3, dtype=torch.int64)))

    model = CostModel("broken", "LoRA, rank 1", "float32", "a batch", broken)
    text = cost_page(forecast_costs(tmp_path, [model], chosen=("MeZO",)), "command", "folder")
    assert "broken (LoRA, rank 1), MeZO, attention `eager`: the loss of" in text


def test_the_better_kind_of_attention_has_the_smaller_peak(tmp_path: Path):
    table = CostTable(forecast_costs(tmp_path, [tiny()], chosen=("BP-Vanilla",)))
    (case,) = table.cases
    eager, best = table.eager(case, "BP-Vanilla"), table.best(case, "BP-Vanilla")
    assert eager is not None
    assert best is not None
    assert best.attention == FUSED
    assert best.peak < eager.peak
    assert table.best(case, "MeZO") is None


# ---- committed results


def test_the_committed_page_is_that_of_the_committed_records(tmp_path: Path):
    folder = RESULTS / "panchal2025-cost"
    ran = inside(
        *("reproduce", "panchal2025", "--costs", "--records", "-o", str(folder)),
        *("--page", str(tmp_path / "panchal2025_cost.md")),
        folder=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "panchal2025_cost.md").read_text() == (RESULTS / "panchal2025_cost.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("model", COST_MODELS, ids=lambda model: f"{model.name}, {model.trained}")
def test_the_committed_costs_are_those_of_today(model: CostModel, tmp_path: Path):
    committed = {record.key: record for record in read_costs(RESULTS / "panchal2025-cost")}
    for found in forecast_costs(tmp_path, [model], chosen=("BP-Checkpointing", "MeZO")):
        expected = committed[found.key]
        assert (found.peak, found.flops, dict(found.breakdown)) == (
            expected.peak,
            expected.flops,
            dict(expected.breakdown),
        )


def test_costs_are_of_this_paper_only(tmp_path: Path):
    ran = inside("reproduce", "rike2022", "--costs", folder=tmp_path)
    assert ran.returncode == 2
    assert "--costs is an option of panchal2025; rike2022 does not have it" in " ".join(ran.stderr.split())
    ran = inside("reproduce", "panchal2025", "--costs", "--dry-run", folder=tmp_path)
    assert f"{len(COST_MODELS)} of {len(COST_MODELS)} models are left" in " ".join(ran.stdout.split())
    assert set(METHODS) <= {each.name for each in methods()}
