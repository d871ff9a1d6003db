"""Traps of masked directions: one mask, of the unperturbed weights, for the perturbation and for the update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import Gaussian, Rademacher
from gradcost.directions.masks import Fixed, Largest, Mask, Masked, Named, Random, Smallest
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.probing import Probing
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp, Slope
from gradcost.slopes.substitution import substituted
from gradcost.training.optimizers import SGD
from gradcost.training.train_state import TrainState
from snapshot import bits
from tables import OBJECTIVES
from vectors import flat, true_gradient

KEY = Key(430)
MASKS: list[Mask] = [Smallest(0.3), Largest(0.3), Fixed(0.3), Random(0.3), Named("*weight")]
MAGNITUDES: list[Mask] = [Smallest(0.3), Largest(0.3)]
SLOPES: list[Slope] = [Jvp(), Jvp(together=3), CentralDifference(1.0), ForwardDifference(1.0)]


def weights(objective: Objective) -> list[bytes | None]:
    return [bits(leaf.parameter) for leaf in objective.leaves]


def below(share: float, leaf: Tensor) -> Tensor:
    """The mask of the smallest, by sorting."""
    order = leaf.detach().abs().flatten().argsort()[: max(1, round(share * leaf.numel()))]
    return torch.zeros(leaf.numel(), dtype=torch.bool).index_fill_(0, order, True).view_as(leaf)


@pytest.mark.parametrize("slope", SLOPES, ids=repr)
@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_what_is_perturbed_is_what_is_updated(mask: Mask, slope: Slope):
    """ZO-LLM perturbs within a mask and updates everywhere: off the mask the update is noise. Here a slope is that of
    the very direction that its update replays, and off the mask both are zero."""
    made, batch = OBJECTIVES["linear"].make(torch.float64)
    estimate = Probing(slope, Masked(mask), 3).estimate(made, batch, KEY)
    gradient = estimate.gradient
    assert isinstance(gradient, Seeded)
    assert estimate.slopes is not None
    for seed, measured in zip(gradient.seeds, estimate.slopes.tolist(), strict=True):
        along = Seeded(made, gradient.directions, (seed,), (1.0,))
        ends = []
        for step in (1.0, -1.0):
            moved = {name: step * z for name, z in along.leaves()}
            with substituted(made, lambda leaf, moved=moved: leaf.parameter.detach() + moved[leaf.name]):
                ends.append(float(made.evaluate(batch, KEY)))
        assert measured == pytest.approx((ends[0] - ends[1]) / 2, rel=1e-10)
    assert 0 < int((flat(gradient) == 0).sum()) < 20


@pytest.mark.parametrize("slope", SLOPES, ids=repr)
def test_a_magnitude_mask_is_that_of_the_unperturbed_weights(slope: Slope):
    """The code of "The Cost of Avoiding Backpropagation" ranks the weights again after each perturbation (here of
    their own size and more): what it takes back is not what it put on, and weights drift 50% in 200 steps at lr 0."""
    made, batch = OBJECTIVES["mlp"].make()
    found = Probing(slope, Masked(Smallest(0.3), Rademacher()), 3).estimate(made, batch, KEY)
    assert isinstance(found.gradient, Seeded)
    for leaf in made.leaves:
        for seed in found.gradient.seeds:
            for base in (
                leaf.parameter.detach(),
                torch.zeros(leaf.parameter.shape),
                5 * torch.ones_like(leaf.parameter),
            ):
                moved = found.gradient.directions.add(base.detach(), leaf, [seed], [3.0])
                assert torch.equal(moved != base, below(0.3, leaf.parameter))


@pytest.mark.parametrize("slope", [Jvp(), CentralDifference(0.1)], ids=repr)
@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_at_a_learning_rate_of_0_weights_stay_for_200_steps(mask: Mask, slope: Slope):
    """Both peers' weights drift, by 50% of their norm, though nothing is learned."""
    made, batch = OBJECTIVES["linear"].make()
    before, estimator = weights(made), Probing(slope, Masked(mask))
    for step in range(200):
        estimator.stream(made, batch, KEY.fold("step", step), lambda name, gradient: None)
    assert weights(made) == before
    train_state = TrainState(made, estimator, SGD(1e-30))
    for step in range(200):
        train_state.step(batch, KEY.fold("step", step))
    assert weights(made) == before


