"""The structure of a batch: where its examples are, and how they are selected in any nesting of containers."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradcost
from gradcost.core.batching.micro_batches import selected, split
from gradcost.core.objective import Objective
from gradcost.core.pytree import batch_size, leaves, tensors, tree_map
from gradcost.estimators.presets import backprop


@dataclasses.dataclass(frozen=True)
class Record:
    x: Any
    y: Any
    name: str = "a batch"


class Custom(dict):
    """A subclass of dict, which torch's pytrees take for a leaf."""


def encoding(**content: Any) -> Any:
    from transformers import BatchEncoding

    return BatchEncoding(content)


X, Y = torch.arange(12.0).reshape(6, 2), torch.arange(6)
NESTS: dict[str, Any] = {
    "dataclass": Record(X, Y),
    "namespace": SimpleNamespace(x=X, y=Y),
    "encoding": encoding(x=X, y=Y),
    "dict of its own class": Custom(x=X, y=Y),
    "in a tuple": (encoding(x=X), Y),
    "in a list": [Record(X, Y), {"more": [encoding(x=X)]}],
    "lists": {"x": X, "names": [*"abcdef"], "tokens": [[1], [2, 3], [], [4], [5], [6]]},
    "arrays": {"x": X, "y": Y.numpy(), "z": np.ones((6, 2))},
    "time first": {"x": X.T.reshape(2, 6, 1), "y": Y},
    "images of other sizes": (
        [torch.ones(3, 4 + i) for i in range(6)],
        [{"boxes": torch.ones(i, 4)} for i in range(6)],
    ),
}


@pytest.mark.parametrize("name", NESTS)
def test_a_batch_is_split_in_any_container_and_keeps_its_types(name: str):
    of = NESTS[name]
    assert batch_size(of) == 6
    pieces = [piece for _, piece in split(of, 4)]
    rows = [range(2), range(2, 4), range(4, 5), range(5, 6)]
    for piece, numbers in zip(pieces, rows, strict=True):
        assert type(piece) is type(of)
        for one, other in zip(leaves(piece), leaves(selected(of, list(numbers))), strict=True):
            assert type(one) is type(other)
            assert np.array_equal(one, other)
    assert sum(len(list(leaves(piece))) for piece in pieces) >= len(list(leaves(of)))


def test_what_all_examples_share_is_in_each_micro_batch():
    of = {
        "x": X,
        "position": torch.arange(3).unsqueeze(0),
        "rate": 0.5,
        "classes": ["a", "b"],
        "size": (4, 4),
        "none": None,
    }
    for _, piece in split(of, 2):
        assert piece["position"] is of["position"]
        assert [piece[name] for name in ("rate", "classes", "size", "none")] == [0.5, ["a", "b"], (4, 4), None]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (iter([1]), r"the batch\['more'\] is of type list_iterator, which micro-batches cannot split"),
        ({1, 2, 3, 4, 5, 6}, "is of type set"),
        ((1, 2, 3, 4, 5, 6), r"the batch\['more'\] is a tuple of 6 values in a batch of 6 examples"),
        (type("Graph", (), {"__init__": lambda self: setattr(self, "x", X)})(), "is of type Graph"),
        (nn.utils.rnn.pack_sequence([torch.ones(6)]), "is of type PackedSequence|share their first dimension"),
    ],
    ids=["iterator", "set", "tuple", "object", "packed"],
)
def test_an_entry_that_may_hold_examples_is_refused_by_name(entry: Any, message: str):
    with pytest.raises(gradcost.GradcostError, match=message):
        split({"x": X, "more": entry}, 2)


def test_tensors_are_found_in_every_container():
    for name in ("dataclass", "namespace", "encoding", "dict of its own class", "in a tuple"):
        assert len(tensors(NESTS[name])) == 2
        doubled = tree_map(lambda leaf: 2 * leaf if isinstance(leaf, Tensor) else leaf, NESTS[name])
        assert type(doubled) is type(NESTS[name])
        assert torch.equal(tensors(doubled)[0], 2 * X)
        assert tensors(NESTS[name])[0] is X


@pytest.mark.parametrize("name", ["encoding", "in a tuple", "dataclass"])
def test_a_forecast_counts_and_keeps_the_container_of_a_batch(name: str):
    of = NESTS[name]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        first = batch[0] if isinstance(batch, tuple) else batch
        x = first.x if not isinstance(first, dict) else first["x"]
        return model(x).square().mean()

    objective = Objective(nn.Linear(2, 3), loss)
    told = gradcost.forecast(backprop(), objective, of, gradcost.SGD(0.1)).peak
    step = gradcost.instruments.TrainingStep(objective, of, backprop(), gradcost.SGD(0.1))
    found = gradcost.measure(step, gradcost.instruments.Bytes()).memory
    assert found is not None
    assert told == found.peak
