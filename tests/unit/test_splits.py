"""The data of a task are checked before the first run: as many targets as inputs, and no NaN."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import gradcost
from gradcost import SGD, BadInput, Trial, backprop
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective
from gradcost.core.value import value
from gradcost.studies.run import run_study
from gradcost.studies.study import Stages, Study
from gradcost.studies.task_check import check_contract, check_splits, first_not_finite
from gradcost.studies.task_info import constant_loss, guessing_fields
from gradcost.tasks import Digits, from_loaders
from gradcost.tasks.placed import placed
from gradcost.tasks.task import Split, Splits


@value
class Spoilt(Digits):
    """Digits with one part of the data spoilt: "y short", "y long", "x nan", "x inf" or "empty"."""

    part: str = "train"
    fault: str = "y short"

    def splits(self) -> Splits:
        whole = super().splits()
        x, y = getattr(whole, self.part)
        match self.fault:
            case "y short":
                y = y[:-1]
            case "y long":
                y = torch.cat([y, y[:1]])
            case "empty":
                x, y = x[:0], y[:0]
            case _:
                x = x.clone()
                x[7, 0] = math.nan if self.fault == "x nan" else math.inf
        return whole._replace(**{self.part: Split(x, y)})


LENGTHS = "the PART split of Spoilt has [0-9,]+ inputs and [0-9,]+ targets: give one for each"
NOT_FINITE = (
    "the PART split of Spoilt has a NaN or an infinity in input 7, counted from 0, and the loss of this example"
)
FAULTS = [
    ("y short", LENGTHS),
    ("y long", LENGTHS),
    ("empty", "the PART split of Spoilt has no examples"),
    ("x nan", NOT_FINITE),
    ("x inf", NOT_FINITE),
]


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize(("fault", "sentence"), FAULTS)
def test_a_spoilt_split_is_refused_before_the_first_run(part: str, fault: str, sentence: str):
    """A short y was an IndexError, a long one was accepted, and NaN read as divergence at every learning rate."""
    for check in (check_splits, check_contract):
        with pytest.raises(BadInput, match=sentence.replace("PART", part)):
            check(Spoilt(part=part, fault=fault))


def test_a_study_refuses_it_as_well(tmp_path: Path):
    task = Spoilt(part="validation", fault="x nan")

    def trials() -> Stages:
        yield [Trial(task, "b", backprop(), SGD(0.1), 2, "tune")]

    with pytest.raises(BadInput, match="NaN or an infinity in input 7"):
        list(run_study(Study("?", trials), tmp_path / "out"))


def test_a_comparison_refuses_it_as_well(tmp_path: Path):
    with pytest.raises(BadInput, match="NaN or an infinity in input 7"):
        gradcost.compare(Spoilt(part="validation", fault="x nan"), [backprop()], steps=2, folder=tmp_path / "out")


def test_sound_data_pass():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_splits(Digits())


@value
class Shared(Digits):
    """Digits with a test split that is the validation split."""

    def splits(self) -> Splits:
        whole = super().splits()
        return whole._replace(test=whole.validation)


def test_splits_that_share_examples_are_noted():
    with pytest.warns(Note, match="the validation and the test split of Shared share examples"):
        check_splits(Shared())


@value
class Uneven(Digits):
    """Digits whose test split has three examples of class 4, one of class 1, and one that does not count."""

    def splits(self) -> Splits:
        whole = super().splits()
        return whole._replace(test=Split(whole.test.x[:5], torch.tensor([4, 1, 4, 4, -100])))


@value
class InParts(Digits):
    """Digits whose three splits are all images; each has the targets of some of them only."""

    def splits(self) -> Splits:
        x, y = super().splits().train
        parts = (torch.where(torch.arange(len(y)) % 3 == part, y, -100) for part in range(3))
        return Splits(*(Split(x, part) for part in parts))


def test_splits_of_one_input_with_targets_of_their_own_are_not_noted():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_splits(InParts())


def test_the_study_records_the_share_of_the_most_frequent_class():
    assert guessing_fields(Uneven()) == {"chance": 0.1, "majority": 0.75}
    assert guessing_fields(placed(Uneven(), dtype=torch.float64)) == guessing_fields(Uneven())
    labels = Digits().splits().test.y
    assert guessing_fields(Digits())["majority"] == labels.bincount().max().item() / len(labels)


def test_the_loss_of_an_answer_that_ignores_the_input():
    splits = Digits().splits()
    shares = splits.train.y.bincount().double() / len(splits.train.y)
    logits = shares.log().expand(len(splits.validation.y), -1)
    assert constant_loss(Digits()) == pytest.approx(cross_entropy(logits, splits.validation.y).item(), rel=1e-12)


@value
class Unseen(Digits):
    """Digits whose training split has one class, and no target of the others."""

    def splits(self) -> Splits:
        whole = super().splits()
        return whole._replace(train=Split(whole.train.x[:2], torch.tensor([4, 4])))


def test_a_class_that_was_never_seen_has_no_such_loss():
    assert constant_loss(Unseen()) is None


@pytest.mark.parametrize(
    ("tensor", "example"),
    [
        (torch.arange(5), None),
        (torch.zeros(0, 3), None),
        (torch.zeros(5, 3), None),
        (torch.tensor([0.0, math.inf]), 1),
        (torch.zeros(9000, 2).index_fill(0, torch.tensor([8999, 5000]), math.nan), 5000),
        (torch.zeros(3, dtype=torch.complex64), None),
        (torch.tensor([0, 1, math.nan], dtype=torch.complex64), 2),
        (torch.zeros(3, 2 << 20).index_fill(0, torch.tensor([2]), math.nan), 2),
    ],
)
def test_the_first_example_at_fault_is_named(tensor: torch.Tensor, example: int | None):
    assert first_not_finite(tensor) == example


def model() -> nn.Module:
    return nn.Linear(2, 2)


def loader(spoilt: bool = False, examples: int = 10, scale: float = 1.0) -> Any:
    x = scale * torch.randn(examples, 2, generator=torch.Generator().manual_seed(examples))
    x[7, 0] = math.nan if spoilt else 0.0
    return DataLoader(TensorDataset(x, torch.arange(examples) % 2), batch_size=4)


TRAIN, GOOD, BAD, TEST = loader(examples=11), loader(scale=1e3), loader(spoilt=True), loader(examples=12)


@pytest.mark.parametrize(("validation", "test", "part"), [(BAD, TEST, "validation"), (GOOD, BAD, "test")])
def test_nan_in_a_loader_is_an_error_and_no_divergence(tmp_path: Path, validation: Any, test: Any, part: str):
    """Every learning rate had "diverged", as the validation loss was not finite at the end."""
    task = from_loaders(model, train=TRAIN, validation=validation, test=test)

    def trials() -> Stages:
        yield [Trial(task, "b", backprop(), SGD(0.1), 2, "final", target=None)]

    (record,) = run_study(Study("?", trials), tmp_path / "out", workers=1, measure=False)
    assert record.status == "failed"
    assert f"the {part} loss is not finite, also with the initial weights" in str(record.reason)


def test_a_run_that_diverges_on_sound_data_diverges(tmp_path: Path):
    task = from_loaders(model, train=TRAIN, validation=GOOD, test=TEST)

    def trials() -> Stages:
        yield [Trial(task, "b", backprop(), SGD(3e38), 1, "final", target=None)]

    (record,) = run_study(Study("?", trials), tmp_path / "out", workers=1, measure=False)
    assert record.status == "diverged"


@value
class Masked(Digits):
    """Inputs that are NaN where they are missing; the model replaces them. Data of any kind as x."""

    kind: str = "nan"

    def splits(self) -> Any:
        whole = super().splits()
        x, y = whole.validation
        match self.kind:
            case "nan":
                x = x.clone()
                x[3, 0] = math.nan
            case "sparse":
                x = x.to_sparse()
            case "csr":
                x = x.flatten(1).to_sparse_csr()
            case "numpy":
                x = x.numpy()
            case "dict":
                x = {"pixels": x}
            case "list":
                x = [row[: 1 + index % 5] for index, row in enumerate(x)]
            case "float8":
                x = x.to(torch.float8_e4m3fn)
            case "meta":
                x = x.to("meta")
            case "nothing":
                y = None
        return whole._replace(validation=Split(x, y))  # type: ignore[arg-type]

    def score(self, model: nn.Module, split: Any) -> Any:
        return super().score(model, Split(split.x.nan_to_num(), split.y))


@pytest.mark.parametrize("kind", ["nan", "sparse", "csr", "numpy", "dict", "list", "float8", "meta", "nothing"])
def test_data_that_the_task_handles_itself_pass(kind: str):
    check_splits(Masked(kind=kind))


@value
class Mislabelled(Digits):
    label: int = 10

    def splits(self) -> Splits:
        whole = super().splits()
        y = whole.test.y.clone()
        y[5] = self.label
        return whole._replace(test=Split(whole.test.x, y))


@pytest.mark.parametrize("label", [10, -1, 99])
def test_a_target_that_is_no_class_is_named(label: int):
    with pytest.raises(BadInput, match=f"the test split of Mislabelled has the target {label} in example 5, counted"):
        check_splits(Mislabelled(label=label))


def test_targets_that_do_not_count_are_no_classes():
    check_splits(Mislabelled(label=-100))


def test_a_refused_study_leaves_no_study_behind(tmp_path: Path):
    """The folder refused the repaired study, as one of other code."""

    def trials() -> Stages:
        yield [Trial(Mislabelled(), "b", backprop(), SGD(0.1), 2, "tune")]

    with pytest.raises(BadInput, match="has the target 10"):
        list(run_study(Study("?", trials), tmp_path / "out"))
    assert not (tmp_path / "out" / "study.json").exists()


@value
class Adapted(Digits):
    """Digits with a layer that adds nothing at the start: the product of a random and a zero matrix."""

    def objective(self, key: Key) -> Objective:
        made = super().objective(key)
        with seeded_generators(key):
            first, second = nn.Linear(64, 2, bias=False), nn.Linear(2, 10, bias=False)
        nn.init.zeros_(second.weight)

        def loss(model: nn.Module, batch: Split) -> torch.Tensor:
            return nn.functional.cross_entropy(model(batch.x.flatten(1)), batch.y)

        return Objective(nn.Sequential(first, second), loss, data=made.data)


def test_adapters_that_add_nothing_at_the_start_pass_the_check_of_a_task():
    """`compare` refused language models with LoRA and no new head: "it does not use the model"."""
    check_contract(Adapted())


@pytest.mark.parametrize("kind", ["meta", "sparse"])
def test_targets_without_numbers_in_memory_have_no_most_frequent_class(kind: str):
    class Elsewhere(Digits):
        def splits(self) -> Splits:
            whole = super().splits()
            y = whole.test.y
            return whole._replace(test=Split(whole.test.x, y.to("meta") if kind == "meta" else y.to_sparse()))

    assert guessing_fields(Elsewhere()) == {"chance": 0.1}
