"""Losses that show what they do only after the first use: at a later step, or once a queue is full."""

from __future__ import annotations

import copy
import types
from collections import deque
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.first_use import is_due
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.mutable_state import Traversal
from gradcost.core.objective import Objective
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.presets import backprop, checkpointed, forward_gradient, mezo, spsa

KEY = Key(5)
ESTIMATORS = [backprop(), checkpointed(), forward_gradient(), spsa(eps=1e-5), mezo(eps=1e-5)]


@pytest.fixture(autouse=True)
def _in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def net() -> nn.Module:
    with seeded_generators(KEY):
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def pair() -> tuple[Tensor, Tensor]:
    with seeded_generators(KEY):
        return torch.randn(6, 8), torch.randn(6, 8)


def squares(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def test_checks_are_repeated_ever_more_rarely():
    assert [uses for uses in range(1, 3000) if is_due(uses)] == [8, 32, 128, 512, 2048]


# ---- micro-batches


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("abs", lambda mean: (mean - 0.01).abs() + 0.01),  # flooding
        ("relu", lambda mean: F.relu(mean - 0.01)),
        ("maximum", lambda mean: torch.maximum(mean, torch.full_like(mean, 0.01))),
        ("clamp", lambda mean: mean.clamp(min=0.01)),
        ("where", lambda mean: torch.where(mean > 0.01, mean, 0 * mean)),
    ],
)
def test_a_kink_in_an_average_is_refused_although_the_batch_is_far_from_it(name: str, of: Any):
    objective = Objective(net(), lambda model, batch: of(squares(model, batch)))
    with pytest.raises(Unsupported, match=f"applies `{name}` to an average over examples"):
        Accumulated(backprop(), 2).estimate(objective, pair(), KEY)


def test_a_kink_in_averages_of_columns_is_refused():
    """Free bits (Kingma et al. 2016): the mean of each latent over the batch is clamped from below."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).square().mean(0).clamp(min=1e-6).sum()

    with pytest.raises(Unsupported, match=r"applies `clamp\w*` to an average"):
        Accumulated(backprop(), 2).estimate(Objective(net(), loss), pair(), KEY)


@pytest.mark.parametrize(
    "loss",
    [
        lambda model, batch: (model(batch[0]) - batch[1]).abs().mean(),
        lambda model, batch: (1 - model(batch[0]) * batch[1]).clamp(min=0).mean(),
        lambda model, batch: F.relu(model(batch[0])).sum(1).amax() * 0 + squares(model, batch),
        lambda model, batch: squares(model, batch) + sum(weight.abs().sum() for weight in model.parameters()),
    ],
    ids=["L1", "hinge", "maximum that counts nothing", "L1 of weights"],
)
def test_a_kink_of_single_examples_or_of_weights_is_served(loss: Any):
    objective = Objective(net(), loss)
    if "amax" in loss.__code__.co_names:
        with pytest.raises(Unsupported, match="applies `amax` to an average"):
            Accumulated(backprop(), 2).estimate(objective, pair(), KEY)
        return
    parts = Accumulated(backprop(), 2).estimate(objective, pair(), KEY)
    whole = backprop().estimate(objective, pair(), KEY)
    for (_, one), (_, other) in zip(parts.gradient.leaves(), whole.gradient.leaves(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_regime_that_only_python_sees_is_noticed_at_the_eighth_use():
    """The loss compares a number, which no graph shows: the weights are tested again."""
    level = [1e9]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        mean = squares(model, batch)
        return mean if float(mean) < level[0] else mean.square()

    objective, estimator = Objective(net(), loss), Accumulated(backprop(), 2)
    for number in range(7):
        estimator.estimate(objective, pair(), KEY.fold("step", number))
    level[0] = 0.0
    with pytest.raises(Unsupported, match="not a weighted mean"):
        estimator.estimate(objective, pair(), KEY)


# ---- state and writes that begin later


class Memory:
    """A cross-batch memory: the loss reads a queue of embeddings once it is full."""

    def __init__(self, size: int) -> None:
        self.queue: deque[Tensor] = deque(maxlen=size)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        embedding = F.normalize(model(batch[0]), dim=-1)
        loss = (embedding - batch[1]).square().mean()
        if len(self.queue) == self.queue.maxlen:
            loss = loss + (embedding @ torch.cat(list(self.queue)).T).logsumexp(-1).mean()
        self.queue.append(embedding.detach().clone())
        return loss


@pytest.mark.parametrize("size", [3, 9])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_checks_do_not_fill_a_queue_that_the_loss_reads_when_it_is_full(size: int, estimator: Any):
    model, loss = net(), Memory(size)
    true = torch.autograd.grad(Memory(size)(model, pair()), list(model.parameters()))
    objective = Objective(model, loss)
    estimate = estimator.estimate(objective, pair(), KEY)
    assert len(loss.queue) <= 1
    if isinstance(estimate.gradient, Seeded):
        one = Seeded(objective, estimate.gradient.directions, estimate.gradient.seeds[:1], (1.0,))
        slope = sum(float((z * g).sum()) for (_, z), g in zip(one.leaves(), true, strict=True))
        assert float(estimate.slopes[0]) == pytest.approx(slope, rel=1e-5)
    else:
        for (_, found), expected in zip(estimate.gradient.leaves(), true, strict=True):
            torch.testing.assert_close(found, expected)


class Convex(nn.Module):
    """An input-convex network: it clamps a weight in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        nn.init.uniform_(self.second.weight, 0.2, 0.4)

    def forward(self, x: Tensor) -> Tensor:
        self.second.weight.data.clamp_(min=0)
        return self.second(F.softplus(self.first(x)))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_a_clamp_of_a_weight_that_first_acts_after_a_step_is_refused_with_the_name(estimator: Any):
    model = Convex()
    objective = Objective(model, squares)
    estimator.estimate(objective, pair(), KEY)
    with torch.no_grad():
        model.second.weight.sub_(0.5)
    with pytest.raises(BadInput, match=r"writes into the parameter `second\.weight`"):
        estimator.estimate(objective, pair(), KEY)


