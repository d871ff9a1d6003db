"""What a plan suggests when no exact gradient fits; customary optimizers, autocast, attention, several devices."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from test_plan_cli import MINE

import gradcost
from gradcost import SGD, Adam, AdamW, Key, forecast
from gradcost.cli.changes import levels
from gradcost.cli.options import PlanOptions
from gradcost.cli.plan import NO_CHANGE, _objective
from gradcost.core.errors import Unsupported
from gradcost.planning.changes import Setup, cheapest_exact, least_possible, smallest_changes
from gradcost.planning.forecast import Forecast
from gradcost.planning.sharding import STAGES, per_device
from gradcost.tasks import CharLm, Digits
from gradcost.tasks.architectures import Gpt
from gradcost.training import Master
from gradcost.training.customary import Customary
from in_process import inside

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}
MODEL = ("--model", "hf:llama.json", "--batch", "4", "--length", "64")
FACTORY = ("--model", "mine.py:make", "--data", "mine.py:batch", "--batch", "8")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    (tmp_path / "llama.json").write_text(json.dumps(CONFIG))
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def plan_of(folder: Path, *arguments: str) -> dict[str, Any]:
    ran = inside("plan", *MODEL, *arguments, "--json", folder=folder)
    assert ran.returncode in (0, 4), ran.stderr
    return json.loads(ran.stdout)


def digits(batch: int = 64) -> tuple[gradcost.Objective, Any]:
    task = Digits(batch=batch)
    return task.objective(Key(0)), task.batch_at(Key(0), 0)


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["2.2MB", "1.3MB"])
def test_each_change_makes_the_same_command_choose_an_exact_gradient(here: Path, memory: str):
    found = plan_of(here, "--memory", memory, "--all")
    assert not any(row["fits"] and row["exact"] for row in found["rows"])
    assert found["changes"]
    for change in found["changes"]:
        options = [word for name, value in change["options"].items() for word in (f"--{name}", value)]
        again = plan_of(here, "--memory", memory, *options)
        chosen = next(row for row in again["rows"] if row["method"] == again["choice"])
        assert chosen["exact"]
        assert (chosen["peak"], chosen["forwards"]) == (change["peak"], change["forwards"])
        assert chosen["peak"] <= again["budget"]


def test_a_model_with_adapters_is_offered_no_others(here: Path):
    options = PlanOptions(memory="1GiB", model=f"{here / 'mine.py'}:adapted", batch=1, length=8)
    objective, batch = _objective(options)
    changed = [change for level in levels(options, objective, batch, _objective) for change, _ in level]
    assert {"bits": "4"} in changed
    assert not any("lora" in change for change in changed)


def test_no_change_is_named_where_none_is_enough(tmp_path: Path):
    assert NO_CHANGE in inside("plan", "--task", "digits", "--memory", "20kB", folder=tmp_path).stdout
    assert NO_CHANGE not in inside("plan", "--task", "digits", "--memory", "1GB", folder=tmp_path).stdout


@pytest.mark.parametrize(
    ("model", "memory", "change"),
    [
        (FACTORY, "60kB", "--optimizer 'SGD(lr=0.1, momentum=0.9)'"),
        (FACTORY, "50kB", "--optimizer 'SGD(lr=0.1)'"),
        pytest.param(MODEL, "2.2MB", "--optimizer 'SGD(lr=0.1, momentum=0.9)'", marks=pytest.mark.slow),
        pytest.param(MODEL, "1.3MB", "--dtype bfloat16 --chunks 16", marks=pytest.mark.slow),
    ],
)
def test_the_smallest_change_is_the_answer_as_it_is_typed(
    here: Path, model: tuple[str, ...], memory: str, change: str
):
    ran = inside("plan", *model, "--memory", memory, folder=here)
    lines = ran.stdout.splitlines()
    assert lines[0].startswith(f"No exact gradient fits {memory} as asked. With {change} one does")
    assert lines[4].split() == ["options", "method", "peak", "forwards"]
    assert NO_CHANGE not in ran.stdout
    for line in lines[5 : lines.index("", 5)]:
        typed, method, peak, forwards = re.split("  +", line.strip())
        again = inside("plan", *model, "--memory", memory, *shlex.split(typed), folder=here).stdout.splitlines()
        assert again[0].startswith(f"Use {method}")
        assert any(row.startswith(method) and f" {peak} " in row and f" {forwards} " in row for row in again)


def test_a_change_that_cannot_be_made_is_passed_over_and_the_search_ends_at_the_wanted_number():
    objective, batch = digits()

    def refused() -> Setup:
        raise Unsupported("not here")

    made = []

    def level(name: str) -> Any:
        def make() -> Setup:
            made.append(name)
            return Setup(objective, batch, SGD(0.1))

        return [({"x": name}, refused), ({"optimizer": name}, make)]

    found = list(smallest_changes(map(level, "abc"), 1 << 30, most=2))
    assert [change.options for change in found] == [{"optimizer": "a"}, {"optimizer": "b"}]
    assert made == ["a", "b"]
    assert list(smallest_changes([level("d")], 1000)) == []


@pytest.mark.parametrize(
    "optimizer", [None, SGD(0.1), SGD(0.1, momentum=0.9), Adam(0.1), AdamW(0.1), Master(AdamW(0.1))], ids=repr
)
def test_what_every_step_needs_is_below_every_peak(optimizer: Any):
    objective, batch = digits()
    if isinstance(optimizer, Master):
        objective.model.bfloat16()
        batch = type(batch)(batch.x.bfloat16(), batch.y)
    result = forecast(gradcost.backprop(), objective, batch, optimizer)
    least = least_possible(Setup(objective, batch, optimizer))
    needed = sum(result.breakdown[purpose] for purpose in ("parameters", "buffers", "inputs", "optimizer state"))
    assert 0.99 * needed < least <= needed  # torch's counters of steps are left out


def test_a_change_has_the_gradient_of_its_plan():
    objective, batch = digits(256)
    for budget in (60_000, 120_000, 200_000, 400_000):
        chosen = gradcost.plan(objective, batch, budget, optimizer=SGD(0.1), probes=()).chosen
        found = cheapest_exact(Setup(objective, batch, SGD(0.1)), budget)
        assert (found is None) == (chosen is None)
        if found is not None and chosen is not None:
            assert chosen.forecast is not None
            assert (found[1].peak, found[1].flops) == (chosen.forecast.peak, chosen.forecast.flops)


def test_customary_optimizers_are_those_of_each_method():
    objective, batch = digits()
    plan = gradcost.plan(objective, batch, 1 << 30, optimizer=Customary(), probes=(1,))
    for row in plan.rows:
        assert isinstance(row.forecast, Forecast)
        own = AdamW(1.0) if row.exact else SGD(1.0)
        assert row.forecast.kept == forecast(row.estimator, objective, batch, own).kept
    assert "AdamW for exact gradients, SGD for the others" in plan.title


def test_autocast_and_attention_are_options_of_a_plan(here: Path):
    def peak(*options: str) -> int:
        return plan_of(here, "--memory", "1GB", "--method", "backprop()", *options)["rows"][0]["peak"]

    assert peak("--attention", "eager") > peak("--attention", "sdpa") == peak()
    assert peak("--autocast", "bfloat16") != peak()
    ran = inside("plan", *MODEL, "--memory", "1GB", "--attention", "flesh", folder=here)
    assert ran.returncode == 2
    assert "flesh" in ran.stderr
    ran = inside("plan", "--task", "digits", "--memory", "1GB", "--attention", "eager", folder=here)
    assert ran.returncode == 2
    assert "--attention cannot be combined with --task" in ran.stderr


@pytest.mark.parametrize("batch", [10**14, 10**18, 10**20])
def test_a_batch_whose_tokens_cannot_be_made_is_refused(here: Path, batch: int):
    ran = inside("plan", "--model", "hf:llama.json", "--batch", str(batch), "--memory", "1GB", folder=here)
    assert ran.returncode == 2
    assert f"{batch:,} examples of 128 tokens do not fit the memory of this machine" in ran.stderr


def test_autocast_on_the_real_model_has_the_forecast_peak():
    from gradcost.core.evaluation.autocast import UnderAutocast
    from gradcost.instruments.memory import MemoryTracker
    from gradcost.training.train_state import TrainState

    objective, batch = digits()
    cast = gradcost.Objective(objective.model, UnderAutocast(objective.loss, "cpu", torch.bfloat16))
    tracker = MemoryTracker(objective.model)
    tracker.register("inputs", tuple(batch))
    with tracker.followed():
        TrainState(cast, gradcost.backprop(), None).step(batch, Key(0))
    assert tracker.memory().peak == forecast(gradcost.backprop(), cast, batch).peak


def test_devices_share_the_state_by_the_arithmetic_of_zero(here: Path):
    task = CharLm(model=Gpt(layers=3, width=32, heads=2), batch=2, length=16)
    objective, batch = task.objective(Key(0)), task.batch_at(Key(0), 0)
    result = forecast(gradcost.backprop(), objective, batch, AdamW(0.1))
    weights = sum(parameter.nbytes for parameter in objective.model.parameters())
    alone = per_device(result, objective, 1)
    assert set(alone) == set(STAGES)
    assert set(alone.values()) == {result.peak - result.breakdown["gradients"] + weights}
    assert weights == result.breakdown["parameters"]
    many = per_device(result, objective, 4)
    saved = [alone[stage] - many[stage] for stage in STAGES]
    state = result.breakdown["optimizer state"]
    assert saved[0] == state - -(-state // 4)
    assert saved[1] - saved[0] == weights - -(-weights // 4)
    assert 0 < saved[2] - saved[1] < weights
    one = ("--memory", "1GB", "--method", "checkpointed()")
    found = plan_of(here, *one, "--devices", "4")["per_device"]
    assert found["devices"] == 4
    assert list(found["peaks"]) == list(STAGES)
    assert plan_of(here, *one)["per_device"] is None
