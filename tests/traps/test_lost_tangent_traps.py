"""Traps of operators that drop tangents without an error: forward mode refuses them, and other methods run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradcost.core.errors import Unsupported
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.estimators.presets import forward_gradient
from gradcost.slopes.slope import CentralDifference, Jvp
from tables import seeded_generators
from vectors import assert_agrees

KEY = Key(300)


@torch.library.custom_op("gradcost_traps::squared", mutates_args=())
def squared(x: Tensor) -> Tensor:
    return x * x


@torch.library.custom_op("gradcost_traps::ranks", mutates_args=())
def ranks(x: Tensor) -> Tensor:
    return x.argsort()


def keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


squared.register_vmap(lambda info, dims, x: (squared(x), dims[0]))
squared.register_autograd(lambda ctx, gradient: 2 * gradient * ctx.saved_tensors[0], setup_context=keep)


def by_overload(x: Tensor) -> Tensor:
    return squared(x).sum()


def by_packet(x: Tensor) -> Tensor:
    return torch.ops.gradcost_traps.squared(x).sum()


def for_each_row(x: Tensor) -> Tensor:
    return torch.vmap(squared)(x).sum()


def of_one_branch(x: Tensor) -> Tensor:
    """The upper branch of torch.cond."""
    return torch.cond(torch.tensor(True), lambda x: x * x, lambda x: x + 1, (x,)).sum()


def by_products(x: Tensor) -> Tensor:
    index = torch.tensor([0, 0, 1, 2, 2, 2]).expand(len(x), -1)
    return torch.scatter_reduce(x[:, :3], 1, index, x, "prod").sum()


def by_products_in_place(x: Tensor) -> Tensor:
    index = torch.tensor([0, 0, 1, 2, 2, 2]).expand(len(x), -1)
    return torch.ones_like(x[:, :3]).scatter_reduce_(1, index, x, reduce="prod").sum()


def objective_of(function: Callable[[Tensor], Tensor]) -> tuple[Objective, Tensor]:
    with seeded_generators(KEY):
        model, x = nn.Linear(6, 6).double(), torch.randn(4, 6).double()
    return Objective(model, lambda model, x: function(model(x)) + model(x).pow(3).sum()), x


LOSING = [
    (by_overload, "gradcost_traps.squared"),
    (by_packet, "gradcost_traps.squared"),
    (for_each_row, "gradcost_traps.squared"),
    (of_one_branch, "cond"),
    (by_products, "scatter_reduce"),
    (by_products_in_place, "scatter_reduce"),
]


@pytest.mark.parametrize("estimator", [forward_gradient(), forward_gradient(2)], ids=repr)
@pytest.mark.parametrize(("function", "name"), LOSING)
def test_an_operator_that_loses_tangents_is_refused_by_name(function: Any, name: str, estimator: Any):
    """A sum of 19.22 had the slope -4.14: that of its other term."""
    objective, x = objective_of(function)
    with pytest.raises(Unsupported, match=f"^{name}.* has no forward-mode rule"):
        estimator.estimate(objective, x, KEY)
    objection = estimator.objection(objective, x)
    assert objection is not None
    assert "has no forward-mode rule" in objection


@pytest.mark.parametrize(("function", "name"), LOSING)
def test_finite_differences_and_backprop_run_such_an_operator(function: Any, name: str):
    objective, x = objective_of(function)
    assert_agrees(objective, x, CentralDifference(1e-5), 1e-6)


def without_weights(x: Tensor) -> Tensor:
    return squared(torch.ones(3).double()).sum() * x.sum()


def of_integers(x: Tensor) -> Tensor:
    return x.flatten()[ranks(x.flatten())][:5].square().sum()


def under_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = squared(x)
    return (gate * x).sum()


@pytest.mark.parametrize("slope", [Jvp(), Jvp(together=2)], ids=repr)
@pytest.mark.parametrize("function", [without_weights, of_integers, under_no_grad])
def test_an_operator_is_differentiated_if_there_is_no_tangent_to_lose(function: Any, slope: Jvp):
    objective, x = objective_of(function)
    assert slope.objection(objective, x) is None
    assert_agrees(objective, x, slope)
