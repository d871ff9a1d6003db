"""Own models, losses, loaders and metrics: `from_loaders`, its contract, the check of a task, and the ranking."""

from __future__ import annotations

import importlib
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

import gradcost
from gradcost.cli import spec
from gradcost.cli.init import init
from gradcost.cli.own_task import own_task
from gradcost.core.errors import BadInput
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.metric import Metric
from gradcost.core.notes import Note
from gradcost.core.objective import Objective
from gradcost.core.value import digest
from gradcost.results.records import read, trial_record
from gradcost.results.tuning import best, scores
from gradcost.results.verdict import verdict
from gradcost.studies import environment
from gradcost.studies.comparison import Comparison, make_comparison
from gradcost.studies.environment import fingerprint
from gradcost.studies.executors import Local
from gradcost.studies.processes import Work
from gradcost.studies.run import study_document
from gradcost.studies.study import Stages, Study, first_stage
from gradcost.studies.task_check import check_contract
from gradcost.studies.trial import Trial
from gradcost.studies.user_code import user_file
from gradcost.tasks import Digits, from_loaders
from gradcost.tasks.content import stamp
from gradcost.tasks.metrics import Measure, correct, default_loss
from gradcost.training.optimizers import with_rate
from gradcost.training.rounding import Master


def rows(count: int, seed: int) -> TensorDataset:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.sum(1).sin())


def collate(examples: Any) -> dict[str, torch.Tensor]:
    x, y = zip(*examples, strict=True)
    return {"x": torch.stack(x), "y": torch.stack(y)}


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.mse_loss(model(batch["x"]).squeeze(-1), batch["y"])


def make_both() -> Any:
    return make(), loss


def mean_absolute_error(model: nn.Module, batch: Any) -> torch.Tensor:
    return (model(batch["x"]).squeeze(-1) - batch["y"]).abs().mean()


def classify() -> nn.Module:
    return nn.Linear(8, 3)


X_ = torch.ones(1)
train = DataLoader(rows(100, 0), 16, shuffle=True, collate_fn=collate)
validation, test = (DataLoader(rows(50, seed), 16, collate_fn=collate) for seed in (1, 2))
PARTS: dict[str, Any] = {"train": train, "validation": validation, "test": test}
pairs = [(torch.ones(4, 8) * i, torch.tensor([0, 1, 2, -100])) for i in range(3)]
pairs_validation, pairs_test = [(x + 1, y) for x, y in pairs], [(x + 2, y) for x, y in pairs]
CLASSES: dict[str, Any] = {"train": pairs, "validation": pairs_validation, "test": pairs_test}


def loaders(batch_size: int = 16) -> dict[str, Any]:
    return {part: DataLoader(rows(60, i), batch_size, collate_fn=collate) for i, part in enumerate(PARTS)}


def task(**options: Any) -> Any:
    return from_loaders(**({"make_model": make, "loss": loss} | PARTS | options))


# ---- the value and its data


def test_a_task_from_loaders_survives_pickling_with_its_repr_and_its_hash():
    ours = task(metric=mean_absolute_error, lower_is_better=True)
    again = pickle.loads(pickle.dumps(ours))
    assert (repr(again), hash(again), again) == (repr(ours), hash(ours), ours)
    assert " at 0x" not in repr(ours)
    assert "make_model=test_own_task:make," in repr(ours)
    assert ours.metric == Metric("mean absolute error", lower_is_better=True)
    assert len(pickle.dumps(ours)) < 2000, "loaders at the top level of a file are sent by name"


def test_other_data_are_another_task():
    assert stamp(train) == stamp(DataLoader(rows(100, 0), 16, shuffle=True, collate_fn=collate))
    others: list[dict[str, Any]] = [
        {"dataset": rows(100, 3)},
        {"batch_size": 8},
        {"shuffle": False},
        {"collate_fn": None},
        {"shuffle": None, "sampler": SubsetRandomSampler(range(100))},
        {"shuffle": None, "sampler": WeightedRandomSampler([1.0] * 100, 100)},
        {"shuffle": None, "sampler": WeightedRandomSampler([1.0, 2.0] * 50, 100)},
    ]
    usual = {"dataset": rows(100, 0), "batch_size": 16, "shuffle": True, "collate_fn": collate}
    stamps = {stamp(train), *(stamp(DataLoader(**(usual | other))) for other in others)}
    assert len(stamps) == 1 + len(others)
    assert stamp(pairs) != stamp(pairs_test)
    assert task(test=DataLoader(rows(50, 9), 16, collate_fn=collate)) != task()
    assert task(test=list(test)) == task(test=list(test))


