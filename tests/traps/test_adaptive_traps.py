"""Traps of selecting among directions."""

from __future__ import annotations

import torch

from gradcost.core.key import Key
from gradcost.estimators.adaptive import Adaptive, Flattest, Steepest
from gradcost.estimators.presets import mezo
from gradcost.estimators.probing import Probing
from gradcost.slopes.slope import ForwardDifference
from gradcost.theory.selection import selection_bias
from tables import OBJECTIVES
from vectors import estimated, true_gradient

KEY = Key(400)


def test_the_selected_direction_is_the_steepest_so_the_estimate_is_not_shrunk():
    """The code of "The Cost of Avoiding Backpropagation" keeps the candidate with the smallest slope: of four, the
    mean estimate is then 0.12 of the gradient, where the largest would make it 2.47."""
    objective, batch = OBJECTIVES["linear"].make(torch.float64)
    grad = true_gradient(objective, batch, KEY)

    def along(estimator: Adaptive) -> float:
        keys = [KEY.fold("draw", number) for number in range(60)]
        mean = torch.stack([estimated(estimator, objective, batch, key) for key in keys]).mean(0)
        return float(mean @ grad / grad.square().sum())

    assert along(Adaptive(Probing(ForwardDifference(0.5)))) > 1.5
    # The control: the measurement sees the smallest, and it is as small as was found there.
    assert 0.05 < along(Adaptive(Probing(ForwardDifference(0.5)), choice=Flattest())) < 0.3
    assert round(selection_bias(Flattest(), 4), 2) == 0.12
    assert round(selection_bias(Steepest(), 4), 2) == 2.47


def test_the_selection_is_made_at_each_estimate():
    """The same code selects at the first step only, and uses these directions for the whole training."""
    objective, batch = OBJECTIVES["mlp"].make(torch.float64)
    found = [estimated(Adaptive(mezo()), objective, batch, KEY.fold("step", number)) for number in range(3)]
    cosines = [float(torch.cosine_similarity(found[0], other, dim=0)) for other in found[1:]]
    assert max(map(abs, cosines)) < 0.9
