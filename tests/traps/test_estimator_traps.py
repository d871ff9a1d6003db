"""Traps of estimators: each test is a law that some public code for training without backprop breaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import Coordinates, Directions, Gaussian, Rademacher, Sphere
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.momentum import Momentum
from gradcost.estimators.presets import backprop, checkpointed, forward_gradient, mezo, spsa
from gradcost.estimators.probing import Probing
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp, Slope
from gradcost.tasks.digits import Digits
from gradcost.training.loop import train
from gradcost.training.optimizers import SGD, Adam
from gradcost.training.train_state import TrainState
from sampling import assert_mean
from snapshot import bits, differences, snapshot
from tables import DIRECTIONS, OBJECTIVES, raising
from vectors import direction, estimated, flat, matrix, true_gradient

KEY = Key(100)
ONE_OF_EACH: list[Estimator] = [backprop(), checkpointed(), forward_gradient(3), spsa(probes=2), mezo()]


@pytest.mark.parametrize("eps", [1e-1, 1e-3])
@pytest.mark.parametrize("slope", [CentralDifference, ForwardDifference])
def test_the_update_uses_the_direction_and_not_eps_times_it(slope: type[CentralDifference], eps: float):
    """The code of "The Cost of Avoiding Backpropagation" applies eps * z: a gradient 100 times too small under SGD,
    which Adam hides (a slope of 0.0103 against 1.03)."""
    objective, batch = OBJECTIVES["linear"].make(torch.float64)
    found = Probing(slope(eps), Rademacher()).estimate(objective, batch, KEY)
    assert isinstance(found.gradient, Seeded)
    z = direction(objective, Rademacher(), found.gradient.seeds[0])
    expected = true_gradient(objective, batch, KEY) @ z * z
    assert (flat(found.gradient) - expected).abs().max() <= 1e-11 * expected.abs().max()


@pytest.mark.parametrize("estimator", [forward_gradient(5), mezo(probes=5), Probing(ForwardDifference(), probes=5)])
def test_the_probes_of_one_estimate_have_different_directions(estimator: Probing):
    """The Cost repository, Spry and FwdLLM+ fix the seed within the loop: n directions are one, and the second
    moment with n = 10 is that with n = 1."""
    objective, batch = OBJECTIVES["mlp"].make(torch.float64)
    gradient = estimator.estimate(objective, batch, KEY).gradient
    assert isinstance(gradient, Seeded)
    z = matrix(objective, gradient.directions, gradient.seeds)
    cosines = (z @ z.T / objective.dimension).fill_diagonal_(0)
    assert cosines.abs().max() < 5 / objective.dimension**0.5


@pytest.mark.parametrize("estimator", [forward_gradient(2), mezo(), spsa()], ids=repr)
def test_each_step_has_other_directions(estimator: Probing):
    """The same error one loop further out: one direction for the whole training."""
    objective, batch = OBJECTIVES["mlp"].make()
    seeds: set[int] = set()
    for number in range(20):
        gradient = estimator.estimate(objective, batch, KEY.fold("step", number)).gradient
        assert isinstance(gradient, Seeded)
        seeds |= set(gradient.seeds)
    assert len(seeds) == 20 * estimator.probes


def test_each_step_of_a_training_has_its_own_key():
    """At a learning rate that moves nothing, a step's slope is that of an estimate with the key of the step."""
    steps = list(train(Digits(), mezo(), SGD(1e-12), KEY, steps=3))
    assert [step.key for step in steps] == [KEY.fold("step", number) for number in range(3)]
    for step in steps:
        again = mezo().estimate(step.objective, step.batch, step.key)
        assert step.slopes is not None
        assert again.slopes is not None
        assert float(step.slopes) == pytest.approx(float(again.slopes), rel=1e-3)