def trained_on(batches: Any) -> Any:
    return from_loaders(classify, train=batches, validation=pairs_validation, test=pairs_test)


def test_a_task_reads_its_own_loaders_even_if_another_has_equal_stamps():
    """The stamp of a list has 8 of its batches. A second task once trained on the batches of the first one."""
    batches = [(torch.full((4, 8), float(i)), torch.zeros(4, dtype=torch.long)) for i in range(20)]
    changed = [*batches[:1], (batches[1][0], torch.ones(4, dtype=torch.long)), *batches[2:]]
    first, second = (trained_on(part) for part in (batches, changed))
    assert first.train.stamp == second.train.stamp
    assert [int(each.batch_at(Key(0), 1)[1][0]) for each in (first, second, first)] == [0, 1, 0]
    assert second.splits().train is changed


class Drawn(Dataset[Any]):
    """Examples that are drawn anew at each access, as by an augmentation."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        return torch.randn(8), index % 3


shuffling = torch.Generator().manual_seed(1)
drawn = DataLoader(Drawn(), 8, shuffle=True, generator=shuffling)


def test_the_batches_of_a_full_gradient_are_drawn_independently_and_equally_each_time():
    """All had the same draws once."""
    ours = trained_on(drawn)
    before, own = torch.get_rng_state(), shuffling.get_state()
    first, again = [*ours.once_through()], [*ours.once_through()]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(shuffling.get_state(), own)
    assert not torch.equal(first[1][0], first[2][0])
    assert all(
        torch.equal(one, other) for a, b in zip(first, again, strict=True) for one, other in zip(a, b, strict=True)
    )


def test_weights_and_batches_are_functions_of_the_key():
    ours = task()
    check_contract(ours)
    first, again, other = ours.objective(Key(0)), ours.objective(Key(0)), ours.objective(Key(1))
    assert torch.equal(first.leaves[0].parameter, again.leaves[0].parameter)
    assert not torch.equal(first.leaves[0].parameter, other.leaves[0].parameter)
    assert torch.equal(ours.batch_at(Key(0), 9)["x"], ours.batch_at(Key(0), 9)["x"])
    assert not torch.equal(ours.batch_at(Key(0), 0)["x"], ours.batch_at(Key(1), 0)["x"])
    assert ours.batch == 16
    assert sum(len(batch["x"]) for batch in ours.once_through()) == 100


def test_a_function_of_loaders_is_called_with_the_batch_size():
    assert from_loaders(make_both, loaders=loaders).batch == 16
    ours = from_loaders(make_both, loaders=loaders, batch=4)
    assert ours.batch == 4
    assert "loaders(4)[train]" in repr(ours)
    with seeded_generators(Key(0)):
        assert float(ours.objective(Key(0)).evaluate(ours.batch_at(Key(0), 0), Key(0))) > 0


# ---- scores


def test_the_loss_and_a_metric_are_means_over_examples():
    ours, model = task(metric=mean_absolute_error, lower_is_better=True), make().eval()
    whole = collate(validation.dataset)
    expected = {"loss": float(loss(model, whole)), "mean absolute error": float(mean_absolute_error(model, whole))}
    model.train()
    score = ours.score(model, validation)
    assert score == pytest.approx(expected, rel=1e-5)
    assert model.training


def test_accuracy_and_perplexity_of_targets_that_are_not_ignored():
    ours, model = from_loaders(classify, **CLASSES, metric="accuracy"), classify()
    score = ours.score(model, pairs)
    predicted = torch.cat([model(x)[:3].argmax(-1) for x, _ in pairs])
    assert score["accuracy"] == float((predicted == torch.tensor([0, 1, 2] * 3)).double().mean())
    assert (score["targets"], score["of"]) == (9, 9)
    perplexed = from_loaders(classify, **CLASSES, metric="perplexity").score(model, pairs)
    assert perplexed["perplexity"] == pytest.approx(math.exp(perplexed["loss"]))


class Shifting(nn.Module):
    """A causal language model that gives token i + 1 after token i. Its loss compares logits with the next label."""

    def __init__(self, size: int, apart: int = 1, extra: float = 0.0) -> None:
        super().__init__()
        self.apart, self.extra = apart, extra
        self.table = nn.Embedding.from_pretrained(9 * torch.eye(size).roll(1, 1))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> Any:
        logits = self.table(ids)
        pairs = logits[:, : labels.shape[1] - self.apart], labels[:, self.apart :]
        loss = F.cross_entropy(pairs[0].flatten(0, 1), pairs[1].flatten())
        return SimpleNamespace(logits=logits, loss=loss + self.extra)


def test_the_accuracy_of_a_causal_language_model_is_that_of_the_next_token():
    """A model whose loss was 0.0003 had an accuracy of 0, because its logits were compared with the same token."""
    ids = torch.arange(6).repeat(2, 1)
    assert correct(Shifting(7), {"ids": ids, "labels": ids}) == (10, 10)
    padded = torch.where(ids == 5, -100, ids)
    assert correct(Shifting(7), {"ids": ids, "labels": padded}) == (8, 8)
    assert correct(Shifting(7, apart=0), {"ids": ids, "labels": ids + 1}) == (12, 12), "the label of its own position"
    with pytest.raises(BadInput, match=r"the loss of Shifting, .* so it is not known which labels they predict"):
        correct(Shifting(7, extra=1.0), {"ids": ids, "labels": ids})
    nothing = torch.full_like(ids, -100)
    assert correct(Shifting(7), {"ids": ids, "labels": nothing}) == (0, 0)


class Next(nn.Module):
    """Predicts the next token. Like the causal models of transformers, it has no loss of the first label."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        logits = F.one_hot(x, 7)[:, :-1] * 3.0 + torch.arange(7.0)
        return Output(F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()))


