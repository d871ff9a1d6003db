"""Backward passes in models that checkpoint, step, reverse or drop something by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint

import gradcost
from gradcost.core.errors import Unsupported
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.gradient import Dense
from gradcost.estimators.mixed import Mixed
from gradcost.estimators.presets import backprop, checkpointed, mezo
from snapshot import differences, snapshot

KEY = Key(31)
X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin()


def squared(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square().mean()


def torch_gradient(model: nn.Module, loss: Any, batch: Any) -> dict[str, Tensor]:
    """The gradient by torch alone. `.grad` is None afterwards."""
    loss(model, batch).backward()
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()
        parameter.grad = None
    return found


def assert_is_torchs(estimator: Estimator, model: nn.Module, loss: Any, batch: Any, tolerance: float = 0.0):
    expected, before = torch_gradient(model, loss, batch), snapshot(model)
    objective = Objective(model, loss)
    assert estimator.objection(objective, batch) is None
    found = dict(estimator.estimate(objective, batch, KEY).gradient.leaves())
    streamed: dict[str, Tensor] = {}
    estimator.stream(objective, batch, KEY, streamed.__setitem__)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= tolerance
        assert (streamed[name].to_dense() - gradient).abs().max() <= tolerance
    assert differences(before, snapshot(model)) == []


class Stack(nn.Module):
    """Blocks that the model checkpoints by itself, by the reentrant way."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        block = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([block if shared else nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(lambda x, block=block: torch.tanh(block(x)), x, use_reentrant=True)
        return x


@pytest.mark.parametrize("shared", [False, True], ids=["", "one block called thrice"])
@pytest.mark.parametrize("estimator", [backprop(), checkpointed(), gradcost.Accumulated(backprop(), 3)], ids=repr)
def test_reentrant_checkpointing_by_the_model_is_served(estimator: Estimator, shared: bool):
    torch.manual_seed(0)
    if shared and estimator == checkpointed():
        pytest.skip("one module is no chain of blocks")
    assert_is_torchs(estimator, Stack(shared).double(), squared, X, 1e-15)


def test_reentrant_checkpointing_with_a_frozen_start_is_refused_and_no_zero_is_returned():
    """Torch warns and gives no gradient to a checkpointed block whose inputs need none."""
    model = Stack().double()
    objective = Objective(model, squared)
    before = snapshot(model)
    with pytest.raises(Unsupported, match="use_reentrant=True, which gives no gradient"):
        Mixed("blocks.2.*", backprop(), mezo()).estimate(objective, X, KEY)
    assert differences(before, snapshot(model)) == []
    assert torch_checkpoint.check_backward_validity.__module__ == "torch.utils.checkpoint"


class Reversible(torch.autograd.Function):
    """x + f(x), whose backward runs f again and a backward pass inside, as reversible networks do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: nn.Module) -> Tensor:  # type: ignore[override]
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return x + block(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = x + ctx.block(x)
        torch.autograd.backward(out, gradient)
        return x.grad, None


class ReversibleNet(nn.Module):
    """first, last: the same layer if tied. inside: whether that layer is also a reversible block."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last = self.block if tied else nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Reversible.apply(self.first(x), self.block))  # type: ignore[arg-type]


def test_a_function_that_runs_a_backward_pass_of_its_own_is_served():
    torch.manual_seed(0)
    assert_is_torchs(backprop(), ReversibleNet().double(), squared, X)


def test_a_parameter_whose_gradient_comes_in_two_passes_is_refused_by_name():
    model = ReversibleNet(tied=True).double()
    before = snapshot(model)
    with pytest.raises(Unsupported, match=r"`block\.(weight|bias)`"):
        backprop().estimate(Objective(model, squared), X, KEY)
    assert differences(before, snapshot(model)) == []


