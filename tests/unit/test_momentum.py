"""A momentum of seeds: what it sums, what it keeps, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gradcost.core.key import Key
from gradcost.directions import Gaussian, Rademacher
from gradcost.directions.masks import Masked, Smallest
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.combine import Sign
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.momentum import Momentum
from gradcost.estimators.presets import backprop, mezo
from gradcost.estimators.probing import Probing
from gradcost.estimators.variance_reduced import VarianceReduced
from gradcost.slopes.slope import CentralDifference, Jvp
from sampling import assert_mean
from tables import OBJECTIVES
from vectors import estimated, flat, true_gradient

KEY = Key(31)
INNER = Probing(Jvp(3), Gaussian(), 3)


@pytest.mark.parametrize("inner", [INNER, Accumulated(INNER, 2), Clipped(INNER, 0.2)], ids=repr)
@pytest.mark.parametrize(("decay", "window"), [(0.9, 3), (0.5, 10), (0.0, 4), (1.0, 4), (0.7, 1)])
def test_it_is_the_weighted_mean_of_the_last_estimates(inner: Any, decay: float, window: int):
    objective, batch = OBJECTIVES["mlp"].make(torch.float64)
    momentum = Momentum(inner, decay, window)
    state, plain = momentum.init(objective), []
    for number in range(6):
        key = KEY.fold("step", number)
        plain.insert(0, estimated(inner, objective, batch, key))
        found = momentum.estimate(objective, batch, key, state)
        state = found.state
        assert isinstance(found.gradient, Seeded)
        w = min(number + 1, window)
        assert found.gradient.nbytes == 16 * 3 * w
        weights = [decay**age for age in range(w)]
        expected = sum((a * g for a, g in zip(weights, plain, strict=False)), torch.zeros(1)) / sum(weights)
        assert (flat(found.gradient) - expected).abs().max() <= 1e-13 * expected.abs().max()
        assert found.slopes is not None
        assert len(found.slopes) == 3
        with torch.no_grad():
            objective.leaves[0].parameter.mul_(0.9)


def test_on_a_gradient_that_stands_still_its_mean_is_that_gradient_and_it_scatters_less():
    """The scale law at every step, from the first on."""
    objective, batch = OBJECTIVES["linear"].make(torch.float64)
    grad = true_gradient(objective, batch, KEY)
    momentum = Momentum(Probing(CentralDifference(0.5), Rademacher()), 0.8, 5)
    squares: dict[int, float] = {}
    along: dict[int, list[float]] = {0: [], 2: [], 7: []}
    for run in range(200):
        state = None
        for step in range(8):
            found = momentum.estimate(objective, batch, KEY.fold("run", run).fold("step", step), state)
            state = found.state
            if step in along:
                along[step].append(float(flat(found.gradient) @ grad / grad.square().sum()))
    for step, samples in along.items():
        assert_mean(samples, 1.0)
        squares[step] = float(torch.tensor(samples).var())
    # Of independent estimates the variance falls by sum w^2 / (sum w)^2 = 0.246 for five weights of decay 0.8.
    assert squares[7] < 0.4 * squares[0]


def test_a_stream_and_a_state_are_those_of_the_estimate():
    objective, batch = OBJECTIVES["mlp"].make()
    momentum = Momentum(mezo(), window=2)
    state = momentum.estimate(objective, batch, KEY).state
    whole = momentum.estimate(objective, batch, KEY.fold("next"), state)
    found: dict[str, torch.Tensor] = {}
    streamed = momentum.stream(objective, batch, KEY.fold("next"), found.__setitem__, state)
    assert all(torch.equal(found[name], leaf) for name, leaf in whole.gradient.leaves())
    assert streamed.state == whole.state
    assert whole.state is not None
    assert len(whole.state) == 2


@pytest.mark.parametrize(
    "inner",
    [
        backprop(),
        Probing(Jvp(), combine=Sign()),
        Accumulated(Probing(Jvp(), Masked(Smallest(0.5))), 2),
        Momentum(mezo()),
    ],
    ids=repr,
)
def test_what_is_not_told_by_seeds_for_good_is_refused(inner: Any):
    objective, batch = OBJECTIVES["mlp"].make()
    match = "cannot be reconstructed later from seeds and coefficients alone"
    assert match in str(Momentum(inner).objection(objective, batch))
    with pytest.raises(ValueError, match=match):
        Momentum(inner).estimate(objective, batch, KEY)


@pytest.mark.parametrize("wrapped", [Momentum(mezo()), VarianceReduced(mezo())], ids=repr)
def test_a_clip_goes_within_and_not_around(wrapped: Any):
    objective, batch = OBJECTIVES["mlp"].make()
    around = Clipped(wrapped, 0.1)
    assert "put Clipped around the estimator inside it" in str(around.objection(objective, batch))
    state = wrapped.estimate(objective, batch, KEY).state
    with pytest.raises(ValueError, match="put Clipped around the estimator inside it"):
        around.estimate(objective, batch, KEY, state)