def padded(lengths: list[int]) -> dict[str, torch.Tensor]:
    labels = torch.randint(7, (len(lengths), 6), generator=torch.Generator().manual_seed(len(lengths)))
    for row, length in zip(labels, lengths, strict=True):
        row[length:] = -100
    return {"x": labels % 7, "labels": labels}


PADDED = padded([6, 2, 4, 1, 5])


@pytest.mark.parametrize("parts", [[5], [2, 3], [1, 1, 1, 1, 1], [3, 1, 1]], ids=str)
def test_the_loss_of_padded_batches_does_not_depend_on_the_batches(parts: list[int]):
    """The fourth row has no target: alone in a batch, it made the loss nan."""
    measure, pairs = (Measure("perplexity", None, default_loss) for _ in range(2))
    rows = zip(PADDED["x"].split(parts), PADDED["labels"].split(parts), strict=True)
    for x, labels in rows:
        measure.add(Next(), {"x": x, "labels": labels})
        pairs.add(nn.Identity(), (F.one_hot(x[:, :-1], 7) * 3.0 + torch.arange(7.0), labels[:, 1:]))
    expected = float(default_loss(Next(), PADDED))
    assert measure.result() == pytest.approx({"loss": expected, "perplexity": math.exp(expected)}, rel=1e-6)
    assert pairs.result() == pytest.approx(measure.result(), rel=1e-6)


def test_a_score_without_ignored_targets_is_a_mean_over_examples_bit_for_bit():
    measure, total = Measure("loss", None, default_loss), 0.0
    for count, length in ((3, 4), (2, 7)):
        pair = torch.randn(count, length, 5), torch.randint(5, (count, length))
        measure.add(nn.Identity(), pair)
        total += count * float(default_loss(nn.Identity(), pair))
    assert measure.result() == {"loss": total / 5}


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_a_split_of_ignored_targets_only_has_no_score(metric: str):
    batches = [(x, torch.full_like(y, -100)) for x, y in pairs]
    with pytest.raises(BadInput, match="all targets are -100, which are ignored, so there is no score"):
        from_loaders(classify, **CLASSES, metric=metric).score(classify(), batches)


class Output:
    def __init__(self, loss: torch.Tensor) -> None:
        self.loss = loss