def test_a_buffer_that_changes_from_a_later_step_on_is_noticed():
    """The loss reads a counter of its own only after a warm-up."""

    class Counting:
        def __init__(self) -> None:
            self.calls, self.warm = torch.zeros(4), False

        def __call__(self, model: nn.Module, batch: Any) -> Tensor:
            if not self.warm:
                return squares(model, batch)
            self.calls += 1
            return squares(model, batch) * self.calls.mean()

    loss = Counting()
    objective = Objective(net(), loss)
    for number in range(7):
        mezo(eps=1e-5).estimate(objective, pair(), KEY.fold("step", number))
    loss.warm = True
    one, other = (mezo(eps=1e-5).estimate(objective, pair(), KEY).slopes for _ in range(2))
    assert float(loss.calls.mean()) == 0
    assert one is not None
    assert other is not None
    assert torch.equal(one, other)


# ---- copies


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_a_teacher_that_is_copied_inside_an_evaluation_keeps_no_hook(estimator: Any):
    class Distilling:
        teacher: nn.Module | None = None

        def __call__(self, model: nn.Module, batch: Any) -> Tensor:
            if self.teacher is None:
                self.teacher = copy.deepcopy(model).requires_grad_(False)
            with torch.no_grad():
                target = self.teacher(0.9 * batch[0])
            return (model(batch[0]) - target).square().mean()

    loss = Distilling()
    estimator.estimate(Objective(net(), loss), pair(), KEY)
    assert loss.teacher is not None
    assert not [
        hook for module in loss.teacher.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)
    ]


def test_a_traversal_ends_although_python_modules_import_each_other():
    one, other = types.ModuleType("one"), types.ModuleType("other")
    one.__file__ = other.__file__ = "/home/user/pkg.py"
    exec("def loss():\n    return other.one.other.table", vars(one))
    vars(one)["other"], vars(other)["one"] = other, one
    vars(other)["table"] = table = torch.zeros(2)
    traversal = Traversal(follow_functions=True)
    traversal.visit("loss", vars(one)["loss"])
    assert any(value is table for _, value in traversal.objects)
