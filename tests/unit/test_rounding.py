"""Optimizers for half-precision weights: float32 master copies, and random rounding, which is right on average."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.estimators.presets import backprop, mezo
from gradcost.planning.forecast import forecast
from gradcost.training.optimizers import SGD, Adam, AdamW, Nesterov, Optimizer
from gradcost.training.rounding import Master, StochasticallyRounded, rounded_into
from gradcost.training.train_state import TrainState
from sampling import assert_mean
from tables import OBJECTIVES

KEY = Key(44)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
PLAIN = [SGD(0.1), SGD(0.1, momentum=0.9, weight_decay=0.01, decay=0.1), Nesterov(0.1), Adam(0.01), AdamW(0.01)]
WRAPPERS = [Master, StochasticallyRounded]


def normal(*shape: int) -> Tensor:
    with seeded_generators(KEY):
        return torch.randn(*shape)


# ---- rounding at random


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of the type on either side of each number, as float64; both equal it if it is one of the type."""
    near = x.to(dtype)
    other = torch.nextafter(near, torch.where(near.double() < x.double(), torch.inf, -torch.inf).to(dtype))
    other = torch.where(near.double() == x.double(), near, other)
    return torch.minimum(near, other).double(), torch.maximum(near, other).double()


@HALVES
@pytest.mark.parametrize("size", [1.0, 0.02, 1e-5, 3e-7, 2e4])
def test_a_number_becomes_one_of_its_neighbours_and_keeps_its_mean(dtype: torch.dtype, size: float):
    """At every size, including float16's subnormal numbers (below 6e-5)."""
    x = size * normal(500)
    low, high = neighbours(x, dtype)
    draws = torch.stack(
        [rounded_into(torch.empty(500, dtype=dtype), x, KEY.fold("draw", n)).double() for n in range(400)]
    )
    assert bool(((draws == low) | (draws == high)).all())
    share = (draws - low) / (high - low).where(high > low, 1)
    expected = (x.double() - low) / (high - low).where(high > low, 1)
    deviation = (share.mean(0) - expected) / (expected * (1 - expected) / 400).sqrt().clamp_min(1e-6)
    assert_mean(deviation, 0.0)
    assert deviation.square().mean() == pytest.approx(1, abs=0.3)


@HALVES
def test_numbers_of_the_type_and_special_values_are_unchanged(dtype: torch.dtype):
    information = torch.finfo(dtype)
    special = [0.0, -0.0, 1.0, -2.0, information.max, -information.max, information.smallest_normal]
    x = torch.tensor([*special, float("inf"), -float("inf"), float("nan")])
    x = torch.cat([x, normal(1000).to(dtype).float()])
    for n in range(5):
        rounded = rounded_into(torch.empty(len(x), dtype=dtype), x, KEY.fold("draw", n))
        assert torch.equal(rounded.float().nan_to_num(7.0, None, None), x.nan_to_num(7.0, None, None))


@HALVES
def test_rounding_in_pieces_equals_rounding_at_once(dtype: torch.dtype):
    x = normal(70_000)
    expected = rounded_into(torch.empty(70_000, dtype=dtype), x, KEY, start=5)
    cuts = [0, 1, 6, 4096, 65_536, 70_000]
    pieces = [
        rounded_into(torch.empty(end - at, dtype=dtype), x[at:end], KEY, start=5 + at)
        for at, end in itertools.pairwise(cuts)
    ]
    assert torch.equal(torch.cat(pieces), expected)
    assert not torch.equal(rounded_into(torch.empty(70_000, dtype=dtype), x, KEY.fold("other"), 5), expected)
    strided = torch.empty(700, 100, dtype=dtype).t()
    assert torch.equal(rounded_into(strided, x.reshape(100, 700), KEY, 5).flatten(), expected)


# ---- the optimizers


