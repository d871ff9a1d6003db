"""Losses that show what they do only after the first use: at a later step, or once a queue is full."""

from __future__ import annotations

import copy
import types
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradcost
from gradcost.checkpointing.policies import Segments
from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.evaluation.first_use import is_due
from gradcost.core.evaluation.mutable_state import Traversal
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.presets import backprop, checkpointed, forward_gradient, mezo, spsa
from gradcost.estimators.reverse import Reverse

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


# ---- functions that only training, a later step or a later pass shows


class Chain(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block() for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


def chain(block: type[nn.Module] = Layer) -> nn.Module:
    with seeded_generators(KEY):
        return Chain(block)


def assert_exact(estimator: Any, objective: Objective, batch: Any, true: Any):
    estimate = estimator.estimate(objective, batch, KEY)
    for (_, found), expected in zip(estimate.gradient.leaves(), true, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_loss_that_compares_examples_in_training_only_has_no_micro_batches():
    """Mixture routing with a capacity: eval mode has another one. The weights are tested on what is trained."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        out = model(batch[0])
        return (out - out.mean(0)).square().mean() if model.training else out.square().mean()

    with pytest.raises(Unsupported, match="not a weighted mean"):
        Accumulated(backprop(), 2).estimate(Objective(net(), loss), pair(), KEY)


class Biased(nn.Module):
    """LeViT's attention biases: kept in a dictionary in eval mode, which `train` empties."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bias, self.kept = nn.Linear(8, 8), nn.Parameter(torch.ones(8)), {}

    def forward(self, x: Tensor) -> Tensor:
        bias = 2 * self.bias if self.training else self.kept.setdefault("bias", 2 * self.bias)
        return self.linear(x) + bias


def test_the_tests_of_micro_batches_leave_no_cache_of_eval_mode():
    model = nn.Sequential(Biased(), nn.Dropout(0.5))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return squares(model, batch) * (1 + 0.1 * torch.rand(()) if model.training else 1)

    Accumulated(backprop(), 2).estimate(Objective(model, loss), pair(), KEY)
    assert model[0].kept == {}


class Target(nn.Module):
    """A target network that the forward moves at every third call."""

    def __init__(self, write: Any) -> None:
        super().__init__()
        self.net, self.target, self.calls, self.write = (
            nn.Linear(8, 8),
            nn.Linear(8, 8).requires_grad_(False),
            0,
            write,
        )

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls % 3 == 0:
            with torch.no_grad():
                self.write(self)
        return self.net(x) - self.target(x)


@pytest.mark.parametrize(
    "write",
    [
        lambda model: model.target.weight.lerp_(model.net.weight, 0.1),
        lambda model: setattr(model.target.weight, "data", 0.9 * model.net.weight.detach()),
        lambda model: model.target.load_state_dict(model.net.state_dict()),
    ],
    ids=["lerp", "data", "load_state_dict"],
)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_a_forward_that_writes_frozen_weights_at_a_later_step_is_refused_with_the_name(write: Any, estimator: Any):
    model = Target(write)
    objective = Objective(model, squares)
    estimator.estimate(objective, pair(), KEY)
    model.calls = 2
    with pytest.raises(BadInput, match=r"writes into the parameter `target\.weight`"):
        estimator.estimate(objective, pair(), KEY)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_a_loss_that_reads_the_gradient_of_the_last_step_is_refused_with_the_name(estimator: Any):
    def loss(model: nn.Module, batch: Any) -> Tensor:
        penalty = sum((p * p.grad).sum() for p in model.parameters() if p.grad is not None)
        return squares(model, batch) + penalty

    with pytest.raises(Unsupported, match=r"reads `\.grad` of `0\.weight`"):
        estimator.estimate(Objective(net(), loss), pair(), KEY)


@pytest.mark.parametrize("steered_first", [False, True])
@pytest.mark.parametrize("estimator", [checkpointed(), Reverse(Segments(2))], ids=repr)
def test_hooks_that_a_forward_pass_registers_for_itself_run_again(estimator: Any, steered_first: bool):
    """Steering vectors and adapters for mixed batches: the hooks are gone before the backward pass."""

    def loss(model: Any, batch: Any) -> Tensor:
        handles = [
            block.linear.register_forward_hook(lambda module, args, out: out * 3 + 1)
            for block in (model.blocks if batch[2] else ())
        ]
        out = model(batch[0])
        for handle in handles:
            handle.remove()
        return (out - batch[1]).square().mean()

    model, batch = chain(), (*pair(), True)
    true = torch.autograd.grad(loss(model, batch), list(model.parameters()))
    objective = Objective(model, loss)
    estimator.estimate(objective, (*pair(), steered_first), KEY)
    assert_exact(estimator, objective, batch, true)


RATES, DRAWS = [0.0], np.random.default_rng(0)


class Dropped(Layer):
    def forward(self, x: Tensor) -> Tensor:
        keep = 1.0 if RATES[0] == 0 else float(DRAWS.random() > RATES[0])
        return x + keep * torch.tanh(self.linear(x))


@pytest.mark.parametrize("first", [0.0, 0.5])
@pytest.mark.parametrize("estimator", [checkpointed(), Reverse(Segments(2))], ids=repr)
def test_a_generator_of_a_python_module_replays_when_it_is_first_drawn_from_later(estimator: Any, first: float):
    model = chain(Dropped)
    objective = Objective(model, squares)
    RATES[0] = first
    estimator.estimate(objective, pair(), KEY)
    RATES[0] = 0.5
    expected = backprop().estimate(Objective(model, squares), pair(), KEY)
    assert_exact(estimator, objective, pair(), [tensor for _, tensor in expected.gradient.leaves()])
    state = DRAWS.bit_generator.state
    gradcost.forecast(backprop(), Objective(model, squares), pair())
    assert state == DRAWS.bit_generator.state


def test_a_batch_that_cannot_be_cut_is_refused_in_a_sentence():
    """A graph with as many edges as nodes: its edges have no examples."""
    edges = torch.stack([torch.arange(6), (torch.arange(6) + 1) % 6])

    def loss(model: nn.Module, batch: Any) -> Tensor:
        out = model(batch["x"])
        return (out[batch["edges"][0]] - out[batch["edges"][1]] - batch["y"]).square().mean()

    x, y = pair()
    with pytest.raises(Unsupported, match=r"cannot be evaluated on some of the examples of this batch \(IndexError"):
        Accumulated(backprop(), 2).estimate(Objective(net(), loss), {"x": x, "y": y, "edges": edges}, KEY)


class AddGradient(torch.autograd.Function):
    """DeepSeek's auxiliary loss: it has a gradient and no value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, auxiliary: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], torch.ones((), dtype=gradients[0].dtype)


def test_a_gradient_without_a_value_is_noted():
    def loss(model: nn.Module, batch: Any) -> Tensor:
        out = model(batch[0])
        return (AddGradient.apply(out, out.square().mean()) - batch[1]).square().mean()

    with pytest.warns(Note, match="the backward of `AddGradient` runs in backprop only"):
        mezo(eps=1e-5).estimate(Objective(net(), loss), pair(), KEY)
    with pytest.warns(Note, match="`AddGradient` adds a gradient that the value does not show"):
        Accumulated(backprop(), 2).estimate(Objective(net(), loss), pair(), KEY)
