"""Traps of embeddings: backprop gives the padding row no gradient, wherever the embedding is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcost.core.errors import Unsupported
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import LowRank, Rademacher
from gradcost.estimators.presets import forward_gradient, mezo
from gradcost.estimators.probing import Probing
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp
from tables import seeded_generators
from vectors import assert_agrees

KEY = Key(300)
IDS = torch.tensor([[3, 1, 0, 0], [2, 5, 6, 0], [4, 4, 1, 2]])
FORWARD = [(Jvp(), 1e-10), (Jvp(together=2), 1e-10)]
SLOPES = [*FORWARD, (CentralDifference(1e-5), 1e-6), (ForwardDifference(1e-7), 1e-5)]
Look = Callable[["Words", Tensor], Tensor]


class Words(nn.Module):
    """A table of a user's own."""

    def __init__(self, look: Look) -> None:
        super().__init__()
        self.weight, self.scale, self.look = nn.Parameter(torch.randn(7, 4)), nn.Parameter(torch.ones(4)), look
        self.fixed: Tensor
        self.register_buffer("fixed", torch.randn(7, 4))

    def forward(self, ids: Tensor) -> Tensor:
        return (self.look(self, ids) * self.scale).tanh().mean(1)


def objective_of(look: Look, loss: Any = lambda model, ids: model(ids).pow(2).sum()) -> Objective:
    with seeded_generators(KEY):
        return Objective(Words(look).double(), loss)


OF_LEAVES: dict[str, Look] = {
    "position": lambda words, ids: F.embedding(ids, words.weight, 0),
    "name": lambda words, ids: F.embedding(input=ids, weight=words.weight, padding_idx=0),
    "from the end": lambda words, ids: F.embedding(ids, words.weight, padding_idx=-7),
    "torch": lambda words, ids: torch.embedding(words.weight, ids, 0),
    "torch, none": lambda words, ids: torch.embedding(words.weight, ids),
    "constant": lambda words, ids: F.embedding(ids, words.fixed, 0) + F.embedding(ids, words.weight),
    "twice": lambda words, ids: F.embedding(ids, words.weight, 0) * F.embedding(ids, words.weight, 1),
}
COMPUTED: dict[str, Look] = {
    "product": lambda words, ids: F.embedding(ids, words.weight * 2 + words.scale, 0),
    "torch": lambda words, ids: torch.embedding(words.weight.tanh(), ids, padding_idx=0),
}


@pytest.mark.parametrize(("slope", "tolerance"), SLOPES)
@pytest.mark.parametrize("name", OF_LEAVES)
def test_the_padding_row_of_a_functional_embedding_is_constant(name: str, slope: Any, tolerance: float):
    """The slope was -4.65 instead of 1.42."""
    assert_agrees(objective_of(OF_LEAVES[name]), IDS, slope, tolerance)


@pytest.mark.parametrize(("slope", "tolerance"), SLOPES)
def test_a_loss_that_looks_up_in_the_table_of_a_module(slope: Any, tolerance: float):
    objective = objective_of(OF_LEAVES["name"], lambda model, ids: F.embedding(ids, model.weight, 0).sin().sum())
    assert_agrees(objective, IDS, slope, tolerance)


@pytest.mark.parametrize(("slope", "tolerance"), FORWARD)
@pytest.mark.parametrize("name", COMPUTED)
def test_the_padding_row_of_a_computed_table_has_no_tangent(name: str, slope: Any, tolerance: float):
    assert_agrees(objective_of(COMPUTED[name]), IDS, slope, tolerance)


@pytest.mark.parametrize("slope", [CentralDifference(1e-5), ForwardDifference(1e-7)], ids=repr)
@pytest.mark.parametrize("name", COMPUTED)
def test_finite_differences_of_a_computed_table_with_a_padding_row_are_refused(name: str, slope: Any):
    objective = objective_of(COMPUTED[name])
    with pytest.raises(Unsupported, match="an embedding has a padding_idx, and its weight is computed"):
        Probing(slope, Rademacher()).estimate(objective, IDS, KEY)


def test_a_low_rank_direction_leaves_the_padding_row_constant():
    objective = objective_of(OF_LEAVES["name"])
    one, other = (
        Probing(slope, LowRank(2), 3).estimate(objective, IDS, KEY).slopes
        for slope in (Jvp(), CentralDifference(1e-5))
    )
    assert one is not None
    assert other is not None
    assert torch.allclose(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("estimator", [forward_gradient(), mezo(eps=1e-4)], ids=repr)
@pytest.mark.parametrize(
    "look",
    [
        lambda words, ids: torch.embedding(words.weight, ids, scale_grad_by_freq=True),
        lambda words, ids: F.embedding_bag(ids, words.weight, scale_grad_by_freq=True)[:, None],
    ],
)
def test_gradients_that_any_embedding_scales_by_frequency_are_refused(look: Look, estimator: Any):
    with pytest.raises(Unsupported, match="scale_grad_by_freq=True"):
        estimator.estimate(objective_of(look), IDS, KEY)
