"""A task on another device, in another dtype or under autocast; each method's customary optimizer."""

from __future__ import annotations

import pickle
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradcost
from gradcost import SGD, AdamW, Key, backprop, checkpointed, forward_gradient, mezo
from gradcost.core.errors import BadInput
from gradcost.core.precision import coarsest
from gradcost.core.pytree import tensors
from gradcost.results.comparability import MethodDesign
from gradcost.results.facts import facts
from gradcost.results.lint import lint
from gradcost.studies import Customary
from gradcost.studies.comparison import make_comparison
from gradcost.studies.task_info import model_name, task_name
from gradcost.tasks import Digits, from_loaders, placed
from gradcost.tasks.contract import PARTS
from gradcost.training.customary import optimizer_of

BFLOAT16 = torch.bfloat16
QUICK: Any = {
    "steps": 20,
    "tuning_points": 2,
    "extra_points": 0,
    "confirm_seeds": 0,
    "seeds": 1,
    "lr_range": (0.01, 0.1),
}


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0]).squeeze(-1), batch[1])


X = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))
TRAIN, VALIDATION, TEST = (DataLoader(TensorDataset(part, part.sum(1)), 16, shuffle=True) for part in X.split(32))


def regression() -> Any:
    return from_loaders(make, loss, train=TRAIN, validation=VALIDATION, test=TEST)


def test_a_placed_task_is_placed_again_as_a_whole():
    """Autocast around the loss is for the type of the device: two wrappers would have two types."""
    first = placed(Digits(), autocast=BFLOAT16)
    assert placed(first, "cpu") == placed(Digits(), "cpu", autocast=BFLOAT16)
    assert placed(placed(Digits(), "cpu", BFLOAT16), autocast=BFLOAT16) == placed(Digits(), "cpu", BFLOAT16, BFLOAT16)
    assert placed(first) is first


def test_a_dtype_casts_weights_and_inputs_and_nothing_else():
    task = placed(Digits(), dtype=BFLOAT16)
    objective, batch = task.objective(Key(0)), task.batch_at(Key(0), 0)
    assert {parameter.dtype for parameter in objective.model.parameters()} == {BFLOAT16}
    assert (batch.x.dtype, batch.y.dtype) == (BFLOAT16, torch.int64)
    plain = Digits().objective(Key(0)).model
    for cast, parameter in zip(objective.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(cast, parameter.to(BFLOAT16))
    assert 0 <= task.score(objective.model, task.splits().validation).accuracy < 0.5


def linear() -> nn.Module:
    return nn.Linear(3, 1)


def of_any_type(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch["x"] if isinstance(batch, UserDict) else batch).square().mean()


def bare() -> dict[str, Any]:
    return {part: [torch.ones(2, 3) * number] for number, part in enumerate(PARTS, 1)}


def named() -> dict[str, Any]:
    return {part: [UserDict(x=batch) for batch in batches] for part, batches in bare().items()}


@pytest.mark.parametrize("loaders", [bare, named])
def test_a_batch_of_any_type_is_cast(loaders: Any):
    task = placed(from_loaders(linear, of_any_type, loaders=loaders), dtype=BFLOAT16)
    objective, batch = task.objective(Key(0)), task.batch_at(Key(0), 0)
    assert type(batch) is type(loaders()["train"][0])
    assert objective.evaluate(batch, Key(0)).dtype == BFLOAT16
    assert task.score(objective.model, task.splits().validation)["loss"] > 0


@pytest.mark.parametrize("task", [Digits(), regression()], ids=["split", "loaders"])
def test_autocast_rounds_the_loss_and_leaves_the_weights(task: Any):
    cast = placed(task, autocast=BFLOAT16)
    objective, batch = cast.objective(Key(0)), cast.batch_at(Key(0), 0)
    assert {parameter.dtype for parameter in objective.model.parameters()} == {torch.float32}
    plain = task.objective(Key(0)).evaluate(batch, Key(0))
    with torch.autocast("cpu", BFLOAT16):
        expected = task.objective(Key(0)).evaluate(batch, Key(0))
    assert torch.equal(objective.evaluate(batch, Key(0)), expected)
    assert not torch.equal(expected, plain)
    assert coarsest(objective) is BFLOAT16  # so eps=None takes the round-off of the operations
    split = cast.splits().validation
    scores = cast.score(objective.model, split), task.score(objective.model, split)
    assert scores[0] != scores[1]


@pytest.mark.parametrize("options", [{"autocast": BFLOAT16}, {"dtype": BFLOAT16}, {"dtype": torch.float64}], ids=str)
@pytest.mark.parametrize("method", [backprop(), checkpointed(), forward_gradient(), mezo(eps=None)], ids=repr)
def test_every_preset_trains_and_its_forecast_is_that_of_the_dtype(method: Any, options: dict[str, Any]):
    task = placed(regression(), **options)
    losses = [float(step.loss) for step in gradcost.train(task, method, SGD(0.01), steps=40)]
    assert sum(losses[-5:]) < sum(losses[:5])
    plain, cast = (
        gradcost.forecast(method, each.objective(Key(0)), each.batch_at(Key(0), 0), SGD(0.01))
        for each in (regression(), task)
    )
    assert plain.peak != cast.peak


def test_a_placed_task_keeps_its_names_and_is_a_value():
    cases: list[tuple[Any, dict[str, Any]]] = [
        (Digits(), {"dtype": BFLOAT16}),
        (regression(), {"device": "cpu", "autocast": BFLOAT16}),
    ]
    for task, options in cases:
        cast = placed(task, **options)
        assert pickle.loads(pickle.dumps(cast)) == cast
        assert hash(cast) == hash(pickle.loads(pickle.dumps(cast))) != hash(task)
        assert (task_name(cast), model_name(cast)) == (task_name(task), model_name(task))
        assert (cast.steps, cast.batch) == (task.steps, task.batch)
        assert len(tensors(next(iter(cast.once_through())))) == 2
    assert placed(Digits()) == Digits()
    with pytest.raises(AttributeError):
        _ = placed(Digits(), dtype=BFLOAT16).nothing


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"device": "cuda:99"}, "CUDA device"),
        ({"device": "tpu"}, "there is no device 'tpu': give cpu or cuda"),
        ({"device": "mps"}, "there is no device 'mps': give cpu or cuda"),
        ({"dtype": torch.int64}, "dtype is torch.int64: give a floating-point dtype such as torch.bfloat16"),
        ({"autocast": torch.float16}, "give torch.bfloat16, which needs no loss scaling"),
    ],
)
def test_what_this_machine_cannot_do_is_a_sentence(options: dict[str, Any], sentence: str):
    with pytest.raises(BadInput, match=sentence):
        placed(Digits(), **options)