class Doubling(torch.autograd.Function):
    """2 x, an ordinary function of one's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * gradient


@pytest.mark.parametrize("function", [Doubling.apply, lambda x: 2 * x], ids=["own function", "torch"])
def test_tensors_outside_of_the_model_keep_their_grad(function: Any):
    outside = nn.Parameter(torch.ones(4, dtype=torch.float64))
    batch = X.clone().requires_grad_()
    outside.grad, batch.grad = torch.full_like(outside, 3), torch.full_like(batch, 5)
    kept = outside.grad, batch.grad
    model = nn.Linear(4, 4).double()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (function(model(batch * outside)) - 1).square().mean()

    backprop().estimate(Objective(model, loss), batch, KEY)
    assert outside.grad is kept[0]
    assert batch.grad is kept[1]
    assert torch.equal(outside.grad, torch.full_like(outside, 3))
    assert torch.equal(batch.grad, torch.full_like(batch, 5))


# ---- hooks of the user


def test_an_optimizer_in_the_backward_pass_is_refused_and_moves_nothing():
    model = nn.Linear(4, 4).double()
    optimizers = {parameter: torch.optim.SGD([parameter], 0.1) for parameter in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()  # type: ignore[index]
        optimizers[parameter].zero_grad()  # type: ignore[index]

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    objective, before = Objective(model, squared), snapshot(model)
    assert "`weight` has a post-accumulate-grad hook" in str(backprop().objection(objective, X))
    with pytest.raises(Unsupported, match="`weight` has a post-accumulate-grad hook"):
        backprop().estimate(objective, X, KEY)
    assert differences(before, snapshot(model)) == []
    mezo().estimate(objective, X, KEY)


def test_an_optimizer_hooked_to_the_graph_finds_no_gradient_to_step_along():
    """Such a hook, of older optimizers in the backward pass, runs after the gradient was passed on."""
    model = nn.Linear(4, 4).double()
    expected = torch_gradient(model, squared, X)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    node: Any = model.bias.expand_as(model.bias).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    node.register_hook(lambda *gradients: optimizer.step())
    before = snapshot(model)
    gradient = backprop().estimate(Objective(model, squared), X, KEY).gradient
    assert all(torch.equal(leaf, expected[name]) for name, leaf in gradient.leaves())
    assert differences(before, snapshot(model)) == []


def test_a_gradient_that_a_hook_of_the_forward_pass_drops_is_refused_by_name():
    model = nn.Linear(4, 4).double()

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            model.bias.register_post_accumulate_grad_hook(drop)  # type: ignore[union-attr, operator]
        return squared(model, batch)

    with pytest.raises(Unsupported, match="the gradient of `bias` was removed before"):
        backprop().estimate(Objective(model, loss), X, KEY)


def test_a_hook_that_masks_a_gradient_counts_as_in_torch():
    model = nn.Linear(4, 4).double()
    model.weight.register_hook(lambda gradient: gradient * 0.5)
    assert_is_torchs(backprop(), model, squared, X)


# ---- sparse gradients


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.words(ids)).mean(1)


IDS = torch.tensor([[1, 2], [3, 3], [5, 1]]), torch.tensor([1, 2, 3])


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def reader() -> Objective:
    torch.manual_seed(0)
    return Objective(Reader().double(), cross_entropy, data=lambda: [IDS])


def test_a_sparse_gradient_is_read_dense_and_written_sparse():
    objective = reader()
    expected = torch_gradient(objective.model, cross_entropy, IDS)
    gradient = backprop().estimate(objective, IDS, KEY).gradient
    assert all(torch.equal(leaf, expected[name]) for name, leaf in gradient.leaves())
    assert gradient.nbytes > 0
    gradient.write()
    assert objective.model.words.weight.grad.is_sparse  # type: ignore[union-attr]
    torch.optim.SparseAdam([objective.model.words.weight]).step()  # type: ignore[union-attr, list-item]


@pytest.mark.parametrize(
    "estimator", [gradcost.VarianceReduced(backprop(), 5), gradcost.Accumulated(backprop(), 3)], ids=repr
)
def test_wrappers_serve_a_sparse_embedding(estimator: Estimator):
    objective = reader()
    expected = torch_gradient(objective.model, cross_entropy, IDS)
    for name, leaf in estimator.estimate(objective, IDS, KEY).gradient.leaves():
        assert (leaf - expected[name]).abs().max() <= 1e-15


@pytest.mark.parametrize(
    "optimizer", [gradcost.SGD(0.1), gradcost.SGD(0.1, momentum=0.9, weight_decay=0.1), gradcost.AdamW(0.1)], ids=repr
)
def test_every_optimizer_trains_a_sparse_embedding_as_a_dense_one(optimizer: Any):
    class Job:
        def objective(self, key: Key) -> Objective:
            self.made = reader()
            return self.made

        def batch_at(self, key: Key, step: int) -> Any:
            return IDS

    job = Job()
    list(gradcost.train(job, backprop(), optimizer, steps=3))
    dense = reader()
    dense.model.words.sparse = False  # type: ignore[union-attr]
    steps = optimizer.build(dense.leaves)
    for _ in range(3):
        steps.zero_grad()
        cross_entropy(dense.model, IDS).backward()
        steps.step()
    for moved, expected in zip(job.made.model.parameters(), dense.model.parameters(), strict=True):
        assert (moved - expected).abs().max() <= 1e-14


# ---- what a gradient hands out


@pytest.mark.parametrize("estimator", [backprop(), mezo()], ids=repr)
def test_what_happens_to_a_written_grad_does_not_change_the_estimate(estimator: Estimator):
    model = nn.Linear(4, 4).double()
    gradient = estimator.estimate(Objective(model, squared), X, KEY).gradient
    before = gradient.norm()
    gradient.write()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    model.weight.grad.data.zero_()  # type: ignore[union-attr]
    assert gradient.norm() == before
    if isinstance(gradient, Dense):
        assert all(parameter.grad is not gradient.tensors[name] for name, parameter in model.named_parameters())