class OwnLoss(nn.Linear):
    """Returns its loss in its output, as the models of transformers do."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Output:  # type: ignore[override]
        return Output(F.mse_loss(super().forward(x).squeeze(-1), y))


def make_own_loss() -> nn.Module:
    return OwnLoss(8, 1)


def test_a_model_whose_output_has_a_loss_needs_no_other():
    ours = from_loaders(make_own_loss, **PARTS)
    ours.check()
    assert ours.score(ours.objective(Key(0)).model, test)["loss"] > 0


def record(lr: float, score: float | None, loss: float = 1.0) -> Any:
    scored = {"loss": loss, "perplexity": score and -score, "score": score}
    return trial_record(
        {"trial": f"{lr}", "method": "m", "estimator": "e", "optimizer": "o", "phase": "tune", "lr": lr, "seed": 0}
        | {"status": "finished", "steps": 1, "validation": scored}
    )


def test_tuning_takes_the_better_value_of_the_metric_not_the_lower_loss():
    runs = [record(0.1, -20.0, loss=0.1), record(0.2, -10.0, loss=3.0), record(0.3, None, loss=0.01)]
    assert best(scores(runs, "m"), 3) == [0.2, 0.1, 0.3]


def test_a_metric_is_its_own_inverse_and_prints_its_value():
    lower = Metric("perplexity", lower_is_better=True)
    assert lower.score(lower.score(3.0)) == 3.0
    assert (lower.text(-12.25), Metric().text(0.5), lower.text(-math.inf)) == ("12.25", "50.0%", "diverged")


def write_study(folder: Path, results: dict[str, list[float | None]], **fields: Any) -> Path:
    study = {"schema": 1, "task": "t", "task_name": "t", "model_name": "m", "methods": [*results], "optimizer": "SGD"}
    study |= {"seeds": [1, 2, 3], "points": 1, "steps": 10, "metric": "perplexity", "lower_is_better": True}
    lines = [
        {"schema": 1, "kind": "trial", "trial": f"{method}{seed}", "method": method, "estimator": f"{method}()"}
        | {"optimizer": "SGD(lr=0.1)", "phase": "final", "lr": 0.1, "seed": seed, "steps": 10}
        | {"status": "diverged" if value is None else "finished", "exact": method == "backprop"}
        | {name: value and {"loss": 1.0, "perplexity": value, "score": -value} for name in ("validation", "test")}
        for method, values in results.items()
        for seed, value in enumerate(values, 1)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "study.json").write_text(json.dumps(study | fields))
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_verdict_recommends_the_lower_perplexity(tmp_path: Path):
    folder = write_study(tmp_path, {"mezo": [30.0, 31.0, 32.0], "backprop": [10.5, 11.0, 12.0]})
    assert verdict(read(folder)) == (
        "Use backprop: test perplexity 11 [10.5, 12]. The best method with an estimated gradient is mezo: test "
        "perplexity 31 [30, 32]. No learning rate was tuned: with other ones, the order of the methods may be "
        "another."
    )


def test_a_diverged_run_counts_against_a_method_whose_metric_is_lower(tmp_path: Path):
    folder = write_study(tmp_path, {"mezo": [10.4, 10.4, None], "backprop": [10.5, 10.5, 10.5], "spsa": [40.0] * 3})
    assert verdict(read(folder)).startswith("Use backprop: test perplexity 10.5")


# ---- the contract: a sentence for each way of getting it wrong


def needs_width(width: int) -> nn.Module:
    return nn.Linear(8, width)


def none() -> None:
    make()


def a_class() -> Any:
    return nn.Identity


def three() -> Any:
    return make(), loss, 3


def with_criterion() -> Any:
    return make(), nn.MSELoss()


def frozen() -> nn.Module:
    return make().requires_grad_(False)


def raises() -> nn.Module:
    raise KeyError("width")


def on_meta() -> nn.Module:
    return nn.Linear(8, 1, device="meta")


ONE = make()
TEACHER = make()


def the_same() -> nn.Module:
    return ONE


def other_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return loss(TEACHER, batch)


def unseeded() -> nn.Module:
    seed = int.from_bytes(os.urandom(4), "little")
    model = make()
    nn.init.normal_(model[0].weight, generator=torch.Generator().manual_seed(seed))  # type: ignore[index,arg-type]
    return model


def vector(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch["x"])


def reads_nothing(model: nn.Module, batch: Any) -> torch.Tensor:
    return batch["z"]


def two_loaders() -> dict[str, Any]:
    return {"train": train, "validation": validation}


def a_batch() -> Any:
    return torch.ones(3), torch.ones(3)


def extra() -> Any:
    return PARTS | {"dev": test}


def needs_two(first: int, second: int) -> Any:
    return PARTS


WRONG = [
    ({"make_model": ONE}, "make_model is a Sequential, and each run needs a new model"),
    ({"make_model": 3}, "make_model is of type int: give a function without arguments"),
    ({"make_model": needs_width}, "missing a required argument: 'width'"),
    ({"make_model": partial(needs_width, 1)}, "which worker processes cannot find: define it at the top level"),
    ({"make_model": lambda: make()}, "which worker processes cannot find: define it at the top level"),
    ({"make_model": none}, "test_own_task:none returned None: end it with `return model`"),
    ({"make_model": a_class}, "returned the class Identity: call it, as in `return Identity()`"),
    ({"make_model": three}, "returned a tuple of 3: it returns a torch.nn.Module, or (module, loss)"),
    ({"make_model": with_criterion, "loss": None}, "MSELoss takes the model's output: write def loss(model, batch)"),
    ({"make_model": frozen}, "has no trainable parameters"),
    ({"make_model": raises}, "test_own_task:raises could not make a model: KeyError: 'width'"),
    ({"make_model": on_meta}, "is on the meta device, which stores no numbers"),
    ({"make_model": the_same}, "returned the same model twice"),
    ({"make_model": unseeded}, "two models of LoaderTask.objective with one key have different weights"),
    ({"loss": other_loss}, "it does not use the model that it receives"),
    ({"loss": F.mse_loss}, "mse_loss takes the model's output: write def loss(model, batch): return mse_loss("),
    ({"loss": "mse"}, "loss is of type str: give a function loss(model, batch)"),
    ({"loss": vector}, "on a train batch: "),
    ({"loss": reads_nothing}, "KeyError: 'z'"),
    ({"loss": None}, "Give your own loss: end the function that makes the model with `return model, loss`"),
    ({"train": None}, "from_loaders has no train batches, to train on"),
    ({"test": None}, "from_loaders has no test batches, for the final score"),
    ({"train": iter(train)}, "train is a _SingleProcessDataLoaderIter, which can be read only once"),
    ({"train": 5}, "train is of type int, which yields no batches"),
    ({"test": []}, "test yields no batch: its data set is empty"),
    ({"test": validation}, "validation and test are the same data"),
    ({"test": DataLoader(validation.dataset, 4, collate_fn=collate)}, "validation and test are the same data"),
    ({"metric": "acuracy"}, "there is no metric 'acuracy': give one of loss, perplexity, accuracy"),
    ({"metric": "accuracy"}, "the accuracy is known for batches (x, y)"),
    ({"metric": mean_absolute_error}, "say whether smaller values of the metric are better"),
    ({"metric": vector, "lower_is_better": True}, "return one number, the mean over examples"),
    ({"metric": "loss", "lower_is_better": True, "loaders": loaders}, "give either train, validation and test, or"),
]


@pytest.mark.parametrize(("options", "reason"), WRONG, ids=[reason[:40] for _, reason in WRONG])
def test_each_way_to_get_the_contract_wrong_has_a_sentence(options: dict[str, Any], reason: str):
    with pytest.raises(BadInput) as caught:
        check_contract(task(**options))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "batch", "reason"),
    [
        (two_loaders, None, "test_own_task:two_loaders has no test batches"),
        (a_batch, None, 'returned a tuple: it returns {"train": ..., "validation": ..., "test": ...}'),
        (extra, None, "has 'dev', which nothing reads"),
        (needs_two, None, "which fits neither"),
        (two_loaders, 4, "takes no batch size"),
        (loaders, 0, "a batch has 1 example or more, not 0"),
    ],
)
def test_each_way_to_get_loaders_wrong_has_a_sentence(function: Any, batch: int | None, reason: str):
    with pytest.raises(BadInput) as caught:
        from_loaders(make_both, loaders=function, batch=batch)
    assert reason in str(caught.value)


class GlobalGenerator:
    """A task that ignores its key: its model comes from the global generator."""

    def objective(self, key: Key) -> Objective:
        return Objective(make(), loss)

    def batch_at(self, key: Key, step: int) -> Any:
        return collate(train.dataset)

    def splits(self) -> Any:
        return PARTS

    def score(self, model: nn.Module, split: Any) -> Any:
        return {}


class OtherBatches(GlobalGenerator):
    def objective(self, key: Key) -> Objective:
        return task().objective(key)

    def batch_at(self, key: Key, step: int) -> Any:
        return next(iter(train))


class Pretrained(OtherBatches):
    def objective(self, key: Key) -> Objective:
        return task().objective(Key(0))

    def batch_at(self, key: Key, step: int) -> Any:
        return task().batch_at(key, step)


def test_a_task_that_ignores_its_key_is_refused_before_the_first_run():
    with pytest.raises(
        BadInput, match=r"two models of GlobalGenerator\.objective with one key have different weights"
    ):
        make_comparison(
            GlobalGenerator(),  # pyright: ignore[reportArgumentType]
            None,
            steps=1,
            seeds=1,
            tuning_points=1,
            extra_points=0,
            confirm_seeds=0,
            lr_range=(1, 1),
            target=None,
            memory_beyond_weights=None,
        )
    with pytest.raises(BadInput, match="batch_at returned two different batches"):
        check_contract(OtherBatches())
    with pytest.warns(Note, match="every seed of Pretrained starts from the same weights"):
        check_contract(Pretrained())
    check_contract(Digits())


# ---- the optimizer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("AdamW", gradcost.AdamW(1.0)),
        ("AdamW(weight_decay=0.5)", gradcost.AdamW(1.0, weight_decay=0.5)),
        ("SGD(0.3, momentum=0.9)", gradcost.SGD(0.3, momentum=0.9)),
        ("Master(AdamW(weight_decay=0.5))", Master(gradcost.AdamW(1.0, weight_decay=0.5))),
    ],
)
def test_an_optimizer_is_a_template_whose_learning_rate_is_searched(text: str, expected: Any):
    template = spec.optimizer_template(text)
    assert template == expected
    comparison = Comparison(Digits(), (("b", gradcost.backprop()),), (0.1,), 1, (1,), 0.9, optimizer=template)
    (trial,) = first_stage(comparison.study(["b"]))
    assert trial.optimizer == with_rate(expected, 0.1)
    assert trial.optimizer.lr == 0.1
    other = Comparison(Digits(), (("b", gradcost.backprop()),), (0.1,), 1, (1,), 0.9)
    assert other.name != comparison.name, "its results have their own folder"


def test_a_torch_optimizer_is_a_sentence():
    wrong: Any = torch.optim.SGD([X_.requires_grad_()])
    with pytest.raises(BadInput, match=r"give gradcost\.SGD\(0\.1\) or gradcost\.AdamW\(1e-3\)"):
        gradcost.compare(Digits(), optimizer=wrong)


# ---- the command line, a script, and worker processes

OWN = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from beside import WIDTH

def loss(model, batch):
    return (model(batch["x"])[:, 0] - batch["y"]).square().mean()

def make():
    return nn.Sequential(nn.Linear(8, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)), loss

def collate(rows):
    return {"x": torch.stack([x for x, _ in rows]), "y": torch.stack([y for _, y in rows])}

def loaders(batch_size=16):
    x = torch.randn(96, 8)
    data = TensorDataset(x, x.sum(1).sin())
    parts = torch.utils.data.random_split(data, [64, 16, 16])
    names = ("train", "validation", "test")
    return {n: DataLoader(p, batch_size, shuffle=True, collate_fn=collate) for n, p in zip(names, parts)}

def mae(model, batch):
    return (model(batch["x"])[:, 0] - batch["y"]).abs().mean()
"""
QUICK = ["--steps", "8", "--points", "2", "--lr-range", "0.01:0.1", "--more", "0", "--confirm", "0", "--seeds", "2"]
QUICK += ["--method", "backprop", "--method", "mezo"]


