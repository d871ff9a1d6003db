"""The data of a task are checked before the first run: as many targets as inputs, and no NaN."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradcost
from gradcost import SGD, BadInput, Trial, backprop
from gradcost.core.value import value
from gradcost.studies.run import run_study
from gradcost.studies.study import Stages, Study
from gradcost.studies.task_check import check_contract, check_splits
from gradcost.tasks import Digits, from_loaders
from gradcost.tasks.contract import first_not_finite
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


FAULTS = [
    ("y short", "the PART split of Spoilt has [0-9,]+ inputs and [0-9,]+ targets: give one for each"),
    ("y long", "the PART split of Spoilt has [0-9,]+ inputs and [0-9,]+ targets: give one for each"),
    ("empty", "the PART split of Spoilt is empty"),
    ("x nan", "the PART split of Spoilt has a NaN or an infinity in input 7, counted from 0"),
    ("x inf", "the PART split of Spoilt has a NaN or an infinity in input 7, counted from 0"),
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
    check_splits(Digits())


@pytest.mark.parametrize(
    ("tensor", "example"),
    [
        (torch.arange(5), None),
        (torch.zeros(0, 3), None),
        (torch.zeros(5, 3), None),
        (torch.tensor(math.nan), 0),
        (torch.tensor([0.0, math.inf]), 1),
        (torch.zeros(9000, 2).index_fill(0, torch.tensor([8999, 5000]), math.nan), 5000),
        (torch.zeros(3, dtype=torch.complex64), None),
    ],
)
def test_the_first_example_at_fault_is_named(tensor: torch.Tensor, example: int | None):
    assert first_not_finite(tensor) == example


def model() -> nn.Module:
    return nn.Linear(2, 2)


def loader(spoilt: bool = False, examples: int = 10) -> Any:
    x = torch.randn(examples, 2, generator=torch.Generator().manual_seed(examples))
    x[7, 0] = math.nan if spoilt else 0.0
    return DataLoader(TensorDataset(x, torch.arange(examples) % 2), batch_size=4)


TRAIN, GOOD, BAD, TEST = loader(examples=11), loader(), loader(spoilt=True), loader(examples=12)


def test_nan_in_a_later_validation_batch_of_a_loader_is_refused():
    from_loaders(model, train=TRAIN, validation=GOOD, test=TEST).check()
    with pytest.raises(
        BadInput, match="validation batch 1 has a NaN or an infinity in example 3, both counted from 0"
    ):
        from_loaders(model, train=TRAIN, validation=BAD, test=TEST).check()
