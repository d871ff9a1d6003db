"""Losses and blocks that change during training, and gradients of torch that are not those of the forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcost.checkpointing.policies import Blocks, Segments, Selective
from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective
from gradcost.directions import Rademacher
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import backprop
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.slopes.slope import CentralDifference, Jvp
from vectors import assert_agrees, flat

KEY = Key(71)
SLOPES = [(Jvp(), 1e-10), (Jvp(2), 1e-10), (CentralDifference(1e-4), 1e-5)]


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def inputs() -> Tensor:
    return torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4)


@pytest.mark.parametrize(("slope", "tolerance"), SLOPES, ids=str)
def test_a_target_under_no_grad_that_starts_after_a_warm_up(slope: Any, tolerance: float):
    is_on = False

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        out = model(x)
        if not is_on:
            return out.square().mean()
        with torch.no_grad():
            target = model(x + 0.1).tanh()
        return out.square().mean() + 3 * (out - target).square().mean()

    objective = Objective(net(), loss)
    for is_on in (False, True, False):  # noqa: B007 (read by the loss)
        assert_agrees(objective, inputs(), slope, tolerance)


@pytest.mark.parametrize(("slope", "tolerance"), SLOPES, ids=str)
def test_a_gradient_penalty_that_is_computed_at_some_steps_only(slope: Any, tolerance: float):
    is_on = False

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        if not is_on:
            return model(x).square().mean()
        x = x.clone().requires_grad_()
        (slopes,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return model(x).square().mean() + slopes.square().mean()

    objective = Objective(net(), loss)
    for is_on in (False, True, False):  # noqa: B007 (read by the loss)
        assert_agrees(objective, inputs(), slope, tolerance)


class DropPath(nn.Module):
    """A residual layer that is dropped with a rate that rises, by a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.rate = nn.Linear(4, 4), 0.0
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x).tanh()
        if self.rate:
            out = out * (torch.rand(len(x), 1, generator=self.generator) >= self.rate)
        return x + out


@pytest.mark.parametrize("saving", [Blocks(), Segments(2), Selective()], ids=repr)
def test_blocks_whose_own_generator_draws_from_a_later_step_on(saving: Any):
    torch.manual_seed(3)
    model = nn.Sequential(*(DropPath() for _ in range(4))).double()
    objective = Objective(model, lambda model, x: model(x).square().mean())
    for rate in (0.0, 0.4):
        for block in model:
            block.rate = rate  # type: ignore[assignment]
        plain, found = (e.estimate(objective, inputs(), KEY) for e in (backprop(), Reverse(saving)))
        assert torch.equal(flat(plain.gradient), flat(found.gradient))


class Texts(nn.Module):
    """An embedding and a head; the padding row enters the mean over tokens."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4, **options), nn.Linear(4, 3)
        with torch.no_grad():
            self.embedding.weight.normal_()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).tanh().mean(1))


def text_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids), ids[:, 0] % 3)


IDS = torch.tensor([[3, 1, 0, 0], [2, 5, 6, 0], [4, 4, 1, 2]])


@pytest.mark.parametrize(("slope", "tolerance"), SLOPES, ids=str)
def test_the_padding_row_of_an_embedding_is_constant_as_in_backprop(slope: Any, tolerance: float):
    torch.manual_seed(3)
    assert_agrees(Objective(Texts(padding_idx=0).double(), text_loss), IDS, slope, tolerance)


@pytest.mark.parametrize("estimator", [Probing(slope, Rademacher()) for slope, _ in SLOPES], ids=repr)
def test_a_gradient_that_is_scaled_by_frequency_is_refused(estimator: Estimator):
    objective = Objective(Texts(scale_grad_by_freq=True).double(), text_loss)
    with pytest.raises(Unsupported, match="scale_grad_by_freq=True"):
        estimator.estimate(objective, IDS, KEY)


def test_a_hook_that_reverses_a_gradient_is_told_of():
    def loss(model: Any, x: Tensor) -> Tensor:
        hidden = model[1](model[0](x))
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: -gradient)
        return model[2](hidden).square().mean()

    with pytest.warns(Note, match="a hook that the forward pass registers on a tensor runs in backprop only"):
        Probing(Jvp(), Rademacher()).estimate(Objective(net(), loss), inputs(), KEY)


def test_lazy_modules_are_refused_until_they_have_a_shape():
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    with pytest.raises(BadInput, match=r"`0\.weight` has no shape before its module's first forward"):
        Objective(model, lambda model, x: model(x).mean())
    model(torch.randn(4, 2))
    Objective(model, lambda model, x: model(x).mean())