def gradcost_command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "gradcost.cli.main", *arguments]
    return subprocess.run(program, cwd=folder, capture_output=True, text=True, timeout=400)


@pytest.mark.slow
def test_own_model_data_and_metric_from_the_command_line_in_another_folder(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "my.py").write_text(OWN)
    (tmp_path / "sub" / "beside.py").write_text("WIDTH = 4\n")
    own = ["compare", "--model", "sub/my.py:make", "--data", "sub/my.py:loaders"]
    ran = gradcost_command(tmp_path, *own, "--metric", "sub/my.py:mae", "--lower-is-better", *QUICK, "-o", "out")
    assert ran.returncode == 0, ran.stderr
    assert "test mae" in ran.stdout
    results = read(tmp_path / "out")
    assert [trial.status for trial in results.trials] == ["finished"] * 8
    assert results.study.metric == Metric("mae", lower_is_better=True)
    validations = [trial.validation for trial in results.trials if trial.validation]
    assert len(validations) == 8
    assert all(validation.score == -(validation.further["mae"] or 0.0) for validation in validations)
    assert (tmp_path / "out" / "report.html").exists()
    dry = gradcost_command(tmp_path, "compare", "--model", "sub/my.py:make", "--dry-run")
    assert (dry.returncode, dry.stdout) == (2, "")
    assert "which needs data: add --data FILE.py:LOADERS" in dry.stderr


