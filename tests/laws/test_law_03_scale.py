"""Law 3. On a linear loss the mean coefficient of the gradient is 1, whatever the directions, probes and eps."""

from __future__ import annotations

import pytest
import torch

from gradcost.core.key import Key
from gradcost.estimators.probing import Probing
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp, Slope
from sampling import assert_mean
from tables import DIRECTIONS, ESTIMATORS, OBJECTIVES
from vectors import estimated, true_gradient

KEY = Key(3)
LINEAR, BATCH = OBJECTIVES["linear"].make(torch.float64)
SLOPES = [Jvp(together=3), CentralDifference(1e-3), CentralDifference(0.5), ForwardDifference(1e-3)]
SLOPES += [ForwardDifference(0.5)]


@pytest.mark.parametrize("slope", SLOPES, ids=repr)
@pytest.mark.parametrize("probes", [1, 4])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_every_way_of_measuring_gives_the_same_gradient_on_a_linear_loss(name: str, probes: int, slope: Slope):
    """Also at two eps: a slope that forgets to divide by eps, or divides twice, is off by its factor."""
    one = estimated(Probing(Jvp(), DIRECTIONS[name], probes), LINEAR, BATCH, KEY)
    other = estimated(Probing(slope, DIRECTIONS[name], probes), LINEAR, BATCH, KEY)
    # Rounding of a loss of about 1, divided by eps = 1e-3, and times |z| of about 4.
    assert (one - other).abs().max() <= 1e-11


@pytest.mark.parametrize("probes", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_the_mean_coefficient_is_one(name: str, probes: int):
    grad = true_gradient(LINEAR, BATCH, KEY)
    estimator = Probing(CentralDifference(0.5), DIRECTIONS[name], probes)
    keys = [KEY.fold("draw", number) for number in range(600)]
    along = [float(estimated(estimator, LINEAR, BATCH, key) @ grad / grad.square().sum()) for key in keys]
    assert_mean(along, 1.0)
    assert 5 * float(torch.tensor(along).std()) / 600**0.5 < 0.4, "too few draws to decide"


@pytest.mark.parametrize("name", [name for name, row in ESTIMATORS.items() if row.unbiased])
def test_no_row_of_the_table_is_shrunk_or_stretched(name: str):
    grad = true_gradient(LINEAR, BATCH, KEY)
    keys = [KEY.fold("row", number) for number in range(100)]
    estimator, moment = ESTIMATORS[name].estimator, ESTIMATORS[name].moment
    along = [float(estimated(estimator, LINEAR, BATCH, key) @ grad / grad.square().sum()) for key in keys]
    if moment is not None and moment(20, 1) == 1:  # a form of backprop: no variance
        assert along == pytest.approx([1.0] * len(along), rel=1e-12)
    else:
        assert_mean(along, 1.0)
