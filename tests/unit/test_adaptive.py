"""Adaptive: one of several directions is kept in each group of leaves, and what that does to the mean is stated."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counting import Flops
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import Coordinates, Gaussian, Layerwise, Rademacher
from gradcost.directions.groups import EachLeaf, EachModule
from gradcost.estimators.adaptive import Adaptive, Choice, Flattest, Steepest
from gradcost.estimators.combine import Sign
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.presets import backprop, forward_gradient, mezo
from gradcost.estimators.probing import Probing
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp
from gradcost.theory.selection import selection_bias
from sampling import assert_mean
from tables import OBJECTIVES
from vectors import estimated, flat, true_gradient

KEY = Key(71)
ONE_SIDED = Probing(ForwardDifference(0.5))  # exact on a linear loss


class Pulled(nn.Module):
    """A loss that is linear in its leaves, of 3, 4 and 2 weights: the last two are one module's."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.layer = nn.Parameter(torch.zeros(3)), nn.Module()
        self.layer.a, self.layer.b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2))

    def forward(self, pulls: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([p @ pull for p, pull in zip(self.parameters(), pulls, strict=True)]).sum()


LINEAR = Objective(Pulled().double(), lambda model, batch: model(batch))
BATCH = tuple(torch.arange(1.0, size + 1, dtype=torch.float64) - 2.5 for size in (3, 4, 2))
GRAD = true_gradient(LINEAR, BATCH, KEY)
CHOICES = [Steepest(), Flattest()]


@pytest.mark.parametrize("choice", CHOICES, ids=repr)
@pytest.mark.parametrize("candidates", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_mean_is_the_stated_multiple_of_the_gradient(candidates: int, choice: Choice):
    estimator = Adaptive(ONE_SIDED, candidates, choice)
    drawn = torch.stack([estimated(estimator, LINEAR, BATCH, KEY.fold("draw", n)) for n in range(400)])
    stated = selection_bias(choice, candidates)
    assert_mean(drawn - stated * GRAD, 0.0)
    # Along the gradient of each leaf by itself too, where five standard errors are few enough to tell m from 1.
    along, start = [], 0
    for leaf in LINEAR.leaves:
        own = slice(start, start := start + leaf.parameter.numel())
        along.append(drawn[:, own] @ GRAD[own] / GRAD[own].square().sum())
    assert_mean(torch.stack(along, 1), stated)
    mean = torch.cat(along)
    assert candidates == 1 or 5 * float(mean.std()) / len(mean) ** 0.5 < abs(stated - 1) / 2, (
        "too few draws to say so"
    )


@pytest.mark.parametrize("by_module", [False, True])
def test_one_candidate_in_each_group_is_unbiased_and_scatters_as_the_groups_do(by_module: bool):
    """E|g|^2 = sum_g (d_g + 2) |grad_g|^2 for Gaussian directions."""
    estimator = Adaptive(ONE_SIDED, 1, by=EachModule() if by_module else EachLeaf())
    sizes = {"free": 3, "layer.a": 6, "layer.b": 6} if by_module else {"free": 3, "layer.a": 4, "layer.b": 2}
    grads = dict(backprop().estimate(LINEAR, BATCH, KEY).gradient.leaves())
    stated = sum((sizes[name] + 2) * float(g.square().sum()) for name, g in grads.items())
    squares = [float(estimated(estimator, LINEAR, BATCH, KEY.fold("d", n)).square().sum()) for n in range(600)]
    assert_mean(squares, stated)


@pytest.mark.parametrize(
    "slope", [Jvp(), Jvp(together=3), CentralDifference(1e-4), ForwardDifference(1e-4)], ids=repr
)
@pytest.mark.parametrize("choice", CHOICES, ids=repr)
def test_the_kept_direction_of_each_group_is_the_one_that_the_choice_takes(choice: Choice, slope: Any):
    """Recomputed here from the seeds: the slopes of all candidates are inner products with the group's gradient."""
    objective, batch = OBJECTIVES["transformer"].make(torch.float64)
    found = Adaptive(Probing(slope, Rademacher()), 3, choice).estimate(objective, batch, KEY)
    grads = dict(backprop().estimate(objective, batch, KEY).gradient.leaves())
    assert found.slopes is not None
    assert len(found.slopes) == len(objective.leaves)
    pick = max if choice == Steepest() else min
    for number, (leaf, slope_kept) in enumerate(zip(objective.leaves, found.slopes.tolist(), strict=True)):
        group = objective.only([leaf.name])
        seeds = Rademacher().seeds(KEY.fold("group", number), 3, group.dimension)
        slopes = [float(flat(Seeded(group, Rademacher(), (s,), (1.0,))) @ grads[leaf.name].flatten()) for s in seeds]
        assert slope_kept == pytest.approx(pick(slopes, key=abs), rel=1e-3, abs=1e-3)


def test_a_gradient_is_16_bytes_a_group_and_probe_and_zero_nowhere():
    for probes in (1, 3):
        found = Adaptive(forward_gradient(probes), 2).estimate(LINEAR, BATCH, KEY)
        assert found.gradient.nbytes == 16 * probes * len(LINEAR.leaves)
        assert bool(flat(found.gradient).ne(0).all())


@pytest.mark.slow
def test_several_probes_are_the_mean_of_as_many_choices():
    estimator = Adaptive(replace(ONE_SIDED, probes=3), 2)
    drawn = torch.stack([estimated(estimator, LINEAR, BATCH, KEY.fold("draw", n)) for n in range(200)])
    assert_mean(drawn - selection_bias(Steepest(), 2) * GRAD, 0.0)


def test_only_what_the_tangent_passes_through_is_multiplied():
    """Into layer l of L: L for the loss, 1 for its own tangent, one for each later layer."""
    width, layers = 12, 4
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(layers)))
    objective = Objective(model, lambda model, batch: model(batch).square().mean())
    with Flops() as flops:
        Adaptive(forward_gradient(), 3).estimate(objective, torch.ones(6, width), KEY)
    assert flops.total == 2 * 6 * width**2 * 3 * sum(layers + 1 + later for later in range(layers))