def pulled(dtype: torch.dtype, start: Tensor, pull: Tensor) -> tuple[Objective, Tensor]:
    """A loss whose gradient is `pull` at all weights."""
    model = nn.Linear(len(start), 1, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.copy_(start)
    return Objective(model, lambda model, pull: (model.weight.float() * pull).sum()), pull


def trained(optimizer: Optimizer, dtype: torch.dtype, start: Tensor, pull: Tensor, steps: int) -> Tensor:
    objective, batch = pulled(dtype, start, pull)
    train_state = TrainState(objective, backprop(), optimizer)
    for number in range(steps):
        train_state.step(batch, KEY.fold("step", number))
    return objective.leaves[0].parameter.detach().float().flatten()


@HALVES
def test_the_mean_of_randomly_rounded_updates_is_the_update(dtype: torch.dtype):
    start, pull = (0.02 * normal(20_000)).to(dtype), normal(20_000).roll(7).to(dtype).float()
    optimizer = StochasticallyRounded(SGD(1e-5))
    moved = trained(optimizer, dtype, start, pull, 1) - start.float()
    plain = trained(SGD(1e-5), dtype, start, pull, 1) - start.float()
    along = -1e-5 * pull
    assert_mean((moved - along) / 1e-5, 0.0)
    assert_mean(moved * along / 1e-10, float(along.square().mean()) / 1e-10)
    lost = 1 - float(plain @ along / (along @ along))
    assert lost > (0.01 if dtype == torch.bfloat16 else -0.01)  # plain rounding loses some of it in bfloat16


@HALVES
def test_a_master_copy_sums_a_thousand_updates_as_float32_does(dtype: torch.dtype):
    start, pull = normal(200).to(dtype), normal(200).roll(7).to(dtype).float()
    expected = trained(SGD(1e-5), torch.float32, start.float(), pull, 1000)
    assert torch.equal(trained(Master(SGD(1e-5)), dtype, start, pull, 1000), expected.to(dtype).float())
    moved = (expected - start.float()).norm()
    stuck = trained(SGD(1e-5), dtype, start, pull, 1000)
    assert (stuck - expected).norm() > 0.5 * moved
    rounded = trained(StochasticallyRounded(SGD(1e-5)), dtype, start, pull, 1000)
    assert_mean(((rounded - expected) * pull.sign()) / moved, 0.0)
    assert (rounded - expected).norm() < 1.5 * moved


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("plain", PLAIN, ids=repr)
def test_float32_leaves_move_as_by_the_plain_optimizer_bit_for_bit(wrapper: Any, plain: Optimizer):
    def weights(optimizer: Optimizer) -> list[Tensor]:
        objective, batch = OBJECTIVES["mlp"].make()
        train_state = TrainState(objective, backprop(), optimizer)
        for number in range(4):
            train_state.step(batch, KEY.fold("step", number))
        return [parameter.detach() for parameter in objective.model.parameters()]

    assert all(map(torch.equal, weights(wrapper(plain)), weights(plain)))
    assert (wrapper(plain).lr, wrapper(plain).decay) == (plain.lr, plain.decay)


def states(train_state: TrainState) -> Iterator[Tensor]:
    assert train_state.leafwise is not None
    return (tensor for tensor in train_state.held_tensors() if tensor.ndim)


@HALVES
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("plain", PLAIN, ids=repr)
def test_training_resumes_bit_for_bit_with_its_state_in_float32(wrapper: Any, plain: Optimizer, dtype: torch.dtype):
    def run(interrupted: bool) -> list[Tensor]:
        objective, batch = OBJECTIVES["transformer"].make(dtype)
        train_state = TrainState(objective, backprop(), wrapper(plain))
        for number in range(6):
            if interrupted and number == 3:
                assert train_state.leafwise is not None
                saved = copy.deepcopy(train_state.leafwise.state_dict())
                train_state = TrainState(objective, backprop(), wrapper(plain))
                assert train_state.leafwise is not None
                train_state.leafwise.load_state_dict(saved)
            train_state.step(batch, KEY.fold("step", number))
        assert all(tensor.dtype == torch.float32 for tensor in states(train_state))
        return [parameter.detach() for parameter in objective.model.parameters()]

    expected = run(False)
    assert all(bool(weights.isfinite().all()) for weights in expected)
    assert all(map(torch.equal, expected, run(True)))


def test_equal_keys_give_equal_weights_and_another_key_others():
    start, pull = normal(300).bfloat16(), normal(300).roll(7)

    def run(key: Key) -> Tensor:
        return trained(StochasticallyRounded(SGD(1e-3), key), torch.bfloat16, start, pull, 3)

    assert torch.equal(run(KEY), run(KEY))
    assert not torch.equal(run(KEY), run(Key(0)))


def test_a_master_copy_has_four_bytes_per_weight_and_random_rounding_none():
    objective, batch = OBJECTIVES["mlp"].make(torch.bfloat16)
    held = {wrapper: forecast(mezo(), objective, batch, wrapper(SGD(0.1))).kept for wrapper in WRAPPERS}
    assert held == {Master: 4 * objective.dimension, StochasticallyRounded: 0}
    # Adam: two float32 moments, and a float32 step count per leaf.
    held = {wrapper: forecast(mezo(), objective, batch, wrapper(Adam(0.1))).kept for wrapper in WRAPPERS}
    moments = 8 * objective.dimension + 4 * len(objective.leaves)
    assert held == {Master: moments + 4 * objective.dimension, StochasticallyRounded: moments}