def test_a_training_passes_the_state_of_its_estimator_from_step_to_step():
    made, batch = OBJECTIVES["mlp"].make()
    train_state, seeds = TrainState(made, Momentum(mezo(), window=3), SGD(1e-3)), []
    for number in range(4):
        train_state.step(batch, KEY.fold("step", number))
        assert isinstance(train_state.state, tuple)
        seeds.insert(0, train_state.state[0][0])  # those of the newest estimate
        assert [past for past, _ in train_state.state] == seeds[:3]


@pytest.mark.parametrize("directions", [Gaussian(), Rademacher(), Sphere()], ids=repr)
def test_layers_of_one_shape_get_unrelated_noise(directions: Directions):
    """ES-at-Scale and a recipe for verl seed the generator again for every tensor: layers of one shape move alike."""
    model = nn.Sequential(*(nn.Linear(100, 100) for _ in range(6)))
    objective = Objective(model, lambda model, batch: model(batch).mean())
    for seed in (0, 1, 2**63):
        leaves = [leaf.double().flatten() for _, leaf in Seeded(objective, directions, (seed,), (1.0,)).leaves()]
        for kind in (leaves[0::2], leaves[1::2]):  # weights, biases
            z = torch.stack(kind)
            correlation = (z @ z.T / z.shape[1]).fill_diagonal_(0)
            assert correlation.abs().max() * z.shape[1] ** 0.5 <= 5


