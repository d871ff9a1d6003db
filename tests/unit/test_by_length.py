"""Long examples by one estimator and short ones by another: Addax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.pytree import tensors
from gradcost.estimators.by_length import ByLength
from gradcost.estimators.gradient import Sum
from gradcost.estimators.presets import addax, backprop, mezo
from gradcost.estimators.reverse import Reverse
from gradcost.instruments.flops import OpCounter
from gradcost.instruments.memory import MemoryTracker
from gradcost.planning.fake_model import on_fakes
from gradcost.planning.forecast import forecast
from gradcost.training.train_state import TrainState
from snapshot import differences, snapshot
from vectors import flat

KEY = Key(33)
LENGTHS = (3, 9, 2, 7, 4)  # of 9 columns


class Reader(nn.Module):
    """The mean of its words' features, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(13, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.drop = nn.Dropout(0.2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.drop(torch.tanh(self.mix(self.embed(input_ids)))) * attention_mask.unsqueeze(2)
        return self.head(x.sum(1) / attention_mask.sum(1, keepdim=True))


def read(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["labels"])


def padded(left: bool = False, dtype: torch.dtype = torch.float64) -> tuple[Objective, dict[str, Any]]:
    with seeded_generators(KEY):
        model, words = Reader().to(dtype), torch.randint(13, (5, 9))
        labels = torch.randint(3, (5,))
    mask = (torch.arange(9) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    mask = mask.flip(1) if left else mask
    return Objective(model, read), {"input_ids": words, "attention_mask": mask, "labels": labels, "name": "a batch"}


def rows(batch: dict[str, Any], numbers: list[int], columns: slice) -> dict[str, Any]:
    cut = {name: batch[name][numbers][:, columns] for name in ("input_ids", "attention_mask")}
    return cut | {"labels": batch["labels"][numbers]}


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_each_group_is_cut_to_its_longest_and_its_gradient_has_its_weight(left: bool):
    objective, batch = padded(left)
    widths: list[tuple[int, ...]] = []
    objective.model.embed.register_forward_pre_hook(lambda _, args: widths.append(tuple(args[0].shape)))  # type: ignore[union-attr]
    addax(4, 0.3).estimate(objective, batch, KEY)
    widths.clear()  # the first use evaluates more, to find out whether padding can go
    found = addax(4, 0.3).estimate(objective, batch, KEY)
    # 2 forwards of the two long ones at their 9 columns, 1 of the three short ones at their 4.
    assert widths == [(2, 9), (2, 9), (3, 4)]
    long = mezo().estimate(objective, rows(batch, [1, 3], slice(0, 9)), KEY)
    columns = slice(5, 9) if left else slice(0, 4)
    short = backprop().estimate(objective, rows(batch, [0, 2, 4], columns), KEY)
    expected = 0.3 * flat(long.gradient) + 0.7 * flat(short.gradient)
    assert isinstance(found.gradient, Sum)
    assert (flat(found.gradient) - expected).abs().max() <= 1e-14 * expected.abs().max()
    assert float(found.loss) == pytest.approx(0.4 * float(long.loss) + 0.6 * float(short.loss), rel=1e-14)
    assert torch.equal(found.slopes, long.slopes)  # type: ignore[arg-type]


def test_with_the_share_of_the_long_ones_as_weight_two_of_backprop_are_backprop():
    objective, batch = padded()
    objective.model.eval()  # a dropout mask is drawn for a batch's shape
    whole = {name: tensor for name, tensor in batch.items() if name != "name"}
    found = ByLength(backprop(), backprop(), 4, 0.4).estimate(objective, batch, KEY)
    expected = backprop().estimate(objective, whole, KEY)
    size = flat(expected.gradient).abs().max()
    assert (flat(found.gradient) - flat(expected.gradient)).abs().max() <= 1e-13 * size
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-13)


@pytest.mark.parametrize(("longest", "one"), [(1, mezo()), (9, backprop())], ids=["all long", "all short"])
def test_a_batch_of_one_kind_has_all_the_weight(longest: int, one: Any):
    objective, batch = padded()
    found = addax(longest, 0.1).estimate(objective, batch, KEY)
    expected = one.estimate(objective, batch, KEY)
    assert torch.equal(flat(found.gradient), flat(expected.gradient))
    assert torch.equal(found.loss, expected.loss)
    assert addax(longest).objection(objective, batch) is None


@pytest.mark.parametrize("estimator", [addax(4), addax(1), addax(9), ByLength(mezo(), Reverse(), 4)], ids=repr)
def test_a_stream_is_the_estimate_and_nothing_is_disturbed(estimator: ByLength):
    objective, batch = padded(dtype=torch.float32)
    before = snapshot(objective.model)
    whole = dict(estimator.estimate(objective, batch, KEY).gradient.leaves())
    assert estimator.objection(objective, batch) is None
    found: dict[str, Tensor] = {}
    estimator.stream(objective, batch, KEY, found.__setitem__)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert differences(before, snapshot(objective.model)) == []


@pytest.mark.parametrize("estimator", [addax(4), addax(2), ByLength(mezo(), Reverse(), 4)], ids=repr)
def test_a_forecast_knows_the_lengths(estimator: ByLength):
    """Whole numbers keep their values in fakes, so that the groups are the real ones: to the byte and the FLOP."""
    objective, batch = padded(dtype=torch.float32)
    told = forecast(estimator, objective, batch)
    train_state = TrainState(objective, estimator, None)
    train_state.step(batch, KEY)
    live, counted = MemoryTracker(objective.model), OpCounter(objective.model)
    live.register("inputs", tensors(batch))
    with live.followed():
        train_state.step(batch, KEY)
    with counted.followed():
        train_state.step(batch, KEY)
    assert (told.peak, told.breakdown) == (live.memory().peak, live.memory().breakdown)
    assert (told.flops, told.counts.drawn) == (counted.counts.flops, counted.counts.drawn)


@pytest.mark.parametrize("mask", ["none", "flat", "tuple"])
def test_a_batch_without_an_attention_mask_is_refused(mask: str):
    objective, batch = padded()
    if mask == "none":
        del batch["attention_mask"]
    given: Any = tuple(batch.values()) if mask == "tuple" else batch
    if mask == "flat":
        batch["attention_mask"] = torch.ones(5)
    with pytest.raises(ValueError, match="lengths from an attention mask, and this batch has none"):
        addax(4).estimate(objective, given, KEY)
    assert "lengths from an attention mask" in str(addax(4).objection(objective, given))


def test_a_mask_of_no_known_numbers_cannot_be_followed():
    objective, batch = padded(dtype=torch.float32)
    batch["attention_mask"] = batch["attention_mask"].float()
    with on_fakes(objective, batch, "cpu") as (fake, there):
        assert "needs the values of the attention mask" in str(addax(4).objection(fake, there))