@pytest.mark.parametrize("mask", [Fixed(0.3), Named("*weight")], ids=repr)
def test_training_leaves_what_is_off_the_mask_as_it_was(mask: Mask):
    """In ZO-LLM's sparse runs every weight moves."""
    made, batch = OBJECTIVES["mlp"].make()
    before = {leaf.name: leaf.parameter.detach().clone() for leaf in made.leaves}
    train_state = TrainState(made, Probing(Jvp(), Masked(mask, Rademacher())), SGD(0.05))
    kept = Probing(Jvp(), Masked(mask, Rademacher())).estimate(made, batch, KEY).gradient
    moves = {name: gradient != 0 for name, gradient in kept.leaves()}
    for step in range(20):
        train_state.step(batch, KEY.fold("step", step))
    for leaf in made.leaves:
        assert torch.equal(leaf.parameter != before[leaf.name], moves[leaf.name])


@pytest.mark.parametrize("mask", MAGNITUDES, ids=repr)
def test_a_gradient_is_not_replayed_with_the_mask_of_other_weights(mask: Mask):
    """A mask that is computed again at a replay, as in both peers, differs once the weights have moved."""
    made, batch = OBJECTIVES["mlp"].make()
    gradient = Probing(Jvp(), Masked(mask)).estimate(made, batch, KEY).gradient
    before = bits(flat(gradient))
    assert bits(flat(gradient)) == before
    with torch.no_grad():
        made.leaves[2].parameter.mul_(1.0)
    with pytest.raises(ValueError, match=r"`2\.weight` was changed after its mask was computed, so the gradient"):
        flat(gradient)


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_a_step_that_uses_a_leaf_at_a_time_is_the_step_of_all(mask: Mask):
    """`stream` changes a leaf after its own replay, which changes no other leaf's mask."""
    (one, batch), (other, _) = OBJECTIVES["mlp"].make(), OBJECTIVES["mlp"].make()
    estimator, gone = Probing(Jvp(), Masked(mask), 2), {leaf.name: leaf.parameter for leaf in one.leaves}
    for step in range(3):
        key = KEY.fold("step", step)

        def use(name: str, gradient: Any) -> None:
            gone[name].sub_(0.1 * gradient)

        estimator.stream(one, batch, key, use)
        found = dict(estimator.estimate(other, batch, key).gradient.leaves())
        with torch.no_grad():
            for leaf in other.leaves:
                leaf.parameter.sub_(0.1 * found[leaf.name])
        assert weights(one) == weights(other)


def test_a_mask_is_computed_at_every_estimate():
    """A mask from before the training soon selects weights that are no longer the smallest."""
    made, batch = OBJECTIVES["mlp"].make()
    estimator = Probing(Jvp(), Masked(Smallest(0.3), Rademacher()))
    for step in range(3):
        with torch.no_grad():
            for leaf in made.leaves:
                leaf.parameter.copy_(leaf.parameter.flip(0) * (1 + step))
        for leaf, (_, gradient) in zip(
            made.leaves, estimator.estimate(made, batch, KEY.fold("step", step)).gradient.leaves(), strict=True
        ):
            assert torch.equal(gradient != 0, below(0.3, leaf.parameter))


def test_a_random_mask_is_scaled_in_the_direction_once():
    """A mask drawn anew without 1 / sqrt(share) shrinks the gradient by the share; with it at one end alone, by its
    root. The mean slope along the gradient over 500 draws tells them apart at a share of 0.25."""
    made, batch = OBJECTIVES["linear"].make(torch.float64)
    estimator = Probing(Jvp(4), Masked(Random(0.25), Gaussian()), 4)
    grad = true_gradient(made, batch, KEY)
    along = torch.tensor(
        [
            float(flat(estimator.estimate(made, batch, KEY.fold("draw", n)).gradient) @ grad / grad.square().sum())
            for n in range(500)
        ]
    )
    assert abs(float(along.mean()) - 1) < 5 * float(along.std()) / 500**0.5 < 0.45
