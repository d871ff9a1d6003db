"""Masked directions: E[z z'], which weights a mask keeps, and that nothing else is touched."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alive import Alive
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import Coordinates, Directions, Gaussian, Rademacher
from gradcost.directions.masks import Fixed, Largest, Mask, Masked, Named, Random, Smallest
from gradcost.estimators.probing import Probing
from gradcost.noise import add as noise
from gradcost.slopes.slope import CentralDifference, Jvp
from sampling import assert_mean
from snapshot import bits
from tables import OBJECTIVES
from vectors import estimated, flat, matrix, true_gradient

KEY = Key(400)
FIXED: list[Mask] = [Smallest(0.4), Largest(0.4), Fixed(0.5), Fixed(0.5, seed=3), Named("*weight")]


def resolve(objective: Objective, mask: Mask, directions: Directions | None = None, key: Key = KEY) -> Directions:
    return Masked(mask, directions or Gaussian()).resolve(objective, key, None)[0]


def kept(objective: Objective, mask: Mask) -> Tensor:
    """1 on the mask and 0 off it: signs are nowhere zero."""
    return matrix(objective, resolve(objective, mask, Rademacher()), [1])[0].abs()


def only(*leaves: Tensor) -> Objective:
    model = nn.Module()
    for number, leaf in enumerate(leaves):
        model.register_parameter(f"p{number}", nn.Parameter(leaf))
    return Objective(model, lambda model, batch: sum(p.sum() for p in model.parameters()))  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", FIXED, ids=repr)
@pytest.mark.parametrize("directions", [Gaussian(), Rademacher()], ids=repr)
def test_the_second_moment_behind_a_fixed_mask_is_the_mask(mask: Mask, directions: Directions):
    tiny, _ = OBJECTIVES["tiny"].make(torch.float64)
    assert not Masked(mask, directions).unbiased
    diagonal = kept(tiny, mask)
    assert 0 < float(diagonal.sum()) < 8
    found = resolve(tiny, mask, directions)
    z = matrix(tiny, found, found.seeds(KEY, 3000, 8))
    assert_mean(z.unsqueeze(1) * z.unsqueeze(2) - diagonal.diag(), 0.0)
    assert bool((z[:, diagonal == 0] == 0).all())


@pytest.mark.parametrize("directions", [Gaussian(), Rademacher(), Coordinates()], ids=repr)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_second_moment_behind_a_mask_drawn_anew_is_the_identity(directions: Directions, share: float):
    """Coordinates too, whose few seeds come again and again: the mask is of the estimate's key as well."""
    tiny, _ = OBJECTIVES["tiny"].make(torch.float64)
    assert Masked(Random(share), directions).unbiased
    z = []
    for number in range(6000):
        key = KEY.fold("draw", number)
        found = resolve(tiny, Random(share), directions, key)
        z.append(matrix(tiny, found, found.seeds(key, 2, 8)[1:]))
    drawn = torch.cat(z)
    assert_mean(drawn.unsqueeze(1) * drawn.unsqueeze(2) - torch.eye(8), 0.0)
    if not isinstance(directions, Coordinates):
        assert_mean((drawn != 0).double(), share)


def test_an_estimate_is_unbiased_when_mask_and_directions_are():
    biased = Gaussian()
    object.__setattr__(biased, "unbiased", False)
    assert not Masked(Random(0.5), biased).unbiased


@pytest.mark.parametrize(
    ("probes", "share"),
    [pytest.param(1, 0.5, marks=pytest.mark.slow), pytest.param(1, 0.25, marks=pytest.mark.slow), (5, 0.25)],
)
def test_a_random_mask_scatters_as_it_states(probes: int, share: float):
    linear, batch = OBJECTIVES["linear"].make(torch.float64)
    grad, estimator = true_gradient(linear, batch, KEY), Probing(Jvp(probes), Masked(Random(share)), probes)
    keys = [KEY.fold("draw", number) for number in range(2000 // probes)]
    squares = [float(estimated(estimator, linear, batch, key).square().sum() / grad.square().sum()) for key in keys]
    assert_mean(squares, 1 + (20 - 2 + 3 / share) / probes)


# By default the first and the last of them.
SOME = [pytest.param(mask, marks=[pytest.mark.slow] * (mask not in (FIXED[0], FIXED[-1]))) for mask in FIXED]


@pytest.mark.parametrize("mask", SOME, ids=repr)
def test_the_mean_is_the_gradient_within_the_mask(mask: Mask):
    linear, batch = OBJECTIVES["linear"].make(torch.float64)
    grad, estimator = true_gradient(linear, batch, KEY), Probing(Jvp(), Masked(mask, Rademacher()))
    drawn = torch.stack([estimated(estimator, linear, batch, KEY.fold("mean", n)) for n in range(1000)])
    assert_mean(drawn - kept(linear, mask) * grad, 0.0)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 30, 101])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5, 1.0])
def test_the_share_is_kept_of_each_leaf(size: int, share: float):
    weights = torch.randn(size, generator=torch.Generator().manual_seed(size))
    number = max(1, round(share * size))
    order = weights.abs().argsort()
    low, high = kept(only(weights), Smallest(share)), kept(only(weights), Largest(share))
    assert low.nonzero().flatten().tolist() == sorted(order[:number].tolist())
    assert high.nonzero().flatten().tolist() == sorted(order[size - number :].tolist())


def test_ties_at_the_threshold_are_kept_together():
    tied = only(torch.tensor([1.0, -1.0, 1.0, 3.0, 0.5]), torch.zeros(4))
    assert kept(tied, Smallest(0.4)).tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 1]
    assert kept(tied, Largest(0.4)).tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 1]


