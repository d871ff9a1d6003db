"""Law 4. E|g|^2 is (1 + (d+1)/n)|grad|^2 for Gaussian directions, (1 + (d-1)/n)|grad|^2 for signs and the sphere,
(d/n)|grad|^2 for coordinates and orthogonal bases sampled without replacement, whose n = d probes are exact."""

from __future__ import annotations

import pytest
import torch

from gradcost.core.key import Key
from gradcost.directions import Coordinates
from gradcost.estimators.probing import Probing
from gradcost.slopes.slope import CentralDifference, Jvp
from sampling import assert_mean
from tables import DIRECTIONS, ESTIMATORS, OBJECTIVES, moment
from vectors import estimated, true_gradient

KEY = Key(4)
LINEAR, BATCH = OBJECTIVES["linear"].make(torch.float64)  # d = 20, and a difference is exact on it


@pytest.mark.parametrize("probes", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for name, directions in DIRECTIONS.items() if moment(directions) is not None])
def test_the_second_moment_is_the_stated_one(name: str, probes: int):
    """With n = 10 also where n equal directions would have the moment of one: 20 times the gradient's."""
    grad, estimator = true_gradient(LINEAR, BATCH, KEY), Probing(CentralDifference(0.5), DIRECTIONS[name], probes)
    keys = [KEY.fold("draw", number) for number in range(2000 // probes)]
    squares = [float(estimated(estimator, LINEAR, BATCH, key).square().sum() / grad.square().sum()) for key in keys]
    formula = moment(DIRECTIONS[name])
    assert formula is not None
    stated = formula(20, probes)
    assert_mean(squares, stated)
    assert 5 * float(torch.tensor(squares).std()) / len(squares) ** 0.5 < 0.4 * stated, "too few draws to decide"


@pytest.mark.parametrize(
    "name",
    [name for name, row in ESTIMATORS.items() if row.moment is not None and isinstance(row.estimator, Probing)],
)
def test_every_row_of_the_table_has_the_second_moment_that_it_states(name: str):
    row, grad = ESTIMATORS[name], true_gradient(LINEAR, BATCH, KEY)
    assert isinstance(row.estimator, Probing)
    assert row.moment is not None
    keys = [KEY.fold("row", number) for number in range(150)]
    squares = [
        float(estimated(row.estimator, LINEAR, BATCH, key).square().sum() / grad.square().sum()) for key in keys
    ]
    assert_mean(squares, row.moment(20, row.estimator.probes))


@pytest.mark.parametrize("name", ["gaussian", "rademacher", "sphere"])
def test_ten_probes_have_ten_directions(name: str):
    directions = DIRECTIONS[name]
    estimate = Probing(Jvp(together=10), directions, 10).estimate(LINEAR, BATCH, KEY)
    assert estimate.slopes is not None
    assert len(set(estimate.slopes.tolist())) == 10
    assert len(set(directions.seeds(KEY, 10, 20))) == 10


def test_as_many_coordinates_as_weights_have_no_variance():
    grad = true_gradient(LINEAR, BATCH, KEY)
    for number in range(5):
        found = estimated(Probing(Jvp(together=20), Coordinates(), 20), LINEAR, BATCH, Key(number))
        assert found.square().sum() == pytest.approx(float(grad.square().sum()), rel=1e-12)