def test_a_leaf_that_the_loss_does_not_read_has_slope_0():
    objective, batch = OBJECTIVES["direct"].make(torch.float64)
    for slope in (Jvp(), CentralDifference(1e-3)):
        found = Adaptive(Probing(slope), 2).estimate(objective, batch, KEY)
        gradient = dict(found.gradient.leaves())
        assert bool(gradient["unused"].eq(0).all())
        assert bool(gradient["temperature"].ne(0).all())


# ---- the theory


def test_the_mean_of_the_extremes_of_squared_normals():
    """Closed forms for one and two; for more, a sum over the two choices of two: max + min of a pair is their sum."""
    for choice in CHOICES:
        assert selection_bias(choice, 1) == pytest.approx(1.0, rel=1e-12)
    assert selection_bias(Steepest(), 2) == pytest.approx(1 + 2 / math.pi, rel=1e-12)
    assert selection_bias(Flattest(), 2) == pytest.approx(1 - 2 / math.pi, rel=1e-12)
    # Maximum and minimum by inclusion and exclusion over the subsets of four.
    least = [selection_bias(Flattest(), k) for k in range(1, 5)]
    assert selection_bias(Steepest(), 4) == pytest.approx(4 * least[0] - 6 * least[1] + 4 * least[2] - least[3])
    assert selection_bias(Steepest(), 10**6) == pytest.approx(24, abs=1.5)  # about 2 ln k - ln ln k + ...


@pytest.mark.parametrize("choice", CHOICES, ids=repr)
def test_it_is_what_drawn_normals_give(choice: Choice):
    drawn = torch.randn(20_000, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    kept = [row[choice.of(row)] ** 2 for row in drawn.tolist()]
    assert_mean(kept, selection_bias(choice, 5))


# ---- refusals

REFUSED: list[tuple[Any, str]] = [
    (lambda: Adaptive(mezo(), 0), "directions to select from, 1 or more, not 0."),
    (lambda: Adaptive(backprop()), "Adaptive selects among the directions of a Probing"),  # type: ignore[arg-type]
    (lambda: Adaptive(Probing(Jvp(), Layerwise())), "depend on more than a seed: use Gaussian"),
    (lambda: Adaptive(Probing(Jvp(), Gaussian(), 2, Sign())), "leave the Probing's combine as Mean"),
    (lambda: selection_bias(Steepest(), 0), "candidates must be 1 or more, not 0."),
]


@pytest.mark.parametrize(("make", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_what_cannot_be_is_refused_in_a_sentence(make: Any, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_coordinates_are_those_of_the_group():
    found = Adaptive(Probing(Jvp(), Coordinates()), 5).estimate(LINEAR, BATCH, KEY)
    kept = [(leaf != 0).sum().item() for _, leaf in found.gradient.leaves()]
    assert kept == [1, 1, 1]