def test_a_share_is_of_each_leaf_and_not_of_all():
    made = only(torch.arange(1.0, 11.0), torch.arange(100.0, 110.0))
    assert kept(made, Smallest(0.2)).nonzero().flatten().tolist() == [0, 1, 10, 11]


def test_a_leaf_without_weights_is_no_obstacle():
    assert kept(only(torch.zeros(0), torch.arange(2.0)), Smallest(0.5)).tolist() == [1, 0]


def test_a_fixed_mask_is_one_for_all_and_another_for_another_seed():
    made = only(torch.ones(4000))
    one, same, other = (kept(made, mask) for mask in (Fixed(0.3), Fixed(0.3, seed=0), Fixed(0.3, seed=1)))
    assert torch.equal(one, same)
    assert abs(float(one.mean()) - 0.3) < 5 * math.sqrt(0.21 / 4000)
    assert abs(float((one * other).mean()) - 0.09) < 5 * math.sqrt(0.09 / 4000)


def test_a_name_is_matched_by_a_pattern_and_what_it_misses_is_not_reached():
    made, batch = OBJECTIVES["mlp"].make(torch.float64)
    found = Probing(Jvp(), Masked(Named("2.*"))).estimate(made, batch, KEY)
    norms = {name: float(leaf.norm()) for name, leaf in found.gradient.leaves()}
    assert {name for name, norm in norms.items() if norm} == {"2.weight", "2.bias"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("mask", FIXED, ids=repr)
def test_off_the_mask_bits_stay_and_on_it_the_numbers_are_the_unmasked_ones(
    mask: Mask, in_place: bool, dtype: torch.dtype
):
    """Also where the base has a negative zero, a subnormal number and no number at all."""
    made, _ = OBJECTIVES["mlp"].make(dtype)
    found = resolve(made, mask)
    for leaf in made.leaves:
        where = resolve(made, mask, Rademacher()).draw(leaf, [1], [1.0]) != 0
        base = leaf.parameter.detach().clone()
        base.view(-1)[:3] = torch.tensor([-0.0, 1e-41, math.nan], dtype=torch.float64).to(dtype)
        before, plain = base.clone(), Gaussian().add(base, leaf, [5, 6, 7], [0.5, -0.25, 2.0])
        out = found.add(base, leaf, [5, 6, 7], [0.5, -0.25, 2.0], in_place)
        assert bits(out[where]) == bits(plain[where])
        assert bits(out[~where]) == bits(before[~where])
        assert (out is base) or bits(base) == bits(before)
        assert (out is base) == in_place or not bool(where.any())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_off_a_mask_drawn_anew_bits_stay(dtype: torch.dtype):
    made, _ = OBJECTIVES["mlp"].make(dtype)
    found = resolve(made, Random(0.5))
    for leaf in made.leaves:
        base = leaf.parameter.detach()
        where = found.draw(leaf, [5], [1.0]) != 0
        out = found.add(base, leaf, [5], [0.5])
        assert bits(out[where]) == bits(Gaussian().add(base, leaf, [5], [0.5 / math.sqrt(0.5)])[where])
        assert bits(out[~where]) == bits(base[~where])


@pytest.mark.parametrize("mask", [*FIXED, Random(0.4)], ids=repr)
def test_the_fused_and_the_reference_path_are_the_same_bits(mask: Mask, monkeypatch: pytest.MonkeyPatch):
    made, batch = OBJECTIVES["transformer"].make()
    estimator = Probing(CentralDifference(), Masked(mask), 2)
    fused = bits(estimated(estimator, made, batch, KEY))
    monkeypatch.setattr(noise, "has_fused_path", lambda: False)
    assert bits(estimated(estimator, made, batch, KEY)) == fused


@pytest.mark.parametrize("mask", [*FIXED[:-1], Named("p?"), Random(0.4)], ids=repr)
def test_nothing_as_large_as_a_leaf_is_kept(mask: Mask):
    made = only(torch.randn(60_000), torch.randn(300, 200))
    with Alive() as alive:
        found = resolve(made, mask)
        assert alive.bytes <= 2 * 4
        for leaf in made.leaves:
            out = found.add(leaf.parameter.detach(), leaf, [1, 2], [0.5, 0.5])
            assert alive.bytes <= leaf.parameter.nbytes + 2 * 4
            del out
        assert alive.bytes <= 2 * 4


@pytest.mark.parametrize("mask", [Smallest, Largest, Fixed, Random])
@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, math.nan])
def test_a_share_that_is_none_is_refused(mask: Any, share: float):
    with pytest.raises(ValueError, match=r"the fraction of weights that a mask chooses, must be in \(0, 1\], not"):
        mask(share)


def test_a_pattern_that_no_name_matches_is_refused():
    made, batch = OBJECTIVES["mlp"].make()
    with pytest.raises(
        ValueError, match=r"no trainable parameter matches 'head\.\*'\. Match one of 0\.weight, 0\.bias"
    ):
        Probing(Jvp(), Masked(Named("head.*"))).estimate(made, batch, KEY)


def test_a_state_is_nothing():
    made, batch = OBJECTIVES["mlp"].make()
    estimator = Probing(Jvp(), Masked(Smallest(0.5)))
    assert estimator.init(made) is None
    assert estimator.estimate(made, batch, KEY).state is None
    assert bits(flat(estimator.estimate(made, batch, KEY).gradient)) == bits(estimated(estimator, made, batch, KEY))
