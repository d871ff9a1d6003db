"""Guided directions: E[z z'] = (1 - share) I + share d ghat ghat', and what a good guide is worth."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import Directions, Gaussian, Rademacher, Sphere
from gradcost.directions.guided import Guided
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.presets import backprop
from gradcost.estimators.probing import Probing
from gradcost.slopes.slope import CentralDifference, Jvp
from gradcost.training.optimizers import SGD
from gradcost.training.train_state import TrainState
from sampling import assert_mean
from snapshot import bits
from tables import OBJECTIVES
from vectors import estimated, flat, matrix, true_gradient

KEY = Key(420)
TINY, TINY_BATCH = OBJECTIVES["tiny"].make(torch.float64)
LINEAR, BATCH = OBJECTIVES["linear"].make(torch.float64)


def towards(objective: Objective, guide: Tensor) -> dict[str, Tensor]:
    """The state that guides along a flat vector."""
    pieces = guide.split([leaf.parameter.numel() for leaf in objective.leaves])
    named = ((leaf.name, piece.view_as(leaf.parameter)) for leaf, piece in zip(objective.leaves, pieces, strict=True))
    return Guided.towards(named)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("directions", [Gaussian(), Rademacher(), Sphere()], ids=repr)
def test_the_second_moment_is_the_stated_one(directions: Directions, share: float):
    """Entry by entry, over both leaves; the length of the guide plays no part."""
    guided = Guided(directions, share)
    assert not guided.unbiased
    guide = torch.arange(-2.5, 5.0, dtype=torch.float64)
    found, _ = guided.resolve(TINY, KEY, towards(TINY, 300 * guide))
    z = matrix(TINY, found, found.seeds(KEY, 8000, 8))
    along = guide / guide.norm()
    stated = (1 - share) * torch.eye(8, dtype=torch.float64) + share * 8 * torch.outer(along, along)
    assert_mean(z.unsqueeze(1) * z.unsqueeze(2) - stated, 0.0)
    assert_mean(z, 0.0)
    assert_mean(z.square().sum(1), 8.0)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_mean_is_the_gradient_stretched_along_the_guide_and_shrunk_beside_it(share: float):
    grad = true_gradient(LINEAR, BATCH, KEY)
    guide = torch.linspace(-1, 2, 20, dtype=torch.float64)
    along = guide / guide.norm()
    estimator, state = Probing(CentralDifference(0.5), Guided(share=share)), towards(LINEAR, guide)
    drawn = torch.stack(
        [flat(estimator.estimate(LINEAR, BATCH, KEY.fold("mean", n), state).gradient) for n in range(4000)]
    )
    stated = (1 - share) * grad + share * 20 * (along @ grad) * along
    assert_mean(drawn - stated, 0.0)
    assert float((stated - grad).norm()) > 0.05 * float(grad.norm())


def cosines(share: float, draws: int, generator: torch.Generator) -> Tensor:
    """Of z with its guide in 20 dimensions, from the formula and other random numbers."""
    u = torch.randn(draws, 20, generator=generator, dtype=torch.float64) * math.sqrt(1 - share)
    sign = 2.0 * torch.randint(2, (draws,), generator=generator) - 1
    u[:, 0] += math.sqrt(share * 20) * sign
    return u[:, 0].abs() / u.norm(dim=1)


@pytest.mark.parametrize(
    "share", [pytest.param(0.05, marks=pytest.mark.slow), 0.5, pytest.param(0.9, marks=pytest.mark.slow)]
)
def test_a_perfect_guide_raises_the_cosine_as_the_formula_says(share: float):
    """E[cos^2] is about share + (1 - share) / d: 1 / 20 without a guide."""
    grad = true_gradient(LINEAR, BATCH, KEY)
    state = Guided.towards(backprop().estimate(LINEAR, BATCH, KEY).gradient.leaves())
    estimator = Probing(Jvp(), Guided(share=share))

    def cosine(key: Key, guide: dict[str, Tensor] | None) -> float:
        found = flat(estimator.estimate(LINEAR, BATCH, key, guide).gradient)
        return float(found @ grad / found.norm() / grad.norm())

    keys = [KEY.fold("cosine", number) for number in range(600)]
    guided, plain = (torch.tensor([cosine(key, guide) for key in keys]) for guide in (state, None))
    expected = cosines(share, 400_000, torch.Generator().manual_seed(1))
    assert_mean(guided, float(expected.mean()))
    assert float(expected.square().mean()) == pytest.approx(share + (1 - share) / 20, abs=0.035)
    assert_mean(plain.square(), 1 / 20)
    assert float(guided.mean()) > float(plain.mean()) + 0.05


def test_without_a_guide_the_directions_are_the_plain_ones():
    for slope in (Jvp(), CentralDifference()):
        plain = estimated(Probing(slope, Rademacher(), 3), LINEAR, BATCH, KEY)
        assert bits(estimated(Probing(slope, Guided(Rademacher()), 3), LINEAR, BATCH, KEY)) == bits(plain)


def test_the_guide_is_the_last_estimates_gradient():
    estimator = Probing(Jvp(), Guided(), 2)
    first = estimator.estimate(LINEAR, BATCH, KEY)
    assert first.state is not None
    assert bits(torch.cat([leaf.flatten() for leaf in first.state.values()])) == bits(flat(first.gradient))
    second = estimator.estimate(LINEAR, BATCH, KEY.fold("next"), first.state)
    assert isinstance(second.gradient, Seeded)
    z = matrix(LINEAR, second.gradient.directions, second.gradient.seeds)
    plain = matrix(LINEAR, Gaussian(), second.gradient.seeds)
    along = flat(first.gradient) / flat(first.gradient).norm()
    lean = z - math.sqrt(0.5) * plain
    assert lean.abs() == pytest.approx(math.sqrt(10) * along.abs().expand(2, -1), abs=1e-12)
    assert bits(torch.cat([leaf.flatten() for leaf in first.state.values()])) == bits(flat(first.gradient))


def test_the_signs_of_the_probes_are_their_own():
    found, _ = Guided(share=0.99).resolve(LINEAR, KEY, towards(LINEAR, torch.ones(20, dtype=torch.float64)))
    signs = (matrix(LINEAR, found, found.seeds(KEY, 400, 20)).sum(1) > 0).double()
    assert_mean(signs, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_leaf_is_added_to_in_its_own_dtype(dtype: torch.dtype, in_place: bool):
    made, batch = OBJECTIVES["mlp"].make(dtype)
    state = Guided.towards(backprop().estimate(made, batch, KEY).gradient.leaves())
    found, _ = Guided().resolve(made, KEY, state)
    for leaf in made.leaves:
        base = leaf.parameter.detach().clone()
        before = base.clone()
        out = found.add(base, leaf, [1, 2], [0.01, 0.5], in_place)
        assert (out is base) == in_place
        assert in_place or bits(base) == bits(before)
        assert out.dtype == dtype
        lone = [found.add(torch.zeros_like(base), leaf, [seed], [1.0]).double() for seed in (1, 2)]
        expected = before.double() + 0.01 * lone[0] + 0.5 * lone[1]
        assert (out.double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps * (1 + expected.abs().max())


def test_it_keeps_a_tensor_a_leaf_from_the_first_step_on():
    made, batch = OBJECTIVES["mlp"].make()
    train_state = TrainState(made, Probing(Jvp(), Guided()), SGD(1e-3))
    for number in range(3):
        assert sum(tensor.numel() for tensor in train_state.held_tensors()) == made.dimension
        train_state.step(batch, KEY.fold("step", number))


def test_a_fixed_guide_is_given_at_every_estimate():
    """And whatever the gradient, it is not changed."""
    state = Guided.towards(backprop().estimate(LINEAR, BATCH, KEY).gradient.leaves())
    before = {name: bits(tensor) for name, tensor in state.items()}
    estimator = Probing(Jvp(), Guided())
    one = [flat(estimator.estimate(LINEAR, BATCH, KEY, state).gradient) for _ in range(2)]
    assert bits(one[0]) == bits(one[1])
    assert {name: bits(tensor) for name, tensor in state.items()} == before


def test_a_guide_that_lacks_a_leaf_is_refused():
    with pytest.raises(ValueError, match="the guide has no tensor for free: it needs one for each leaf"):
        Probing(Jvp(), Guided()).estimate(LINEAR, BATCH, KEY, {
            leaf.name: leaf.parameter for leaf in LINEAR.leaves if leaf.name != "free"
        })  # fmt: skip


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, math.nan])
def test_a_share_that_is_none_is_refused(share: float):
    with pytest.raises(
        ValueError, match="the fraction of a direction's squared norm along the guide, must be above 0 and below 1"
    ):
        Guided(share=share)
