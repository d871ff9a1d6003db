"""Law 7. One key is one function: all estimators and both ends of a difference have the same draws and modes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcost.checkpointing.policies import Blocks, Segments
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import Gaussian, Rademacher
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp
from tables import KEY as BUILD
from tables import OBJECTIVES

KEY = Key(7)
TINY_STEP = 1e-7  # the mean of both ends is off by eps^2/2 z'Hz, which is below 1e-11 here

REVERSES: list[Estimator] = [Reverse(), Reverse(Blocks()), Reverse(Segments(2))]
EXACT: list[Estimator] = [
    Probing(Jvp(), Gaussian(), 2),
    Probing(Jvp(together=3), Rademacher(), 3),
    Probing(ForwardDifference(1e-3), Gaussian(), 2),
]


def test_the_model_with_dropout_has_one_loss_for_all_estimators():
    objective, batch = OBJECTIVES["transformer"].make(torch.float64)
    expected = float(objective.evaluate(batch, KEY))
    for estimator in REVERSES + EXACT:
        assert float(estimator.estimate(objective, batch, KEY).loss) == pytest.approx(expected, rel=1e-13)
    ends = Probing(CentralDifference(TINY_STEP), Gaussian(), 3).estimate(objective, batch, KEY)
    assert float(ends.loss) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_model_has_one_loss_for_all_estimators(name: str):
    objective, batch = OBJECTIVES[name].make(torch.float64)
    expected = float(objective.evaluate(batch, KEY))
    reverses = REVERSES if OBJECTIVES[name].blocks else REVERSES[:1]
    for estimator in reverses + EXACT:
        assert float(estimator.estimate(objective, batch, KEY).loss) == pytest.approx(expected, rel=1e-13)


def test_different_keys_are_different_functions_where_the_loss_draws():
    for problem in OBJECTIVES.values():
        objective, batch = problem.make(torch.float64)
        losses = {float(objective.evaluate(batch, Key(number))) for number in range(3)}
        assert len(losses) == (3 if problem.draws else 1)


def test_micro_batches_have_different_masks_and_the_same_ones_for_every_estimator():
    objective, batch = OBJECTIVES["transformer"].make(torch.float64)
    doubled = tuple(torch.cat([part, part]) for part in batch)
    halves = [float(loss) for _, loss, _ in objective.in_micro_batches(2).losses(doubled, KEY)]
    assert halves[0] != halves[1]
    expected = sum(halves) / 2
    for estimator in REVERSES + EXACT:
        found = estimator.estimate(objective.in_micro_batches(2), doubled, KEY)
        assert float(found.loss) == pytest.approx(expected, rel=1e-13)


def drawing(draw: Callable[[Tensor], Tensor]) -> tuple[Objective, Tensor]:
    with seeded_generators(BUILD):
        model, batch = nn.Linear(6, 6).double(), torch.randn(5, 4, 6, dtype=torch.float64)
    return Objective(model, lambda model, batch: draw(model(batch).transpose(0, 2)).sin().square().mean()), batch


def read_again(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor that is changed in place, beside the result of the change."""
    y = x * 1
    return change(y) + y.square()


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.dropout": lambda x: F.dropout(x, 0.4),
    "F.dropout in place": lambda x: F.dropout(x * 1, 0.4, inplace=True),
    "F.dropout of everything": lambda x: F.dropout(x, 1.0) + x,
    "torch.dropout": lambda x: torch.dropout(x, 0.4, True),
    "torch.dropout by name": lambda x: torch.dropout(x, p=0.4, train=True),
    "nn.Dropout": nn.Dropout(0.4),
    "nn.Dropout1d": nn.Dropout1d(0.4),
    "F.dropout in place, read again": lambda x: read_again(x, lambda y: F.dropout(y, 0.4, inplace=True)),
    "torch.dropout_": lambda x: read_again(x, lambda y: torch.dropout_(y, 0.4, True)),
    "torch.dropout_ of everything": lambda x: x + read_again(x, lambda y: torch.dropout_(y, 1.0, True)),
    "nn.AlphaDropout": nn.AlphaDropout(0.4),
    "F.alpha_dropout in place": lambda x: read_again(x, lambda y: F.alpha_dropout(y, 0.4, True, True)),
    "F.alpha_dropout of everything": lambda x: F.alpha_dropout(x, 1.0, True) + x,
    "torch.alpha_dropout": lambda x: torch.alpha_dropout(x, 0.4, train=True),
    "torch.alpha_dropout_": lambda x: read_again(x, lambda y: torch.alpha_dropout_(y, 0.4, True)),
    "nn.FeatureAlphaDropout": nn.FeatureAlphaDropout(0.4),
    "nn.RReLU": nn.RReLU(),
    "bernoulli_": lambda x: x * torch.empty_like(x).bernoulli_(0.5),
    "normal_": lambda x: x + torch.empty_like(x).normal_(),
    "uniform_": lambda x: x * (x * 1).detach().uniform_(),
    "gumbel softmax": lambda x: F.gumbel_softmax(x, dim=0),
    "attention dropout": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.4),
    "randn_like": lambda x: x + torch.randn_like(x),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
    "stochastic depth by torch": lambda x: x + (x.square() if torch.rand(()) < 0.5 else 0.0),
    "stochastic depth by Python": lambda x: x + (x.square() if random.random() < 0.5 else 0.0),
    "a crop": lambda x: x[random.randrange(3) :],
    "sampling": lambda x: x[torch.randperm(6)[:3]],
}


