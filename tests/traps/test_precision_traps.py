"""Traps of half precision: differences of losses and updates that are lost to rounding."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective
from gradcost.directions import Gaussian
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import backprop, mezo
from gradcost.estimators.probing import Probing
from gradcost.slopes.slope import CentralDifference, ForwardDifference
from gradcost.training.optimizers import SGD, Optimizer
from gradcost.training.rounding import Master, StochasticallyRounded
from gradcost.training.train_state import TrainState
from tables import OBJECTIVES

KEY = Key(46)


def notes(estimator: Estimator, objective: Objective, batch: Any, times: int = 1) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(times):
            estimator.estimate(objective, batch, KEY.fold("step", number))
    return [str(one.message) for one in caught if issubclass(one.category, Note)]


def normed(dtype: torch.dtype) -> tuple[Objective, Tensor]:
    """A LayerNorm, all of whose weights are 1, behind a linear layer."""
    with seeded_generators(KEY):
        model, x = nn.Sequential(nn.Linear(16, 32768), nn.LayerNorm(32768)), torch.randn(5, 16)
    return Objective(
        model.to(dtype), lambda model, x: model(x).float().square().mean() + model(x).float().mean()
    ), x.to(dtype)


# ---- eps and dtype


@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: Accumulated(e, 5)], ids=["alone", "in parts"])
def test_a_perturbation_that_rounds_away_is_noted_once_with_its_figures(wrap: Any):
    """At eps = 1e-3 a LayerNorm weight of 1 keeps 3% of the moves in bfloat16, at a cosine of 0.37: other code
    trains on what is left, without a warning."""
    objective, x = normed(torch.bfloat16)
    (said,) = [note for note in notes(wrap(mezo(1e-3)), objective, x, times=3) if "cosine" in note]
    for figure in ("eps = 0.001", "`1.weight`", "bfloat16", "about 1)", "cosine of 0.37", ": 97.", "eps = 0.0078"):
        assert figure in said
    assert notes(wrap(mezo(1e-3)), objective, x) == []
    assert not any("cosine" in note for note in notes(wrap(mezo(7.8e-3)), objective, x))  # what it advises works
    more = notes(wrap(mezo(5e-4)), objective, x)
    assert ["cosine" in note for note in more].count(True) == 1  # another configuration is told its own figures


def test_in_float16_and_float32_the_same_perturbation_stays():
    for dtype in (torch.float16, torch.float32):
        assert notes(mezo(1e-3), *normed(dtype)) == []


@pytest.mark.parametrize("slope", [CentralDifference(1e-3), ForwardDifference(1e-3)], ids=repr)
def test_a_loss_in_half_precision_is_noted_once_with_its_figures(slope: CentralDifference):
    """One bfloat16 unit of a loss near 2 is 2^-6, which over 2 eps is 7.8: the projected gradient is 0 or that."""
    model = nn.Linear(4, 1, bias=False)
    nn.init.constant_(model.weight, 0.75)
    objective = Objective(model, lambda model, x: model(x).sum().to(torch.bfloat16))
    x = torch.full((1, 4), 0.7)
    found = notes(Probing(slope), objective, x, times=3)
    assert len(found) == 1
    for figure in ("eps = 0.001", "apart", "bfloat16", "is 0.016", "logits.float()"):
        assert figure in found[0]
    slopes = Probing(CentralDifference(1e-3), Gaussian(), 20).estimate(objective, x, KEY).slopes
    assert slopes is not None
    assert bool((slopes % (2**-6 / 2e-3)).eq(0).all())


def test_the_library_computes_the_loss_in_float32_where_it_can():
    """So that half-precision scores are no reason for the note above, and slopes are not multiples of 7.8."""
    objective, batch = OBJECTIVES["mlp"].make(torch.bfloat16)
    estimator = Probing(CentralDifference(0.02), Gaussian(), 8)
    assert notes(estimator, objective, batch) == []
    exact, found = OBJECTIVES["mlp"].make()[0], estimator.estimate(objective, batch, KEY)
    assert found.slopes is not None
    with torch.no_grad():
        for leaf, other in zip(exact.leaves, objective.leaves, strict=True):
            leaf.parameter.copy_(other.parameter)
    expected = estimator.estimate(exact, [part.float() if part.is_floating_point() else part for part in batch], KEY)
    assert expected.slopes is not None
    error = (found.slopes - expected.slopes).square().mean().sqrt() / expected.slopes.square().mean().sqrt()
    assert error < 0.25
    coarse = Objective(objective.model, lambda model, batch: objective.loss(model, batch).to(torch.bfloat16))
    drowned = estimator.estimate(coarse, batch, KEY).slopes
    assert drowned is not None
    assert (drowned - expected.slopes).square().mean().sqrt() / expected.slopes.square().mean().sqrt() > error


def test_a_difference_within_a_few_units_of_the_loss_is_noted_once_with_both_figures():
    objective, batch = OBJECTIVES["mlp"].make()
    estimator = Probing(CentralDifference(1e-8), Gaussian(), 4)
    found = notes(estimator, objective, batch, times=5)
    assert len(found) == 1
    for figure in ("eps = 1e-08", "apart", "float32) is 1.2e-07", "mostly rounding", "eps=None"):
        assert figure in found[0]
    assert notes(Probing(CentralDifference(), Gaussian(), 4), objective, batch, times=5) == []


# ---- update underflow


def of_updates(dtype: torch.dtype, optimizer: Optimizer) -> Tensor:
    """Which of 100,000 weights of RMS 0.02 one update of RMS 1e-5 moves."""
    with seeded_generators(KEY):
        model, pull = nn.Linear(100_000, 1, bias=False), torch.randn(1, 100_000)
        nn.init.normal_(model.weight, std=0.02)
    model.to(dtype)
    before = model.weight.detach().clone()
    train_state = TrainState(
        Objective(model, lambda model, x: (x * model.weight.float()).sum()), backprop(), optimizer
    )
    train_state.step(pull, KEY)
    return before != model.weight.detach()


def test_an_update_far_below_the_spacing_moves_few_weights_and_random_rounding_moves_as_many_as_it_should():
    """12% of bfloat16 weights and 61% of float16 ones, by rounding to nearest: only a master copy
    remembers the updates of the others."""
    share = {dtype: float(of_updates(dtype, SGD(1e-5)).double().mean()) for dtype in (torch.bfloat16, torch.float16)}
    assert share[torch.bfloat16] == pytest.approx(0.12, abs=0.02)
    assert share[torch.float16] == pytest.approx(0.61, abs=0.04)
    assert torch.equal(of_updates(torch.bfloat16, Master(SGD(1e-5))), of_updates(torch.bfloat16, SGD(1e-5)))
    assert float(of_updates(torch.bfloat16, StochasticallyRounded(SGD(1e-5))).double().mean()) > share[torch.bfloat16]
