"""Linear layers and embeddings in forward mode: tangents of weights in blocks, with the slopes of whole ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcost import Key, Objective, forecast, forward_gradient
from gradcost.core.isolation import seeded_generators
from gradcost.directions import Gaussian, Rademacher, Sphere
from gradcost.estimators.probing import Probing
from gradcost.instruments.memory import MemoryTracker
from gradcost.slopes.slope import Jvp
from gradcost.slopes.tangent_products import TangentProducts
from gradcost.training import SGD, TrainState

KEY = Key(11)


class Language(nn.Module):
    """A large embedding, a linear layer of several blocks, and a head that is tied to a part of the model."""

    def __init__(self, bias: bool, tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, 32)
        self.linear = nn.Linear(32, 9_001, bias=bias)
        self.head = nn.Linear(9_001, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.linear(self.embedding(tokens))))


def slopes(estimator: Any, objective: Objective, batch: Tensor) -> tuple[Tensor, Tensor]:
    estimate = estimator.estimate(objective, batch, KEY)
    return estimate.loss, estimate.slopes


def made(bias: bool = True, dtype: torch.dtype = torch.float32, tokens: int = 20_000) -> tuple[Objective, Tensor]:
    with seeded_generators(KEY):
        model, batch = Language(bias, tokens).to(dtype), torch.randint(tokens, (2, 5))
    return Objective(model, lambda model, batch: model(batch).square().mean()), batch


@contextmanager
def whole_tangents(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, forward mode draws the tangent of each weight as a whole."""
    with patch.context() as inside:
        inside.setattr(TangentProducts, "rules", lambda self: {})
        yield


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("directions", [Gaussian(), Rademacher(), Sphere()], ids=repr)
def test_slopes_are_those_of_whole_tangents(
    directions: Any, together: int, dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
):
    objective, batch = made(bias, dtype)
    estimator = Probing(Jvp(together), directions, 3)
    loss, found = slopes(estimator, objective, batch)
    with whole_tangents(monkeypatch):
        same_loss, expected = slopes(estimator, objective, batch)
    assert torch.equal(loss, same_loss)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("together", [1, 3])
def test_one_block_and_an_embedding_have_the_same_bits(together: int, monkeypatch: pytest.MonkeyPatch):
    with seeded_generators(KEY):
        model = nn.Sequential(nn.Embedding(60_000, 8), nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 2))
        batch = torch.randint(60_000, (3, 2))
    objective = Objective(model, lambda model, batch: model(batch).square().mean())
    estimator = Probing(Jvp(together), Gaussian(), 3)
    _, found = slopes(estimator, objective, batch)
    with whole_tangents(monkeypatch):
        _, expected = slopes(estimator, objective, batch)
    assert torch.equal(found, expected)


def peaks(estimator: Any, objective: Objective, batch: Any) -> tuple[int, int]:
    """Return the forecast and the tracked peak beyond weights and batch of a step."""
    predicted = forecast(estimator, objective, batch, SGD(0.1)).beyond
    state = TrainState(objective, estimator, SGD(0.1))
    state.step(batch, KEY)
    tracker = MemoryTracker(objective.model)
    tracker.register("inputs", [batch])
    with tracker.followed():
        state.step(batch, KEY)
    return predicted, tracker.memory().beyond


@pytest.mark.parametrize("probes", [1, 3])
def test_memory_is_below_a_weight_and_as_forecast(probes: int, monkeypatch: pytest.MonkeyPatch):
    objective, batch = made()
    estimator = forward_gradient(probes)
    predicted, tracked = peaks(estimator, objective, batch)
    assert predicted == tracked
    embedding = 20_000 * 32 * 4
    with whole_tangents(monkeypatch):
        before, _ = peaks(estimator, objective, batch)
    assert before > probes * embedding
    assert predicted < 2 * embedding  # the update draws an embedding's gradient in pieces, the tangent has none


@pytest.mark.parametrize("kind", ["tied", "padding", "own forward", "functional", "autocast"])
def test_other_reads_of_a_weight_take_whole_tangents(kind: str, monkeypatch: pytest.MonkeyPatch):
    """A head tied to the embedding, a padding row, a subclass, a weight read directly, and autocast."""
    with seeded_generators(KEY):
        embedding = nn.Embedding(20_000, 16, padding_idx=1 if kind == "padding" else None)
        linear = nn.Linear(16, 20_000, bias=False)
        batch = torch.randint(20_000, (2, 2))
    if kind == "tied":
        linear.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "linear": linear})
    if kind == "own forward":
        linear.forward = lambda x: F.linear(x, linear.weight.square())  # type: ignore[method-assign]

    def loss(model: Any, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            hidden = model["embedding"](batch)
            out = F.linear(hidden, model["linear"].weight) if kind == "functional" else model["linear"](hidden)
        return out.float().square().mean()

    objective = Objective(model, loss)
    estimator = Probing(Jvp(), Gaussian(), 1)
    _, found = slopes(estimator, objective, batch)
    with whole_tangents(monkeypatch):
        _, expected = slopes(estimator, objective, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