@pytest.mark.parametrize("draw", DRAWS)
def test_every_random_operation_draws_the_same_for_all_estimators(draw: str):
    """On a transposed tensor, where the memory order of a mask is not its logical order."""
    objective, batch = drawing(DRAWS[draw])
    values = [float(objective.evaluate(batch, Key(number))) for number in range(12)]
    assert len(set(values)) > 1 or draw.endswith("of everything"), "nothing was drawn, so the test tests nothing"
    for number in range(3):
        for estimator in REVERSES[:1] + EXACT:
            found = float(estimator.estimate(objective, batch, Key(number)).loss)
            assert found == pytest.approx(values[number], rel=1e-13)


@pytest.mark.parametrize("training", [True, False])
def test_every_evaluation_sees_the_modes_and_the_buffers_that_the_model_has(training: bool):
    seen: list[tuple[bool, bool, float]] = []

    class Watch(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            assert self.running_mean is not None
            seen.append((self.training, drop.training, float(self.running_mean.sum())))
            return super().forward(input)

    with seeded_generators(BUILD):
        drop, batch = nn.Dropout(0.5), torch.randn(9, 4)
        model = nn.Sequential(nn.Linear(4, 4), Watch(4), drop).train(training)
    objective = Objective(model, lambda model, batch: model(batch).square().mean())
    for estimator in [*REVERSES[:1], *EXACT, Probing(CentralDifference(0.1), Gaussian(), 3)]:
        estimator.estimate(objective, batch, KEY)
    assert len(seen) >= 1 + 2 + 1 + 3 + 6
    assert set(seen) == {(training, training, 0.0)}


def rms_of_slopes(eps: float, other_end: Callable[[Key], Key]) -> float:
    """Return the RMS of slopes whose two ends have the dropout masks of a key and of `other_end(key)`."""
    objective, batch = OBJECTIVES["transformer"].make(torch.float64)
    slopes: list[float] = []
    for number in range(20):
        key = KEY.fold("step", number)
        seeds = Gaussian().seeds(key, 1, objective.dimension)
        # One slope measured under a key, and the jump between the functions of the two keys over 2 eps.
        _, slope = CentralDifference(eps).measure(objective, batch, key, Gaussian(), seeds)
        jump = objective.evaluate(batch, key) - objective.evaluate(batch, other_end(key))
        slopes.append(float(slope + jump / (2 * eps)))
    return torch.tensor(slopes).square().mean().sqrt().item()


def test_the_projected_gradient_with_dropout_is_bounded_as_the_step_shrinks():
    objective, batch = OBJECTIVES["transformer"].make(torch.float64)
    exact: Any = [
        Probing(Jvp(), Gaussian()).estimate(objective, batch, KEY.fold("step", number)).slopes for number in range(20)
    ]
    expected = torch.cat(exact).square().mean().sqrt().item()
    for eps in (1e-2, 1e-3, 1e-4):
        assert rms_of_slopes(eps, lambda key: key) == pytest.approx(expected, rel=0.05)


def test_with_unmatched_dropout_it_would_grow_as_one_over_the_step():
    """The control: the measurement above detects unmatched masks."""
    sizes = [rms_of_slopes(eps, lambda key: key.fold("other")) for eps in (1e-3, 1e-4)]
    assert sizes[1] / sizes[0] > 8
    assert sizes[1] > 50 * rms_of_slopes(1e-4, lambda key: key)