SCRIPT = """
import gradcost
import torch
from torch import nn

make = lambda: nn.Linear(8, 2)
data = [(torch.ones(4, 8) * i, torch.arange(4) % 2) for i in range(3)]
validation, test = [(x + 1, y) for x, y in data], [(x + 2, y) for x, y in data]
task = gradcost.tasks.from_loaders(make, train=data, validation=validation, test=test, metric="accuracy")
options = dict(steps=5, tuning_points=1, lr_range=(0.1, 0.1), extra_points=0, confirm_seeds=0, seeds=1)
results = gradcost.compare(task, [gradcost.backprop()], **options)
print([trial.status for trial in results.trials], results.trials[0].validation.accuracy)
"""


def test_a_change_of_a_file_beside_the_task_is_a_change_of_its_code(tmp_path: Path):
    (tmp_path / "main.py").write_text("import first\nimport torch\n")
    (tmp_path / "first.py").write_text("from second import X\n")
    (tmp_path / "second.py").write_text("X = 1\n")
    before = fingerprint.__wrapped__(str(tmp_path / "main.py"))
    (tmp_path / "other.py").write_text("Y = 1\n")
    assert fingerprint.__wrapped__(str(tmp_path / "main.py")) == before
    (tmp_path / "second.py").write_text("X = 3\n")
    assert fingerprint.__wrapped__(str(tmp_path / "main.py")) != before


