"""A parameter that the loss of a batch does not use: exact gradients leave it alone, as torch does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradcost
from gradcost import Accumulated, ByLength, Key, Mixed, Objective, Reverse, backprop, checkpointed, mezo
from gradcost.checkpointing.policies import Schedule
from gradcost.core.bits import raw_bytes
from gradcost.core.isolation import seeded_generators
from gradcost.estimators import Estimator
from gradcost.instruments.memory import MemoryTracker
from gradcost.training import SGD, Adam, AdamW, Optimizer, TrainState, checkpoint
from gradcost.training.rounding import Master

KEY = Key(21)
Batch = tuple[Tensor, Tensor]
OWN: dict[str, Optimizer] = {
    "SGD": SGD(0.1, momentum=0.9, weight_decay=0.01),
    "Adam": Adam(0.01),
    "AdamW": AdamW(0.01, weight_decay=0.1),
}
TORCH: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.1, 0.9, weight_decay=0.01),
    "Adam": lambda parameters: torch.optim.Adam(parameters, 0.01),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 0.01, weight_decay=0.1),
}
ESTIMATORS: list[Estimator] = [backprop(), checkpointed(), Reverse(Schedule((((1,), (1,)),)))]


class Pooled(nn.Module):
    """A large layer (a group of its own in `Leafwise`) and a small one that no batch uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.pooler, self.scale = nn.Linear(150, 150), nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Routed(nn.Module):
    """A block of three experts; each example goes to one of them. A batch of two examples leaves one out, or two."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        chosen = (100 * x[:, 0].detach().abs()).long() % 3
        for number, expert in enumerate(self.experts):
            rows = chosen == number
            if bool(rows.any()):
                x = x.index_put((rows,), x[rows] + torch.tanh(expert(x[rows])))
        return x


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Routed(), Routed()])
        self.head = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def made(kind: Callable[[], nn.Module]) -> Objective:
    with seeded_generators(KEY):
        return Objective(kind(), loss)


def batches() -> list[Batch]:
    with seeded_generators(KEY.fold("data")):
        return [(torch.randn(2, 5), torch.randint(5, (2,))) for _ in range(5)]


def bits(model: nn.Module) -> list[bytes]:
    return [bytes(raw_bytes(parameter)) for parameter in model.parameters()]


def plain(kind: Callable[[], nn.Module], optimizer: str, parts: int = 1, steps: int = 10) -> tuple[list[bytes], int]:
    """Return the weights of a plain loop, and how often a parameter had no gradient."""
    model, absent = made(kind).model, 0
    updates = TORCH[optimizer](model.parameters())
    for step in range(steps):
        updates.zero_grad()
        x, y = batches()[step % 5]
        for part in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (loss(model, part) / parts).backward()
        absent += sum(parameter.grad is None for parameter in model.parameters())
        updates.step()
    return bits(model), absent


@pytest.mark.parametrize("optimizer", OWN)
@pytest.mark.parametrize("kind", [Pooled, Mixture])
def test_training_has_the_bits_of_a_plain_loop(kind: Callable[[], nn.Module], optimizer: str):
    expected, absent = plain(kind, optimizer)
    assert absent >= 10
    for estimator in ESTIMATORS:
        objective = made(kind)
        assert len(list(gradcost.train(objective, batches(), estimator, OWN[optimizer], KEY, 10))) == 10
        assert bits(objective.model) == expected, estimator


@pytest.mark.parametrize("optimizer", OWN)
@pytest.mark.parametrize("kind", [Pooled, Mixture])
def test_a_parameter_has_a_gradient_if_one_micro_batch_uses_it(kind: Callable[[], nn.Module], optimizer: str):
    expected, absent = plain(kind, optimizer, parts=2)
    assert absent >= 10
    objective = made(kind)
    for _ in gradcost.train(objective, batches(), Accumulated(backprop(), 2), OWN[optimizer], KEY, 10):
        pass
    assert bits(objective.model) == expected


@pytest.mark.parametrize("optimizer", OWN)
@pytest.mark.parametrize("kind", [Pooled, Mixture])
def test_a_training_resumes_with_the_same_bits(kind: Callable[[], nn.Module], optimizer: str, tmp_path: Path):
    expected, _ = plain(kind, optimizer)
    *_, last = gradcost.train(made(kind), batches(), backprop(), OWN[optimizer], KEY, 4)
    checkpoint.write(tmp_path / "file", last.train_state)
    objective = made(kind)
    for _ in gradcost.train(objective, batches(), backprop(), OWN[optimizer], KEY, 10, tmp_path / "file"):
        pass
    assert bits(objective.model) == expected


def test_an_unused_parameter_gets_no_state_of_the_optimizer():
    objective = made(Pooled)
    for optimizer in (AdamW(0.1), Master(AdamW(0.1))):
        *_, last = gradcost.train(objective, batches(), backprop(), optimizer, KEY, 3)
        held = [tensor.shape for tensor in last.train_state.held_tensors()]
        assert torch.Size([5, 5]) in held
        assert torch.Size([150, 150]) not in held


@pytest.mark.parametrize("estimator", [backprop(), checkpointed(), Accumulated(backprop(), 2)], ids=repr)
def test_write_leaves_none_and_leaves_yields_zeros(estimator: Estimator):
    objective, batch = made(Pooled), batches()[0]
    model: Any = objective.model
    unused = {"pooler.weight", "pooler.bias", "scale"}
    model.scale.grad = torch.ones(5)
    gradient = estimator.estimate(objective, batch, KEY).gradient
    assert torch.equal(model.scale.grad, torch.ones(5))
    assert gradient.unused == unused
    assert {name for name, tensor in gradient.leaves() if not bool(tensor.any())} == unused
    assert gradient.nbytes == 4 * 60
    gradient.write(accumulate=True)
    assert torch.equal(model.scale.grad, torch.ones(5))
    gradient.write()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == unused


def test_streaming_skips_it_or_passes_zeros_on():
    objective, found = made(Pooled), dict[str, Tensor]()
    streamed = backprop().stream(objective, batches()[0], KEY, found.__setitem__).gradient
    assert found.keys() == {leaf.name for leaf in objective.leaves}
    assert not bool(found["pooler.weight"].any())
    assert streamed.message_nbytes == 4 * 60
    assert all(leaf.parameter.grad is None for leaf in objective.leaves)


@pytest.mark.parametrize("optimizer", OWN)
@pytest.mark.parametrize("kind", [Pooled, Mixture])
def test_surrogate_losses_have_the_bits_of_a_plain_loop(kind: Callable[[], nn.Module], optimizer: str):
    expected, _ = plain(kind, optimizer, parts=2)
    objective = made(kind)
    updates = TORCH[optimizer](objective.model.parameters())
    for step in range(10):
        updates.zero_grad()
        x, y = batches()[step % 5]
        for part in zip(x.chunk(2), y.chunk(2), strict=True):
            (gradcost.surrogate_loss(backprop(), objective, part, KEY.fold("step", step)) / 2).backward()
        updates.step()
    assert bits(objective.model) == expected


def test_wrappers_of_an_exact_gradient_leave_it_alone_where_all_parts_do():
    def masked(model: Any, batch: Any) -> Tensor:
        return model(batch["x"]).square().mean()

    with seeded_generators(KEY):
        model: Any = Pooled()
        batch = {"x": torch.randn(2, 5), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}
    objective = Objective(model, masked)
    mixed = Mixed("[lp]*", backprop(), mezo())
    both = ByLength(backprop(), backprop(), 2)
    one = ByLength(backprop(), mezo(), 2)
    unused = {"pooler.weight", "pooler.bias", "scale"}
    for estimator, expected in ((mixed, unused - {"scale"}), (both, unused), (one, set[str]())):
        assert estimator.estimate(objective, batch, KEY).gradient.unused == expected
        before = {name: bytes(raw_bytes(parameter)) for name, parameter in model.named_parameters()}
        TrainState(objective, estimator, AdamW(0.01, weight_decay=0.1)).step(batch, KEY)
        same = {name for name, parameter in model.named_parameters() if raw_bytes(parameter) == before[name]}
        assert same == expected


@pytest.mark.parametrize("optimizer", [None, SGD(0.1), *OWN.values(), Master(AdamW(0.1))], ids=repr)
@pytest.mark.parametrize("estimator", [*ESTIMATORS, Accumulated(backprop(), 2), mezo()], ids=repr)
def test_forecasts_are_exact(estimator: Estimator, optimizer: Optimizer | None):
    objective, batch = made(Pooled), batches()[0]
    predicted = gradcost.forecast(estimator, objective, batch, optimizer)
    train_state = TrainState(objective, estimator, optimizer)
    train_state.step(batch, KEY)
    tracker = MemoryTracker(objective.model)
    tracker.register("inputs", batch)
    tracker.register("optimizer state", train_state.held_tensors())
    with tracker.followed():
        estimate = train_state.step(batch, KEY)
    assert predicted.peak == tracker.memory().peak
    assert predicted.breakdown == tracker.memory().breakdown
    assert predicted.kept == sum(tensor.nbytes for tensor in train_state.held_tensors())
    assert predicted.message == estimate.gradient.message_nbytes


def test_a_forecast_that_holds_all_gradients_has_no_state_for_it_either():
    objective, batch = made(Pooled), batches()[0]
    with_pooler = gradcost.forecast(backprop(), objective, batch, AdamW(0.1), held=True)
    del objective.model.pooler  # type: ignore[attr-defined]
    without = gradcost.forecast(backprop(), Objective(objective.model, loss), batch, AdamW(0.1), held=True)
    assert with_pooler.peak - without.peak == 4 * (150 * 150 + 150)
