"""Rules that combine slopes: projections along directions that are not symmetric, clips of what is no slope."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradcost
from gradcost.core.errors import Unsupported
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import Coordinates, Gaussian, Rademacher, Sphere
from gradcost.directions.guided import Guided
from gradcost.directions.layerwise import Layerwise
from gradcost.directions.low_rank import LazyLowRank, LowRank
from gradcost.directions.masks import Fixed, Largest, Masked, Named, Random
from gradcost.directions.orthogonal import Orthogonal
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.combine import Normalized, Projection, Sign
from gradcost.estimators.probing import Probing
from gradcost.slopes.slope import ForwardDifference, Jvp

KEY = Key(32)
X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3).sin()


def squared(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square().mean()


def small() -> Objective:
    torch.manual_seed(0)
    return Objective(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), squared)


SYMMETRIC = [Gaussian(), Rademacher(), Sphere(), Coordinates(), Orthogonal(), Masked(Random(0.5))]
OTHERS: list[Any] = [Layerwise(), LowRank(), LazyLowRank(), Guided(), Masked(Fixed(0.5)), Masked(Named("0.*"))]
OTHERS += [Masked(Largest(0.5)), Masked(Random(0.5), LowRank())]
OTHERS += [Masked(Random(0.5), Coordinates()), Masked(Random(0.5), Orthogonal())]  # not orthogonal any more


@pytest.mark.parametrize("directions", OTHERS, ids=repr)
def test_a_projection_is_refused_where_it_is_biased_parameter_by_parameter(directions: Any):
    estimator, objective = Probing(Jvp(), directions, 3, Projection()), small()
    assert not estimator.unbiased
    assert "Projection() is biased along" in str(estimator.objection(objective, X))
    with pytest.raises(Unsupported, match=r"Use Mean\(\), or Gaussian\(\)"):
        estimator.estimate(objective, X, KEY)
    assert Probing(Jvp(), directions, 3).objection(objective, X) is None


@pytest.mark.parametrize("directions", SYMMETRIC, ids=repr)
def test_a_projection_is_unbiased_in_each_parameter_where_it_is_served(directions: Any):
    estimator, objective = Probing(Jvp(), directions, 3, Projection()), small()
    assert estimator.unbiased
    grad = dict(gradcost.backprop().estimate(objective, X, KEY).gradient.leaves())
    scales: dict[str, list[float]] = {name: [] for name in grad}
    for number in range(150):
        for name, leaf in estimator.estimate(objective, X, KEY.fold("draw", number)).gradient.leaves():
            scales[name].append(float((leaf * grad[name]).sum() / grad[name].square().sum()))
    for name, found in scales.items():
        mean = sum(found) / len(found)
        error = math.sqrt(sum((one - mean) ** 2 for one in found)) / len(found)
        assert abs(mean - 1) < 4.5 * error, name


@pytest.mark.parametrize("combine", [Projection(), Normalized(), Sign()], ids=repr)
def test_a_clip_of_coefficients_that_are_no_slopes_is_refused_with_what_to_use(combine: Any):
    estimator = Clipped(Probing(Jvp(), Gaussian(), 3, combine), 0.1)
    assert "use combine=Mean()" in str(estimator.objection(small(), X))
    with pytest.raises(Unsupported, match=r"use combine=Mean\(\)"):
        estimator.estimate(small(), X, KEY)


def test_the_learning_rates_of_fzoo_are_as_stated():
    """The public code's step is lr (l_k - l_0) / (n std) z_k, with the standard deviation of the population."""
    objective, eps, n = small(), 1e-3, 8
    estimate = Probing(ForwardDifference(eps), Rademacher(), n, Normalized()).estimate(objective, X, KEY)
    assert estimate.slopes is not None
    differences = estimate.slopes * eps  # l_k - l_0
    deviation = differences.std(unbiased=False)
    coefficients = torch.tensor(estimate.gradient.coefficients, dtype=torch.float64)  # type: ignore[attr-defined]
    of_the_code = differences / (n * deviation)
    assert torch.allclose(coefficients * math.sqrt(n / (n - 1)), of_the_code, rtol=1e-9)
    of_the_equations = differences / eps / n / differences.std()
    assert torch.allclose(coefficients, of_the_equations * eps, rtol=1e-9)