@pytest.mark.parametrize(
    "line",
    [
        "from .net import X",
        "from . import net",
        "from .. import mypkg_of_user",
        "from mypkg_of_user.net import X",
        "from mypkg_of_user import net",
        "import mypkg_of_user.net",
        "from .deep.loss import Y",
        "from mypkg_of_user.deep import loss",
    ],
)
def test_a_change_of_the_package_of_the_task_is_a_change_of_its_code(tmp_path: Path, line: str):
    package = tmp_path / "mypkg_of_user"
    (package / "deep").mkdir(parents=True)
    (package / "task.py").write_text(f"{line}\n")
    (package / "net.py").write_text("X = 1\n")
    (package / "unused.py").write_text("X = 1\n")
    (package / "deep" / "loss.py").write_text("from ..net import X\nY = X\n")
    for folder in (tmp_path, package, package / "deep"):
        (folder / "__init__.py").touch()
    before = fingerprint.__wrapped__(str(package / "task.py"))
    if line != "from .. import mypkg_of_user":  # it may execute all of the package
        (package / "unused.py").write_text("X = 2\n")
        assert fingerprint.__wrapped__(str(package / "task.py")) == before
    (package / "net.py").write_text("X = 2\n")
    changed = fingerprint.__wrapped__(str(package / "task.py"))
    assert changed != before
    (package / "__init__.py").write_text("import torch\n")
    assert fingerprint.__wrapped__(str(package / "task.py")) != changed


def test_a_package_without_init_counts_too(tmp_path: Path):
    package = tmp_path / "plain_pkg_of_user"
    package.mkdir()
    (package / "task.py").write_text("from plain_pkg_of_user.net import X\n")
    (package / "net.py").write_text("X = 1\n")
    before = fingerprint.__wrapped__(str(package / "task.py"))
    (package / "net.py").write_text("X = 2\n")
    assert fingerprint.__wrapped__(str(package / "task.py")) != before


MY_METHOD = """
from my_constants_of_user import HALF

from gradcost.core import value
from gradcost.directions import Directions, Rademacher


@value
class Halved(Directions):
    unbiased = True

    def seeds(self, key, probes, dimension):
        return Rademacher().seeds(key, probes, dimension)

    def add(self, base, leaf, seeds, scales, in_place=False):
        return Rademacher().add(base, leaf, seeds, [HALF * scale for scale in scales], in_place)
"""
MY_TASK = """
from gradcost.core import value
from gradcost.tasks import Digits


@value
class Mine:
    steps = 5

    def objective(self, key):
        return Digits(batch=4).objective(key)

    def batch_at(self, key, step):
        return Digits(batch=4).batch_at(key, step)

    def splits(self):
        return Digits(batch=4).splits()

    def score(self, model, split):
        return Digits(batch=4).score(model, split)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that imports the user's task and method anew, and returns both."""
    (tmp_path / "my_task_of_user.py").write_text(MY_TASK)
    (tmp_path / "my_method_of_user.py").write_text(MY_METHOD)
    (tmp_path / "my_constants_of_user.py").write_text("HALF = 0.5\n")
    monkeypatch.syspath_prepend(tmp_path)

    def forget() -> None:
        environment._stamp.cache_clear()
        for name in ("my_task_of_user", "my_method_of_user", "my_constants_of_user"):
            sys.modules.pop(name, None)

    def imported() -> tuple[Any, Any]:
        forget()
        task, method = (importlib.import_module(f"my_{name}_of_user") for name in ("task", "method"))
        return task.Mine(), gradcost.Probing(gradcost.CentralDifference(1e-3), method.Halved())

    yield imported
    forget()