@pytest.mark.parametrize("name", DIRECTIONS)
def test_the_direction_applied_is_the_direction_probed(name: str):
    """mezo 0.0.1 perturbs tensors whole and updates them row by row: the cosine between the two is 0.005. LOZO
    refreshes a factor in one place and not in the other: -0.07."""

    class Sees(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.big, self.small = nn.Parameter(torch.zeros(400, 300)), nn.Parameter(torch.zeros(7))

    seen: list[Tensor] = []

    def loss(model: Any, batch: None) -> Tensor:
        seen.append(torch.cat([(model.big * 1).flatten(), (model.small * 1).flatten()]))  # what an evaluation reads
        return seen[-1].mean()

    objective = Objective(Sees(), loss)
    estimator = Probing(CentralDifference(1.0), DIRECTIONS[name])
    estimator.estimate(objective, None, KEY)  # the first use examines the loss
    seen.clear()
    found = estimator.estimate(objective, None, KEY)
    assert isinstance(found.gradient, Seeded)
    applied = Seeded(objective, DIRECTIONS[name], found.gradient.seeds, (1.0,))
    assert torch.equal(seen[0], flat(applied).float())
    assert torch.equal(seen[1], -flat(applied).float())


@pytest.mark.parametrize("probes", [1, 5])
def test_the_slope_does_not_depend_on_eps_where_the_loss_is_linear(probes: int):
    """Spry's Baffle+ and TorchOpt 0.7.3 divide by sigma where they should multiply, or the reverse: a gradient
    scaled by sigma squared."""
    objective, batch = OBJECTIVES["linear"].make(torch.float64)
    slopes = [
        Probing(kind(eps), Gaussian(), probes).estimate(objective, batch, KEY).slopes
        for kind in (CentralDifference, ForwardDifference)
        for eps in (1e-3, 1e-1, 10.0)
    ]
    assert slopes[0] is not None
    for other in slopes[1:]:
        assert other is not None
        assert (other - slopes[0]).abs().max() <= 1e-11


@pytest.mark.parametrize("slope", [ForwardDifference(), CentralDifference(), Jvp(), Jvp(together=2)], ids=repr)
def test_a_probe_among_many_is_measured_as_it_is_alone(slope: Slope):
    """TorchOpt 0.7.3 overwrites f(x) between its samples, so that the second difference is from the first end."""
    objective, batch = OBJECTIVES["transformer"].make(torch.float64)
    seeds = Gaussian().seeds(KEY, 5, objective.dimension)
    _, together = slope.measure(objective, batch, KEY, Gaussian(), seeds)
    for number, seed in enumerate(seeds):
        _, alone = slope.measure(objective, batch, KEY, Gaussian(), [seed])
        # One tangent of a stack is another kernel than one by itself: last bits differ.
        assert float(together[number]) == pytest.approx(float(alone), rel=1e-10)


@pytest.mark.parametrize("dimension", [10, 1000])
def test_directions_on_the_sphere_carry_the_factor_of_the_dimension(dimension: int):
    """DeepZero's unit-sphere directions lack the factor d: gradients of 1e-4 of the size at d = 100."""
    model = nn.Linear(dimension, 1, bias=False).double()
    objective, x = Objective(model, lambda model, batch: model(batch).mean()), torch.ones(1, dimension).double()
    z = direction(objective, Sphere(), 7)
    assert float(z.norm()) == pytest.approx(dimension**0.5, rel=1e-6)  # float32 noise
    along = [
        float(estimated(Probing(Jvp(), Sphere()), objective, x, Key(number)).sum() / dimension)
        for number in range(500)
    ]
    assert_mean(along, 1.0)


class Flat:
    """A task whose gradient is exactly zero at all weights."""

    def objective(self, key: Key) -> Objective:
        objective, self.batch = OBJECTIVES["cnn"].make()
        return Objective(objective.model, lambda model, batch: 0.0 * objective.loss(model, batch))

    def batch_at(self, key: Key, step: int) -> Any:
        return self.batch


@pytest.mark.parametrize("estimator", ONE_OF_EACH, ids=repr)
def test_a_gradient_of_zero_moves_no_weight_by_a_bit(estimator: Estimator):
    """ZO-LLM and the Cost repository draw their sparse mask again on perturbed weights: at a learning rate of 0 the
    weights drift by 50% in 200 steps. (0 is no learning rate here; a slope of 0 is the same test.)"""
    fresh = [bits(parameter) for parameter in Flat().objective(KEY).model.parameters()]
    for step in train(Flat(), estimator, SGD(0.5), KEY, steps=5):
        assert [bits(parameter) for parameter in step.objective.model.parameters()] == fresh


@pytest.mark.parametrize("estimator", ONE_OF_EACH, ids=repr)
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_the_network_after_an_estimate_is_the_network_before_it(name: str, estimator: Estimator):
    """DeepZero "restores" a view of the weights: the network stays perturbed, and every later loss is of another."""
    objective, batch = OBJECTIVES[name].make()
    before = bits(objective.evaluate(batch, KEY))
    for number in range(3):
        estimator.estimate(objective, batch, Key(number))
        assert bits(objective.evaluate(batch, KEY)) == before


@pytest.mark.parametrize("estimator", ONE_OF_EACH, ids=repr)
def test_running_out_of_memory_leaves_the_weights_as_they_are(estimator: Estimator):
    """torchzero leaves the weights perturbed when the loss raises between the two ends."""
    objective, batch, fails = raising()
    estimator.estimate(objective, batch, KEY)  # the first use examines the loss
    for at in (1, 2):
        fails.calls, fails.at = 0, at
        before = snapshot(objective.model)
        try:
            estimator.estimate(objective, batch, KEY)
        except MemoryError:
            assert fails.calls == at
        assert differences(before, snapshot(objective.model)) == []


@pytest.mark.parametrize("estimator", [backprop(), forward_gradient(2), mezo(), spsa()], ids=repr)
def test_micro_batches_are_averaged_whatever_the_method(estimator: Estimator):
    """The Cost repository sums over micro-batches for backprop and averages for the others."""
    objective, batch = OBJECTIVES["mlp"].make(torch.float64)
    batch = tuple(part[:6] for part in batch)
    whole = estimated(estimator, objective, batch, KEY)
    parts = estimated(Accumulated(estimator, 3), objective, batch, KEY)
    assert float(parts @ whole / whole.square().sum()) == pytest.approx(1.0, rel=1e-9)


def halved_square(model: Any, batch: None) -> Tensor:
    return model.weight.square().sum() / 2


class Quadratic:
    """|w|^2 / 2 in two dimensions."""

    def objective(self, key: Key) -> Objective:
        model = nn.Linear(2, 1, bias=False).double()
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[3.0, -4.0]]))
        return Objective(model, halved_square)

    def batch_at(self, key: Key, step: int) -> None:
        return None


