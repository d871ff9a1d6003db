"""Objectives: which parameters train, how a batch is cut, and what is refused in a sentence."""

from __future__ import annotations

import dataclasses
import random
from collections import UserDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.utils._pytree import tree_leaves

from gradcost.core.batching.micro_batches import split
from gradcost.core.errors import Unsupported
from gradcost.core.evaluation.next_state import moving
from gradcost.core.isolation import restored_generators, seeded_generators
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.estimators.presets import mezo
from tables import OBJECTIVES, cross_entropy

KEY = Key(30)


def mean(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).mean()


# ---- leaves


def test_leaves_are_the_trainable_parameters_in_order_end_to_end():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).requires_grad_(False), nn.Linear(2, 2, bias=False))
    objective = Objective(model, mean)
    assert [(leaf.name, leaf.start) for leaf in objective.leaves] == [
        ("0.weight", 0),
        ("0.bias", 12),
        ("2.weight", 16),
    ]
    assert objective.dimension == 20
    assert {leaf.dimension for leaf in objective.leaves} == {20}
    assert repr(objective) == "Objective(Sequential, 20 weights in 3 leaves)"


def test_a_tied_parameter_is_one_leaf_with_its_first_name():
    objective, _ = OBJECTIVES["transformer"].make()
    names = [leaf.name for leaf in objective.leaves]
    assert "embed.weight" in names
    assert "head.weight" not in names
    assert len({id(leaf.parameter) for leaf in objective.leaves}) == len(names)
    assert objective.dimension == sum(p.numel() for p in objective.model.parameters())


def test_leaves_are_frozen_when_the_objective_is_made():
    model = nn.Linear(3, 4)
    objective = Objective(model, mean)
    model.bias.requires_grad_(False)
    assert len(objective.leaves) == len(objective.in_micro_batches(2).leaves) == 2


def test_a_derived_objective_keeps_its_leaves():
    objective = Objective(nn.Linear(3, 4), mean)
    few = objective.only({"bias"})
    for derived in (few.in_micro_batches(2), few.with_loss(mean), dataclasses.replace(few, data=list)):
        assert derived.leaves == few.leaves
        assert derived.dimension == 4
    with pytest.raises(ValueError, match="the leaves are not parameters of this Linear: leave them out"):
        dataclasses.replace(objective, model=nn.Linear(3, 4))


# ---- the value


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_evaluation_is_the_loss_without_a_graph(name: str):
    objective, batch = OBJECTIVES[name].make(torch.float64)
    found = objective.evaluate(batch, KEY)
    with seeded_generators(KEY.fold("part", 0)):
        expected = objective.loss(objective.model, batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-13)
    assert not found.requires_grad
    assert found.grad_fn is None


def test_an_advance_moves_running_statistics_by_one_forward_and_an_evaluation_by_none():
    objective, batch = OBJECTIVES["cnn"].make()
    other, _ = OBJECTIVES["cnn"].make()
    norm: Any = objective.model[1]  # type: ignore[index]
    objective.evaluate(batch, KEY)
    assert norm.num_batches_tracked == 0
    objective.advance(batch, KEY)
    other.model(batch[0])
    assert norm.num_batches_tracked == 1
    assert torch.equal(norm.running_mean, other.model[1].running_mean)  # type: ignore[index, union-attr]
    assert norm in moving(objective, batch, KEY).modules
    assert norm.num_batches_tracked == 1
    objective.model.eval()
    assert not moving(objective, batch, KEY)
    assert not moving(*OBJECTIVES["transformer"].make(), KEY)


def test_randomness_is_a_function_of_the_key_and_put_back_also_after_a_raise():
    state, python = torch.get_rng_state(), random.getstate()
    drawn = []
    for _ in range(2):
        with seeded_generators(KEY):
            drawn.append((torch.rand(2).tolist(), random.random()))

    def raises() -> None:
        with seeded_generators(Key(0)):
            drawn.append((torch.rand(2).tolist(), random.random()))
            raise KeyError

    with pytest.raises(KeyError):
        raises()
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    with restored_generators():
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)


# ---- batches in parts


class Examples(NamedTuple):
    x: Tensor
    y: Tensor


class Encoding(UserDict):
    """As transformers' BatchEncoding: a mapping that is no dict."""


@given(size=st.integers(1, 20), parts=st.integers(1, 20))
def test_parts_are_the_batch_in_order_with_weights_that_add_up_to_one(size: int, parts: int):
    batch = torch.arange(size)
    if parts > size:
        with pytest.raises(
            ValueError, match=rf"a batch of {size} cannot be cut into {parts} micro-batches: use at most {size}"
        ):
            split(batch, parts)
        return
    pieces = split(batch, parts)
    assert len(pieces) == parts
    assert torch.equal(torch.cat([piece for _, piece in pieces]), batch)
    assert [weight for weight, _ in pieces] == [len(piece) / size for _, piece in pieces]
    assert sum(weight for weight, _ in pieces) == pytest.approx(1.0, abs=1e-15)
    assert max(len(piece) for _, piece in pieces) - min(len(piece) for _, piece in pieces) <= 1