@pytest.mark.parametrize("file", ["my_task_of_user.py", "my_method_of_user.py", "my_constants_of_user.py"])
def test_trials_run_again_after_a_change_of_any_file_of_the_user(tmp_path: Path, mine: Any, file: str):
    """Before, only the file of the task counted, and a change of a method reused the old trials."""

    def name() -> list[str]:
        task, method = mine()
        fingerprint.cache_clear()
        code = fingerprint(user_file(task, method))
        comparison = Comparison(task, (("a", method),), (0.1,), 5, (1,), None, user_file=user_file(task, method))
        trial = Trial(task, "a", method, gradcost.SGD(0.1), 5)

        def stages() -> Stages:
            yield [trial]

        study = Study("Which?", stages)
        document = study_document(study, first_stage(study), code)
        return [trial.name(code), comparison.name, document["comparison"]]

    before, path = name(), tmp_path / file
    path.write_text(path.read_text() + "\n# a comment changes nothing\n")
    assert name() == before
    path.write_text(path.read_text().replace("0.5", "0.25").replace("batch=4", "batch=8") + "\nOTHER = 1\n")
    assert all(new != old for new, old in zip(name(), before, strict=True))


def test_a_method_that_changes_while_its_study_runs_fails_its_trial(tmp_path: Path, mine: Any):
    task, method = mine()
    trial, work = Trial(task, "a", method, gradcost.SGD(0.1), 2, "tune", 0), Work("code", tmp_path, user_file(task))
    name = trial.name("code")
    (tmp_path / "my_constants_of_user.py").write_text("HALF = 0.25\n")
    (record,) = Local(1).perform([trial], work)
    assert (record["trial"], record["status"]) == (name, "failed")
    assert "changed while the study ran" in record["reason"]


def test_the_name_of_a_trial_of_gradcost_depends_on_no_other_file():
    for estimator in (gradcost.backprop(), gradcost.mezo(), gradcost.forward_gradient(4)):
        trial = Trial(Digits(), "a", estimator, gradcost.SGD(0.1), 5)
        assert environment.plug_in_code(trial.task, estimator, trial.optimizer) == []
        assert trial.name("code") == digest((trial, "code"))


@pytest.mark.slow
def test_six_lines_in_a_script_compare_an_own_model(tmp_path: Path):
    (tmp_path / "script.py").write_text(SCRIPT)
    ran = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("['finished', 'finished'] 0.")


def test_the_file_of_init_is_a_task_as_it_is(tmp_path: Path):
    file = tmp_path / "written_by_init.py"
    init(file)
    with pytest.raises(BadInput, match="exists: choose another name, or replace it with --force"):
        init(file)
    with pytest.raises(BadInput, match=r"not a Python file: write .*\.py"):
        init(tmp_path / "my_task")
    made = own_task(
        f"{file}:make",
        f"{file}:loaders",
        batch=None,
        metric=f"{file}:mean_absolute_error",
        lower_is_better=True,
    )
    assert made[1:3] == ("written_by_init", "written_by_init:make")
    check_contract(made[0])


TASKS = """
from torch import nn
def model(): return nn.Linear(2, 2)
def both(): return nn.Linear(2, 2), None
def broken(): raise ValueError("no")
number = 3
"""


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "names a file and no task in it: write"),
        (":model", "returns a model, and --task takes a task. For your own model and data write --model"),
        (":both", "returns a model, and --task takes a task"),
        (":broken", "could not make a task: ValueError: no"),
        (":number", "is of type int: --task takes a task"),
    ],
)
def test_a_wrong_task_of_a_file_is_a_sentence(tmp_path: Path, name: str, reason: str):
    (tmp_path / "wrong_tasks.py").write_text(TASKS)
    with pytest.raises(BadInput) as caught:
        spec.task(f"{tmp_path / 'wrong_tasks.py'}{name}")
    assert reason in str(caught.value)
