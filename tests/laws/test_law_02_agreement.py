"""Law 2. Along a seeded direction the slope is <grad, z>: exactly for Jvp, to O(eps^2) or O(eps) for differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradcost.core.key import Key
from gradcost.directions import Directions, Gaussian, Rademacher
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.gradient import Seeded, Signed
from gradcost.estimators.probing import Probing
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp, Slope
from tables import DIRECTIONS, ESTIMATORS, OBJECTIVES
from vectors import matrix, true_gradient

KEY = Key(2)
SMOOTH = [name for name, problem in OBJECTIVES.items() if problem.smooth and name != "linear"]


def slopes_beside_backprop(
    name: str, slope: Slope, directions: Directions, probes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the measured slopes, <grad, z> along the same directions, and |grad|."""
    objective, batch = OBJECTIVES[name].make(torch.float64)
    seeds = directions.seeds(KEY, probes, objective.dimension)
    _, measured = slope.measure(objective, batch, KEY, directions, seeds)
    grad = true_gradient(objective, batch, KEY)
    return measured, matrix(objective, directions, seeds) @ grad, grad.norm()


@pytest.mark.parametrize("slope", [Jvp(), Jvp(together=3), Jvp(together=4)], ids=repr)
@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_jacobian_vector_product_is_the_inner_product_with_the_gradient(name: str, directions: str, slope: Slope):
    measured, expected, size = slopes_beside_backprop(name, slope, DIRECTIONS[directions], 4)
    assert measured.dtype == torch.float64
    assert expected.abs().max() > 0
    # Relative to |grad|, the size of a slope (E[(grad . z)^2] = |grad|^2): a single one may be near 0.
    assert (measured - expected).abs().max() <= 1e-10 * size


@pytest.mark.parametrize("directions", [Gaussian(), Rademacher()], ids=repr)
@pytest.mark.parametrize("name", SMOOTH)
def test_half_the_step_of_a_central_difference_has_a_quarter_of_the_error(name: str, directions: Directions):
    def error(eps: float) -> Tensor:
        measured, expected, _ = slopes_beside_backprop(name, CentralDifference(eps), directions, 4)
        return measured - expected

    # The norm over all probes, since the error along one direction may be 0 by chance.
    ratio = float(error(1e-3).norm() / error(5e-4).norm())
    assert ratio == pytest.approx(4.0, abs=0.05)


@pytest.mark.parametrize("directions", [Gaussian(), Rademacher()], ids=repr)
@pytest.mark.parametrize("name", SMOOTH)
def test_half_the_step_of_a_forward_difference_has_half_the_error(name: str, directions: Directions):
    def error(eps: float) -> Tensor:
        measured, expected, _ = slopes_beside_backprop(name, ForwardDifference(eps), directions, 4)
        return measured - expected

    ratio = float(error(1e-4).norm() / error(5e-5).norm())
    assert ratio == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_a_central_difference_at_a_small_step_agrees_with_backprop(name: str, directions: str):
    measured, expected, size = slopes_beside_backprop(name, CentralDifference(1e-5), DIRECTIONS[directions], 4)
    # eps^2 |z|^3 is 1e-10 x 1e4..1e5 here, and rounding 1e-16 / eps is 1e-11.
    assert (measured - expected).abs().max() <= 1e-5 * size


@pytest.mark.parametrize(
    "name", [name for name, row in ESTIMATORS.items() if isinstance(row.estimator, Probing | Accumulated | Clipped)]
)
def test_the_reported_slopes_are_those_of_the_directions_in_the_gradient(name: str):
    """Also with wrappers: `Estimate.slopes[k]` is <grad, z_k> for the z_k that `Estimate.gradient` replays."""
    objective, batch = OBJECTIVES["mlp"].make(torch.float64)
    found = ESTIMATORS[name].estimator.estimate(objective, batch, KEY)
    gradient = found.gradient.of if isinstance(found.gradient, Signed) else found.gradient
    if not isinstance(gradient, Seeded):
        assert found.slopes is None
        return
    assert found.slopes is not None
    directions = matrix(objective, gradient.directions, gradient.seeds)
    grad = true_gradient(objective, batch, KEY)
    tolerance = 1e-10 if ESTIMATORS[name].exact else 0.1  # eps = 1e-3 along directions of length 12
    assert (found.slopes - directions @ grad).abs().max() <= tolerance * grad.norm()
