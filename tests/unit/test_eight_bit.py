"""`AdamW8bit`. All tests but one need bitsandbytes, which is not in the test environment: it unpacks to 125 MB."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import gradcost
from gradcost import Key, Objective, forecast
from gradcost.cli import spec
from gradcost.core.errors import BadInput, MissingExtra
from gradcost.instruments import Bytes, TrainingStep
from gradcost.planning.changes import Setup, least_possible
from gradcost.training import AdamW8bit
from gradcost.training.leafwise import Leafwise
from gradcost.training.train_state import TrainState
from in_process import inside

TYPES = (torch.float32, torch.bfloat16)
needs_bitsandbytes = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs bitsandbytes")


def network(dtype: torch.dtype = torch.float32) -> tuple[Objective, tuple[torch.Tensor, torch.Tensor]]:
    """Leaves above and below the 4,096 elements from which on the state has 8 bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)).to(dtype)
    batch = torch.randn(8, 64, dtype=dtype), torch.randint(10, (8,))
    return Objective(model, lambda m, b: nn.functional.cross_entropy(m(b[0]).float(), b[1])), batch


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_without_bitsandbytes_the_extra_is_named():
    objective, batch = network()
    with pytest.raises(MissingExtra, match=r"gradcost\[bitsandbytes\]"):
        forecast(gradcost.backprop(), objective, batch, AdamW8bit(1e-3))


def test_it_is_an_optimizer_of_the_command_line():
    optimizer = AdamW8bit(1e-3, weight_decay=0.1)
    assert spec.optimizer(repr(optimizer)) == optimizer
    assert spec.optimizer_template("AdamW8bit(weight_decay=0.1)") == AdamW8bit(1.0, weight_decay=0.1)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_leaf_by_leaf_it_moves_as_one_optimizer_of_bitsandbytes(dtype: torch.dtype):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    (objective, batch), (other, _) = network(dtype), network(dtype)
    optimizer = bitsandbytes.optim.AdamW8bit(other.model.parameters(), lr=0.01, weight_decay=0.3)
    leafwise = Leafwise(AdamW8bit(0.01, weight_decay=0.3), objective)
    for step in range(5):
        gradcost.backprop().stream(objective, batch, Key(step), leafwise)
        optimizer.zero_grad()
        other.loss(other.model, batch).backward()
        optimizer.step()
    pairs = zip(objective.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_restored_state_goes_on_with_the_same_bits(dtype: torch.dtype):
    objective, batch = network(dtype)
    state = TrainState(objective, gradcost.backprop(), AdamW8bit(0.01))
    for step in range(3):
        state.step(batch, Key(step))
    other, _ = network(dtype)
    other.model.load_state_dict(objective.model.state_dict())
    restored = TrainState(other, gradcost.backprop(), AdamW8bit(0.01))
    assert restored.leafwise is not None
    assert state.leafwise is not None
    restored.leafwise.load_state_dict(state.leafwise.state_dict())
    for step in range(3, 6):
        state.step(batch, Key(step))
        restored.step(batch, Key(step))
    pairs = zip(objective.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


@needs_bitsandbytes
@pytest.mark.parametrize("estimator", [gradcost.backprop(), gradcost.checkpointed(), gradcost.mezo()], ids=repr)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_forecast_is_the_count_of_a_real_step(estimator: gradcost.Estimator, dtype: torch.dtype):
    objective, batch = network(dtype)
    told = forecast(estimator, objective, batch, AdamW8bit(1e-3))
    measured = gradcost.measure(TrainingStep(objective, batch, estimator, AdamW8bit(1e-3)), Bytes())
    assert measured.memory is not None
    assert told.peak == measured.memory.peak


@needs_bitsandbytes
def test_a_float64_weight_is_refused_by_name():
    objective, batch = network(torch.float64)
    with pytest.raises(BadInput, match=r"0\.weight has dtype torch.float64"):
        forecast(gradcost.backprop(), objective, batch, AdamW8bit(1e-3))


@needs_bitsandbytes
def test_the_least_possible_bytes_are_not_above_those_of_a_step():
    objective, batch = network()
    told = forecast(gradcost.mezo(), objective, batch, AdamW8bit(1e-3))
    assert least_possible(Setup(objective, batch, AdamW8bit(1e-3))) < told.peak


@needs_bitsandbytes
def test_it_is_the_first_optimizer_that_a_plan_suggests(tmp_path: Path):
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, **sizes}
    (tmp_path / "llama.json").write_text(json.dumps(config))
    model = ("plan", "--model", "hf:llama.json", "--length", "16", "--memory", "1.5MB", "--json")
    found = json.loads(inside(*model, folder=tmp_path).stdout)
    change = next(each for each in found["changes"] if "AdamW8bit" in each["options"].get("optimizer", ""))
    options = [f"--{name}={value}" for name, value in change["options"].items()]
    again = json.loads(inside(*model, *options, folder=tmp_path).stdout)
    assert any(row["fits"] and row["exact"] and row["peak"] == change["peak"] for row in again["rows"])
