"""The figures of a sweep are those of a plan, to the byte; wrong values of --sweep are sentences."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_plan_cli import MINE
from torch import nn

from gradcost.checkpointing.policies import Schedule, Segments
from gradcost.cli.objective import of_model, without_numbers
from gradcost.cli.options import PlanOptions
from gradcost.cli.sweep import made_of, parsed
from gradcost.core.errors import BadInput, DoesNotFit
from gradcost.core.objective import Objective
from gradcost.estimators import Accumulated, Reverse
from gradcost.estimators.presets import backprop, checkpointed, mezo
from gradcost.estimators.structure import micro_batches
from gradcost.instruments.memory import PURPOSES
from gradcost.planning.affine import Sample, piece_of
from gradcost.planning.plan import Plan, plan
from gradcost.planning.row import Row
from gradcost.planning.sweep import sweep
from gradcost.planning.swept import Sweep, peak
from gradcost.planning.within import MemoryTradeoff
from gradcost.training.optimizers import SGD, Adam, AdamW
from in_process import inside

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 61, "n_positions": 32},
    "llama": {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 97, "max_position_embeddings": 32},
}


def made(folder: Path, name: str, size: int, **options: Any) -> tuple[Objective, Any]:
    (folder / f"{name}.json").write_text(json.dumps(CONFIGS[name]))
    return of_model(f"hf:{folder / name}.json", None, size, without_numbers, **options)


def at(found: Sweep, row: Row, size: int) -> Sample:
    method = next(method for method in found.methods if method.estimator == row.estimator)
    sample = method.at(size)
    assert sample is not None
    return sample


def same(sample: Sample, row: Row) -> bool:
    """Whether each figure of a sample is that of the row of a plan."""
    if row.forecast is None:
        return sample.words == (row.refusal,)
    forecast = row.forecast
    parts = [forecast.breakdown[purpose] for purpose in PURPOSES]
    figures = (forecast.flops, forecast.forward, *parts, forecast.within_kernels)
    words = forecast.memory.operator, forecast.memory.module
    return sample.numbers[: len(figures)] == figures and peak(sample) == forecast.peak and sample.words[:2] == words


def test_figures_at_batches_that_were_not_simulated_are_those_of_a_plan(tmp_path: Path):
    objective, batch = made(tmp_path, "gpt2", 1, length=16)
    methods = [Accumulated(checkpointed(), 2)]
    found = sweep(objective, batch, range(1, 65), methods, AdamW(0.001))
    computed = {size for method in found.methods for piece in method.pieces for size in piece.computed}
    assert found.simulated < 8
    for size in (2 * each for each in random.Random(3).sample(sorted(set(range(1, 33)) - computed), 2)):
        objective, batch = made(tmp_path, "gpt2", size, length=16)
        for row in plan(objective, batch, 1 << 30, methods, AdamW(0.001)).rows:
            assert same(at(found, row, size), row), (row.method, size)


def chosen(found: Sweep, size: int, budget: int) -> Sample | None:
    schedules = next(each for each in found.schedules if each.first <= size <= each.last)
    result = schedules.chosen(size, budget)
    return None if result is None else result[1]


def check_against(found: Sweep, expected: Plan, size: int) -> int:
    """Compare every row of a plan with the sweep, `Within` included, and return how many were compared."""
    known = {method.estimator for method in found.methods}
    compared = 0
    for row in expected.rows:
        if row.estimator in known and size % micro_batches(row.estimator) == 0:
            assert same(at(found, row, size), row), (row.method, size)
        elif row.method.startswith("Within") and "micro-batches" not in row.method:
            sample = chosen(found, size, expected.budget)
            assert (sample is None) == (row.forecast is None)
            assert sample is None or same(sample, row)
        else:
            continue
        compared += 1
    if expected.least is not None and expected.least.forecast.peak > expected.budget and size > 1:
        piece = piece_of(found.least, size)
        assert piece is not None
        assert peak(piece.at(size)) >= expected.least.forecast.peak
    return compared


def of_blocks(size: int) -> tuple[Objective, Any]:
    """An objective of four blocks that is simulated in a moment."""
    blocks = [nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)) for _ in range(4)]
    return Objective(nn.Sequential(*blocks), lambda model, x: model(x).square().mean()), torch.zeros(size, 32)


def test_figures_at_ten_random_settings_are_those_of_a_plan():
    draws = random.Random(1)
    methods = [checkpointed(), Reverse(Segments(3)), Accumulated(backprop(), 3), mezo(probes=4)]
    found = sweep(*of_blocks(1), range(1, 201), methods, Adam(0.1))
    assert found.simulated < 80
    for size in draws.sample(range(1, 201), 10):
        equal = [method for method in methods if size % micro_batches(method) == 0]
        for row in plan(*of_blocks(size), 1 << 30, equal, Adam(0.1)).rows:
            assert same(at(found, row, size), row), (row.method, size)


def test_the_schedule_at_any_budget_is_that_of_within():
    found = sweep(*of_blocks(1), [3, 11, 40], None, SGD(0.1))
    assert len(found.methods) > 15
    for size in found.sizes:
        tradeoff = MemoryTradeoff(*of_blocks(size), SGD(0.1))
        peaks = [tradeoff.peak(place) for place in range(len(tradeoff.points))]
        for budget in (limit + more for limit in peaks for more in (-1, 0, 1)):
            try:
                expected = tradeoff.forecast(tradeoff.cheapest(budget).items)
            except DoesNotFit:
                assert chosen(found, size, budget) is None
                continue
            sample = chosen(found, size, budget)
            assert sample is not None
            assert (peak(sample), sample.numbers[0]) == (expected.peak, expected.flops)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_row_of_a_transformer_at_ten_random_settings_is_that_of_a_plan(tmp_path: Path, name: str):
    draws = random.Random(name)
    settings = [(8, AdamW(0.001)), (32, SGD(0.1))]
    sweeps = {}
    for length, optimizer in settings:
        objective, batch = made(tmp_path, name, 1, length=length)
        sweeps[length, optimizer] = sweep(objective, batch, range(1, 33), None, optimizer)
    for _ in range(10):
        (length, optimizer), size = draws.choice(settings), draws.randint(1, 32)
        found = sweeps[length, optimizer]
        peaks = [peak(sample) for method in found.methods if (sample := method.at(size))]
        budget = draws.randint(int(0.9 * min(peaks)), max(peaks))
        objective, batch = made(tmp_path, name, size, length=length)
        assert check_against(found, plan(objective, batch, budget, None, optimizer), size) > 14


@pytest.mark.slow
def test_a_deep_model_with_lists_that_differ_by_batch_is_that_of_a_plan(tmp_path: Path):
    """Its peaks do not grow with the index, so the search of `Within` is not simply the last schedule that fits."""
    CONFIGS["deep"] = CONFIGS["llama"] | {"num_hidden_layers": 20, "hidden_size": 64, "vocab_size": 4096}
    objective, batch = made(tmp_path, "deep", 1, length=32)
    found = sweep(objective, batch, range(1, 17), None, AdamW(0.001))
    draws = random.Random(2)
    for size in (1, 2, 3, 5, 11):
        schedules = next(each for each in found.schedules if each.first <= size <= each.last)
        peaks = [peak(piece.at(size)) for _, found in schedules.schedules if (piece := piece_of(found, size))]
        objective, batch = made(tmp_path, "deep", size, length=32)
        for budget in (peaks[0], peaks[1], draws.randint(min(peaks), max(peaks))):
            check_against(found, plan(objective, batch, budget, None, AdamW(0.001)), size)


def test_the_schedule_of_a_row_is_an_expression_with_the_same_figures():
    objective, batch = of_blocks(4)
    found = sweep(objective, batch, [4], None, SGD(0.1)).schedules[0]
    items, pieces = found.schedules[0]
    (row,) = plan(objective, batch, 1 << 30, [Reverse(Schedule(items))], SGD(0.1)).rows
    assert same(pieces[0].at(4), row)


def test_sizes_that_do_not_increase_are_refused():
    objective, batch = of_blocks(2)
    for sizes in ([], [0, 1], [2, 2], [3, 1]):
        with pytest.raises(BadInput, match="batch sizes increase"):
            sweep(objective, batch, sizes, [backprop()])


OPTIONS = PlanOptions("1GiB")


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (["batch=1..4,length=512..8192"], {"batch": [1, 2, 3, 4], "length": [512, 1024, 2048, 4096, 8192]}),
        (["batch=8,1,64", "length=100..500"], {"batch": [1, 8, 64], "length": [100, 200, 400]}),
        (["optimizer=AdamW(lr=0.1, beta1=0.8)|SGD(0.1), lora=0|8"],)
        + ({"optimizer": ["AdamW(lr=0.1, beta1=0.8)", "SGD(0.1)"], "lora": [0, 8]},),
        (["bits=0,4", "chunks=0|16", "dtype=bfloat16"], {"bits": [0, 4], "chunks": [0, 16], "dtype": ["bfloat16"]}),
    ],
)
def test_values_of_sweep(texts: list[str], values: dict[str, Any]):
    assert parsed(texts, OPTIONS) == values


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1..64", "does not begin with the name of an option"),
        ("", "does not begin with the name of an option"),
        ("bach=1..4", "Did you mean batch?"),
        ("memory=1GiB", "has no option 'memory'. Options: batch, length"),
        ("batch=", "has an empty value"),
        ("batch=1,,2", "has an empty value"),
        ("batch=0..4", "1 or more"),
        ("batch=4..1", "write 1..4"),
        ("batch=1.5", "no whole number or a range A..B"),
        ("batch=-3", "no whole number"),
        ("batch=1..4,3", "has 3 twice"),
        ("batch=1,batch=2", "has batch twice"),
        ("batch=1..100000", "too many sizes: 1,024 are the most"),
        ("lora=1..8", "which is no whole number. Write"),
        ("bits=8", "write 4, or 0"),
        ("dtype=float23", "Did you mean float"),
        ("optimizer=Adm(1)", "Did you mean Adam("),
        ("length=8,device=cuda", "has no option 'device'"),
    ],
)
def test_wrong_values_of_sweep_are_sentences(tmp_path: Path, text: str, told: str):
    ran = inside("plan", "--model", "hf:none.json", "--memory", "1GiB", "--sweep", text, "-o", "x", folder=tmp_path)
    assert ran.returncode == 2
    assert told in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--sweep", "batch=1,2"), "add -o calculator.html"),
        (("--sweep", "batch=1,2", "--batch", "3", "-o", "x"), "--batch cannot be combined with --sweep batch"),
        (("--sweep", "batch=1,2", "--max-batch", "-o", "x"), "--max-batch cannot be combined with --sweep"),
        (("--sweep", "batch=1,2", "--devices", "2", "-o", "x"), "--devices cannot be combined with --sweep"),
        (("--sweep", "batch=1,2", "-o", "theirs.html"), "belongs to something else"),
        (("--sweep", "batch=1,2", "-o", "."), "is a folder"),
        (("--sweep", "batch=1,2", "--method", "mzo()", "-o", "x"), "mezo(eps=0.001, probes=1)"),
        (("--sweep", "length=8,1000", "-o", "x"), "takes at most 32 tokens"),
        (("--sweep", "lora=0", "--bits", "4", "-o", "x"), "they need LoRA adapters"),
        (("--sweep", "batch=2", "--bits", "4", "-o", "x"), "add --lora RANK"),
        (("--sweep", "chunks=" + ",".join(map(str, range(65))), "-o", "x"), "65 combinations"),
    ],
    ids=lambda a: " ".join(a)[:60] if isinstance(a, tuple) else "",
)
def test_what_cannot_be_swept_is_a_sentence(tmp_path: Path, arguments: tuple[str, ...], told: str):
    (tmp_path / "theirs.html").write_text("<title>mine</title>")
    (tmp_path / "gpt2.json").write_text(json.dumps(CONFIGS["gpt2"]))
    ran = inside("plan", "--model", "hf:gpt2.json", "--memory", "1GiB", *arguments, folder=tmp_path)
    assert ran.returncode == 2
    assert told in ran.stderr
    assert "Traceback" not in ran.stderr
    assert (tmp_path / "theirs.html").read_text() == "<title>mine</title>"
    assert not (tmp_path / "x").exists()


def test_values_that_exclude_each_other_are_left_out_with_a_reason():
    options = PlanOptions("1GiB", bits=4)
    objective, _, reason = made_of(options, lambda chosen: of_blocks(chosen.batch or 1), [1], {"lora": 0})
    assert (objective, reason) == (None, "Weights in 4 bits cannot be trained: they need LoRA adapters.")
    objective, batch, reason = made_of(options, lambda chosen: of_blocks(chosen.batch or 1), [3, 4], {"lora": 8})
    assert objective is not None
    assert (len(batch), reason) == (3, "")


def test_a_sweep_counts_what_it_forecast(tmp_path: Path):
    (tmp_path / "mine.py").write_text(MINE)
    arguments = ("--model", "mine.py:make", "--data", "mine.py:batch", "--memory", "1MiB", "-o", "x.html")
    for _ in range(2):  # the second one replaces the page
        ran = inside("plan", *arguments, "--sweep", "batch=2,4", "--method", "mezo()", folder=tmp_path)
        assert ran.returncode == 0, ran.stderr
        assert "1 setting of the model at 2 batch sizes: 2 forecasts of methods, from 2 simulations" in ran.stdout
    assert "<title>plan calculator for Sequential – gradcost</title>" in (tmp_path / "x.html").read_text("utf-8")


def test_data_whose_shapes_do_not_follow_the_batch_are_refused(tmp_path: Path):
    (tmp_path / "mine.py").write_text(MINE + "\ndef fixed(n): return torch.randn(7, 32), torch.zeros(7).long()\n")
    arguments = ("--model", "mine.py:make", "--data", "mine.py:fixed", "--memory", "1MiB", "-o", "x")
    ran = inside("plan", *arguments, "--sweep", "batch=2,4", folder=tmp_path)
    assert ran.returncode == 2
    assert "leave batch out of --sweep" in ran.stderr