@pytest.mark.parametrize("estimator", [backprop(), Probing(Jvp(), Coordinates(), 2), mezo()], ids=repr)
def test_a_step_is_complete_when_it_is_yielded(estimator: Estimator):
    """ZO2 applies the last update in the next forward pass, so evaluation and saving use old weights."""
    weights = [torch.tensor([[3.0, -4.0]]).double()]
    for step in train(Quadratic(), estimator, SGD(0.5), KEY, steps=4):
        assert float(step.loss) == pytest.approx(float(weights[-1].square().sum() / 2), rel=1e-5)
        weights.append(step.objective.leaves[0].parameter.detach().clone())
        assert not torch.equal(weights[-1], weights[-2])
        if not isinstance(estimator, Probing) or estimator.directions == Coordinates():
            assert torch.allclose(weights[-1], weights[-2] / 2, rtol=1e-12)


def test_seed_zero_is_a_seed():
    """ZO2 treats seed 0 as "no seed" and draws from the global generator instead."""
    objective, batch = OBJECTIVES["transformer"].make()
    torch.manual_seed(1)
    one = estimated(mezo(), objective, batch, Key(0))
    torch.manual_seed(2)
    assert torch.equal(estimated(mezo(), objective, batch, Key(0)), one)
    assert not torch.equal(estimated(mezo(), objective, batch, Key(1)), one)
    for directions in (Gaussian(), Rademacher(), Sphere()):
        z = direction(objective, directions, 0)
        assert abs(float(z.mean())) < 5 / objective.dimension**0.5
        assert float(z.square().mean()) == pytest.approx(1.0, abs=5 * (2 / objective.dimension) ** 0.5)


def cut(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).detach().square().mean()


@pytest.mark.parametrize("estimator", [backprop(), checkpointed(), forward_gradient(), forward_gradient(2)], ids=repr)
def test_a_loss_that_is_cut_from_its_weights_is_an_error_and_not_a_slope_of_zero(estimator: Estimator):
    """Several code bases take a tangent that is missing for 0 and train on nothing."""
    model, batch = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.ones(2, 3)
    objective = Objective(model, cut)
    with pytest.raises(ValueError, match="does not depend on the trainable parameters by a differentiable path"):
        estimator.estimate(objective, batch, KEY)
    both = Probing(Jvp(together=2), Gaussian(), 2)
    with pytest.raises(ValueError, match="came out without a tangent"):
        both.estimate(objective, batch, KEY)
    assert "came out without a tangent" in str(both.objection(objective, batch))
    assert mezo().estimate(objective, batch, KEY).slopes is not None  # a difference sees the real function


@pytest.mark.parametrize("estimator", ONE_OF_EACH, ids=repr)
def test_training_is_the_same_twice(estimator: Estimator):
    """One key is one run, independent of what ran before in the process."""
    runs = []
    for number in range(2):
        torch.manual_seed(number)
        last = list(train(Flatless(), estimator, Adam(0.01), KEY, steps=4))[-1]
        runs.append([bits(parameter) for parameter in last.objective.model.parameters()])
    assert runs[0] == runs[1]
    assert runs[0] != [bits(parameter) for parameter in Flatless().objective(KEY).model.parameters()]


class Flatless:
    def objective(self, key: Key) -> Objective:
        objective, self.batch = OBJECTIVES["transformer"].make()
        return objective

    def batch_at(self, key: Key, step: int) -> Any:
        return self.batch
