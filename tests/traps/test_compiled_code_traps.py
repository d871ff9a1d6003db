"""Traps of torch.compile inside a forward pass: compiled code drops tangents, and keeps replaced weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp, Slope
from tables import seeded_generators
from vectors import assert_agrees

KEY = Key(300)
JVPS: list[Slope] = [Jvp(), Jvp(together=2)]


@pytest.fixture(autouse=True)
def nothing_is_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any]) -> Any:
    return torch.compile(function, backend="aot_eager")


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(6, 6), nn.Linear(6, 6), nn.Parameter(torch.ones(6))


class Method(Layers):
    @compiled
    def inner(self, x: Tensor) -> Tensor:
        return self.a(x) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x) + self.b(x) * self.scale


class Helper(Layers):
    """The helper has no weights, and other code has not called it before the first slope."""

    def __init__(self) -> None:
        super().__init__()
        self.swish = compiled(lambda x: x * x.sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.swish(self.a(x))) * self.scale


class Constant(Layers):
    """A part of the helper is constant for backprop."""

    def __init__(self) -> None:
        super().__init__()

        def gated(x: Tensor) -> Tensor:
            with torch.no_grad():
                gate = x.sigmoid()
            return x * gate

        self.gated = compiled(gated)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.gated(self.a(x))) * self.scale


class Forward(Layers):
    @compiled
    def forward(self, x: Tensor) -> Tensor:
        return x + self.b((self.a(x) * self.scale).tanh())


class FrozenModule(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = compiled(nn.Sequential(nn.Linear(6, 6), nn.Tanh()).requires_grad_(False))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.frozen(self.a(x))) * self.scale


MODELS = [Method, Helper, Constant, Forward, FrozenModule]


def objective_of(make: type[nn.Module]) -> tuple[Objective, Tensor]:
    with seeded_generators(KEY):
        model, x = make().double(), torch.randn(4, 6).double()
    return Objective(model, lambda model, x: model(x).square().mean()), x


@pytest.mark.parametrize("slope", JVPS, ids=repr)
@pytest.mark.parametrize("make", MODELS)
def test_code_that_is_compiled_inside_a_forward_pass_is_differentiated_forward(make: type[nn.Module], slope: Slope):
    """The slopes of `Method` were 2.58 instead of 2.20 and -0.72 instead of -1.35."""
    objective, x = objective_of(make)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)  # none about the backward of a `CompiledFunction`
        assert slope.objection(objective, x) is None
        for _ in range(2):
            assert_agrees(objective, x, slope)


@pytest.mark.parametrize("slope", [CentralDifference(1e-4), ForwardDifference(1e-7)], ids=repr)
@pytest.mark.parametrize("make", MODELS)
def test_a_finite_difference_of_code_that_is_compiled_inside_a_forward_pass(make: type[nn.Module], slope: Slope):
    """Dynamo kept the replaced weights of the first direction: the slopes of the next ones were -0.02 instead of 0.53
    and -0.51 instead of 0.29."""
    objective, x = objective_of(make)
    assert_agrees(objective, x, slope, 1e-5)