@pytest.mark.slow
def test_a_comparison_under_autocast_says_so_in_its_records(tmp_path: Path):
    results = gradcost.compare("digits", [mezo()], autocast=BFLOAT16, folder=tmp_path / "r", workers=1, **QUICK)
    assert [trial.status for trial in results.trials] == ["finished"] * 3
    assert results.study.task.endswith("autocast=torch.bfloat16)")
    assert results.study.task_name == "digits"


def _with_task(optimizers: dict[str, str]) -> list[tuple[str, str, str]]:
    return [(method, "Digits()", optimizer) for method, optimizer in optimizers.items()]


@pytest.mark.slow
def test_a_comparison_with_customary_optimizers_is_recorded_and_linted(tmp_path: Path):
    settings: Any = {"folder": tmp_path / "r", "workers": 1, **QUICK}
    results = gradcost.compare("digits", [backprop(), checkpointed(), mezo()], optimizer=Customary(), **settings)
    assert {trial.optimizer.partition("(")[0] for trial in results.trials if trial.exact} == {"AdamW"}
    codes = {finding.code for finding in lint(facts(results))}
    assert ("W105" in codes, "E206" in codes) == (True, False)


def test_the_customary_optimizer_is_adamw_for_exact_gradients_alone():
    customary = Customary()
    assert [type(optimizer_of(customary, each)) for each in (backprop(), checkpointed())] == [AdamW, AdamW]
    assert [optimizer_of(customary, each) for each in (mezo(), forward_gradient())] == [SGD(1.0), SGD(1.0)]
    assert optimizer_of(SGD(2.0), mezo()) == SGD(2.0)
    options = {"tuning_points": 3, "extra_points": 1, "confirm_seeds": 1, "seeds": 1, "lr_range": (1e-3, 1.0)}
    given: Any = options | {"steps": 10, "target": None, "memory_beyond_weights": None}
    comparison = make_comparison(Digits(), [backprop(), mezo()], **given, optimizer=customary)
    first = next(comparison.study(["Reverse(saving=Everything())", "backprop()", "mezo()"]).trials())
    assert {(type(trial.optimizer), trial.optimizer.lr) for trial in first if trial.estimator.exact} == {
        (AdamW, rate) for rate in comparison.rates
    }
    assert comparison.document("digits", "mlp")["optimizer"] == "customary"


def test_the_linter_knows_that_customary_optimizers_differ_by_design():
    optimizers = {"backprop()": "AdamW", "checkpointed()": "AdamW", "mezo()": "SGD"}
    assert [each.code for each in lint(MethodDesign(*pair) for pair in _with_task(optimizers))] == ["E206"]
    codes = {
        each.code: each for each in lint(MethodDesign(*pair, is_customary=True) for pair in _with_task(optimizers))
    }
    assert list(codes) == ["W105"]
    assert codes["W105"].method == "mezo()"
    assert codes["W105"].found == "trained by SGD, and backprop() by AdamW"
