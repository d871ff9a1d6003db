"""Traps of layers without elements: their outputs are constant, and slopes are those of the other weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import Gaussian, LowRank, Rademacher, Sphere
from gradcost.estimators.presets import backprop
from gradcost.estimators.probing import Probing
from gradcost.slopes.slope import CentralDifference, Jvp
from tables import seeded_generators
from vectors import flat

KEY = Key(300)


class Narrow(nn.Module):
    """A branch with a layer of no outputs and one of no inputs."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(6, 0, bias=bias), nn.Linear(0, 5, bias=bias), nn.Linear(6, 5)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return (self.outer(self.inner(self.norm(x)).tanh()) + self.head(x)).square().mean()


@pytest.mark.parametrize("directions", [Gaussian(), Rademacher(), Sphere(), LowRank(2)], ids=repr)
@pytest.mark.parametrize(
    ("slope", "tolerance"), [(Jvp(), 1e-10), (Jvp(together=3), 1e-10), (CentralDifference(1e-4), 1e-6)], ids=str
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (6,)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_outputs_or_inputs(shape: Any, bias: bool, slope: Any, tolerance: float, directions: Any):
    """`range() arg 3 must not be zero` in forward mode."""
    with seeded_generators(KEY):
        objective, x = Objective(Narrow(bias).double(), lambda model, x: model(x)), torch.randn(shape).double()
    found = Probing(slope, directions, 3).estimate(objective, x, KEY)
    gradient: Any = found.gradient
    assert found.slopes is not None
    expected = backprop().estimate(objective, x, KEY).gradient
    for seed, one in zip(gradient.seeds, found.slopes, strict=True):
        drawn = torch.cat([directions.draw(leaf, [seed], [1.0]).flatten() for leaf in objective.leaves])
        assert float(one) == pytest.approx(float(flat(expected) @ drawn), rel=tolerance, abs=tolerance)