def test_a_batch_of_any_structure_is_cut_and_what_is_no_tensor_goes_to_every_part():
    x, y = torch.arange(10).reshape(5, 2), torch.arange(5)
    for batch in (
        (x, y),
        [x, y],
        Examples(x, y),
        {"x": x, "y": y},
        {"deep": [(x, "text"), {"y": y}], "rate": 0.5, "scale": torch.tensor(2.0), "none": None},
    ):
        (first, one), (second, other) = split(batch, 2)
        assert (first, second) == (0.6, 0.4)
        assert type(one) is type(batch)
        flat, found = tree_leaves(batch), tree_leaves((one, other))
        tensors = [leaf for leaf in flat if isinstance(leaf, Tensor) and leaf.ndim]
        half = len(found) // 2
        for whole, a, b in zip(flat, found[:half], found[half:], strict=True):
            if any(whole is tensor for tensor in tensors):
                assert torch.equal(torch.cat([a, b]), whole)
            else:
                assert a is b is whole


def test_a_mapping_that_is_no_dict_is_cut_as_one():
    from transformers import BatchEncoding

    for kind in (Encoding, BatchEncoding):
        batch = kind({"ids": torch.arange(6).reshape(3, 2), "mask": torch.ones(3, 2)})
        pieces = [piece for _, piece in split(batch, 3)]
        assert [piece["ids"].tolist() for piece in pieces] == [[[0, 1]], [[2, 3]], [[4, 5]]]
        assert split(batch, 1)[0][1] is batch


def test_a_batch_whose_tensors_disagree_is_refused():
    with pytest.raises(ValueError, match="share their first dimension, one entry per example, but here it is 4, 5"):
        split((torch.zeros(4, 2), torch.zeros(5)), 2)
    with pytest.raises(ValueError, match="but none has one"):
        split({"rate": 0.5}, 2)


def test_at_most_one_part_is_under_way():
    live: list[int] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        live.append(len(batch))
        return model(batch).mean()

    objective = Objective(nn.Linear(2, 1), loss).in_micro_batches(3)
    losses = objective.losses(torch.ones(7, 2), KEY)
    assert live == []
    next(losses)
    assert live == [3]
    losses.close()
    assert live == [3]


# ---- refusals


class Nothing(nn.Module):
    pass


@pytest.mark.parametrize("model", [Nothing(), nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)], ids=repr)
def test_nothing_to_train_is_refused_with_what_to_do(model: nn.Module):
    with pytest.raises(
        ValueError, match=r"has no trainable parameters, so there is no gradient to take\. Set requires"
    ):
        Objective(model, mean)


def test_what_is_no_model_is_refused():
    with pytest.raises(ValueError, match=r"an Objective needs a torch\.nn\.Module, not function"):
        Objective(mean, mean)  # type: ignore[arg-type]


@pytest.mark.parametrize("parts", [0, -1])
def test_no_parts_are_refused(parts: int):
    with pytest.raises(ValueError, match="1 micro-batch or more, not"):
        Objective(nn.Linear(2, 2), mean, parts)
    with pytest.raises(ValueError, match="1 micro-batch or more, not"):
        Objective(nn.Linear(2, 2), mean).in_micro_batches(parts)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda model, batch: model(batch),
            r"shape \(5, 3\) and type float32. Reduce it, with .mean\(\) for example",
        ),
        (lambda model, batch: model(batch).mean().long(), r"shape \(\) and type int64"),
        (lambda model, batch: model(batch).mean().item(), "it returned float"),
        (lambda model, batch: None, "it returned NoneType"),
        (lambda model, batch: (model(batch).mean(), 1), "it returned tuple"),
    ],
    ids=["vector", "integer", "number", "nothing", "pair"],
)
def test_a_loss_that_is_no_scalar_is_refused_with_what_it_is(loss: Any, message: str):
    objective = Objective(nn.Linear(2, 3), loss)
    with pytest.raises(ValueError, match=message):
        objective.evaluate(torch.ones(5, 2), KEY)


def test_a_loss_of_the_table_is_what_it_says():
    objective, batch = OBJECTIVES["mlp"].make()
    assert objective.evaluate(batch, KEY) == cross_entropy(objective.model, batch)


def test_an_embedding_that_rewrites_its_table_is_refused():
    with pytest.raises(ValueError, match="max_norm=None"):
        Objective(nn.Embedding(5, 3, max_norm=1.0), lambda model, batch: model(batch).mean())


def test_sharded_parameters_are_refused_but_by_backprop(tmp_path: Path):
    """As FSDP makes them. One process is enough for a DTensor."""
    with temporary_group(tmp_path / "store"):
        model = nn.Linear(3, 2)
        mesh = init_device_mesh("cpu", (1,))
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh))
        objective = Objective(model, lambda model, batch: model.get_parameter("weight").sum() * batch)
        with pytest.raises(Unsupported, match="`weight` is sharded over processes"):
            mezo().estimate(objective, torch.ones(()), KEY)


@contextmanager
def temporary_group(store: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
