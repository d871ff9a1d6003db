"""`surrogate_loss`: the loss of a batch, whose backward pass adds factor * estimate to `.grad`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradcost
from gradcost.core.errors import Unsupported
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.estimators.surrogate import as_loss, surrogate_loss
from gradcost.estimators.variance_reduced import VarianceReduced
from snapshot import snapshot
from tables import ESTIMATORS, OBJECTIVES, PRESETS, grid

KEY = Key(18)
FACTOR = 0.375


def loss_of(estimator: Any, objective: Objective, batch: Any, key: Key = KEY, state: Any = None) -> Tensor:
    return as_loss(estimator.estimate(objective, batch, key, state))


def scaled(estimate: Any, factor: float) -> dict[str, Tensor]:
    """Return factor * estimate, without the parameters that have no gradient."""
    unused = estimate.gradient.unused
    return {name: tensor.mul_(factor) for name, tensor in estimate.gradient.leaves() if name not in unused}


def assert_grads(objective: Objective, expected: dict[str, Tensor]) -> None:
    for leaf in objective.leaves:
        assert (leaf.parameter.grad is None) == (leaf.name not in expected), leaf.name
        if leaf.parameter.grad is not None:
            assert torch.equal(leaf.parameter.grad, expected[leaf.name]), leaf.name


@grid()
def test_backward_adds_factor_times_the_estimate(estimator: str, objective: str):
    """The loss is that of the estimate; a second backward pass, with another key, adds to the first one."""
    made, batch = OBJECTIVES[objective].make()
    row = ESTIMATORS[estimator].estimator
    first, second = (row.estimate(made, batch, key) for key in (KEY, KEY.fold("second")))
    expected = scaled(first, FACTOR)
    loss = loss_of(row, made, batch)
    assert torch.equal(loss.detach(), first.loss)
    before = snapshot(made.model)
    (FACTOR * loss).backward()
    assert_grads(made, expected)
    (loss_of(row, made, batch, KEY.fold("second")) / 2).backward()
    again = scaled(second, 0.5)
    assert_grads(made, {name: tensor + again[name] for name, tensor in expected.items()})
    made.model.zero_grad()
    assert snapshot(made.model) == before


STATELESS = [name for name in PRESETS if name != "checkpointed"]


@pytest.mark.parametrize("name", STATELESS)
def test_surrogate_loss_is_the_loss_of_the_estimate(name: str):
    made, batch = OBJECTIVES["transformer"].make()
    surrogate_loss(PRESETS[name], made, batch, KEY).backward()
    assert_grads(made, scaled(PRESETS[name].estimate(made, batch, KEY), 1.0))


STATEFUL = [name for name, row in ESTIMATORS.items() if row.estimator.init(OBJECTIVES["mlp"].make()[0]) is not None]


@pytest.mark.parametrize("name", STATEFUL)
def test_a_state_that_would_be_lost_is_refused_and_handed_on_by_as_loss(name: str):
    made, batch = OBJECTIVES["mlp"].make()
    row = ESTIMATORS[name].estimator
    with pytest.raises(Unsupported, match="as_loss"):
        surrogate_loss(row, made, batch, KEY)
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.01)
    other, _ = OBJECTIVES["mlp"].make()
    steps = gradcost.training.TrainState(other, row, gradcost.SGD(0.01))
    state = None
    for number in range(3):
        estimate = row.estimate(made, batch, KEY.fold("step", number), state)
        state = estimate.state
        optimizer.zero_grad()
        as_loss(estimate).backward()
        optimizer.step()
        steps.step(batch, KEY.fold("step", number))
    for leaf, same in zip(made.leaves, other.leaves, strict=True):
        assert torch.equal(leaf.parameter, same.parameter)


def test_there_are_stateful_rows():
    assert len(STATEFUL) >= 3
    assert any(isinstance(ESTIMATORS[name].estimator, VarianceReduced) for name in STATEFUL)


@pytest.mark.parametrize("name", STATELESS)
def test_a_frozen_parameter_gets_no_gradient(name: str):
    with seeded_generators(KEY):
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        batch = torch.randn(7, 6), torch.randint(3, (7,))
    model[0].requires_grad_(False)
    objective = Objective(model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    surrogate_loss(PRESETS[name], objective, batch, KEY).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == [
        "2.weight",
        "2.bias",
    ]


def test_backprop_equals_torch_in_a_loop_with_accumulation_clipping_a_scaler_and_a_schedule():
    """Bitwise: every operation of the loop sees the loss and the gradient that it sees in torch."""

    def trained(use_surrogate: bool) -> list[Tensor]:
        made, batch = OBJECTIVES["mlp"].make()
        optimizer = torch.optim.AdamW(made.model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(3):
            optimizer.zero_grad()
            for part in range(2):
                rows = slice(3 * part, 3 * part + 3)
                piece = batch[0][rows], batch[1][rows]
                if use_surrogate:
                    loss = surrogate_loss(gradcost.backprop(), made, piece, KEY.fold("step", 2 * step + part))
                else:
                    loss = made.loss(made.model, piece)
                scaler.scale(loss / 2).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(made.model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
        return [parameter.detach() for parameter in made.model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained(True), trained(False), strict=True))


def test_a_parameter_of_one_number_keeps_its_dtype_under_a_wider_factor():
    made, batch = OBJECTIVES["direct"].make(torch.float32)  # its temperature has no dimension
    loss = surrogate_loss(gradcost.mezo(1e-3), made, batch, KEY)
    (loss * torch.tensor(0.5, dtype=torch.float64)).backward()
    assert {leaf.parameter.grad.dtype for leaf in made.leaves if leaf.parameter.grad is not None} == {torch.float32}
    assert_grads(made, scaled(gradcost.mezo(1e-3).estimate(made, batch, KEY), 0.5))


def test_the_graph_can_be_kept_and_used_twice():
    made, batch = OBJECTIVES["mlp"].make()
    loss = surrogate_loss(gradcost.mezo(1e-3), made, batch, KEY)
    loss.backward(retain_graph=True)
    once = {leaf.name: leaf.parameter.grad.clone() for leaf in made.leaves}  # type: ignore[union-attr]
    loss.backward()
    assert_grads(made, {name: 2 * tensor for name, tensor in once.items()})


def test_a_model_that_averages_its_own_backward_pass_is_refused():
    made, batch = OBJECTIVES["mlp"].make()
    wrapped = Objective(torch.nn.DataParallel(made.model), made.loss)
    with pytest.raises(Unsupported, match=r"model\.module"):
        surrogate_loss(gradcost.mezo(), wrapped, batch, KEY)


@pytest.mark.parametrize("estimator", [gradcost.backprop(), gradcost.mezo()])
def test_a_hook_of_a_parameter_gets_the_gradient_once(estimator: Any):
    """It acted twice with exact gradients: in the passes of the estimate, and again in `backward()`."""
    made, batch = OBJECTIVES["mlp"].make()
    parameters = [leaf.parameter for leaf in made.leaves]
    (FACTOR * surrogate_loss(estimator, made, batch, KEY)).backward()
    expected = [parameter.grad / 2 for parameter in parameters if parameter.grad is not None]
    made.model.zero_grad()
    calls = []

    def halved(gradient: Tensor) -> Tensor:
        calls.append(gradient)
        return gradient / 2

    handles = [parameter.register_hook(halved) for parameter in parameters]
    before = snapshot(made.model)
    loss = surrogate_loss(estimator, made, batch, KEY)
    assert snapshot(made.model) == before
    assert not calls
    (FACTOR * loss).backward()
    assert len(calls) == len(parameters)
    for parameter, half in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, half, rtol=0, atol=0)
    for handle in handles:
        handle.remove()


def test_a_hook_that_would_act_twice_is_refused():
    made, batch = OBJECTIVES["mlp"].make()
    first = made.leaves[0]
    handle = first.parameter.register_hook(lambda gradient: gradient / 2)
    with pytest.raises(Unsupported, match=f"`{first.name}` has a hook"):
        loss_of(gradcost.backprop(), made, batch)
    loss_of(gradcost.mezo(), made, batch).backward()
    handle.remove()
    loss_of(gradcost.backprop(), made, batch).backward()


def test_the_gradient_of_a_sparse_embedding_stays_sparse():
    with seeded_generators(KEY):
        model = nn.Embedding(10, 4, sparse=True)
    made = Objective(model, lambda model, batch: model(batch).square().mean())
    (FACTOR * surrogate_loss(gradcost.backprop(), made, torch.tensor([[1, 2], [3, 1]]), KEY)).backward()
    found = model.weight.grad
    model.weight.grad = None
    (FACTOR * model(torch.tensor([[1, 2], [3, 1]])).square().mean()).backward()
    expected = model.weight.grad
    assert found is not None
    assert expected is not None
    assert found.is_sparse
    assert torch.equal(found.to_dense(), expected.to_dense())
