"""A forecast equals the measurement: losses, recurrent layers, sparse gradients, mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradcost
from gradcost import SGD, Accumulated, AdamW, Objective, Reverse, backprop, checkpointed, forecast, mezo
from gradcost.core.errors import Unsupported
from gradcost.instruments import Allocator, Bytes, Operations, TrainingStep, allocator, measure
from gradcost.planning import Within

MEAN = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()  # noqa: E731
CLASSES = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731


def pair(width: int = 8) -> Any:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, width, generator=generator), torch.randn(6, width, generator=generator)


def classes(words: int = 10) -> Any:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(words, (5, 4), generator=generator), torch.randint(3, (5,), generator=generator)


def assert_forecast_is_measured(
    estimator: Any, make: Callable[[], nn.Module], loss: Any, batch: Any, optimizer: Any
) -> None:
    torch.manual_seed(0)
    objective = Objective(make(), loss)
    predicted = forecast(estimator, objective, batch, optimizer)
    measured = measure(TrainingStep(objective, batch, estimator, optimizer), Bytes(), Operations())
    assert measured.memory is not None
    assert measured.counts is not None
    assert (predicted.peak, predicted.breakdown) == (measured.memory.peak, measured.memory.breakdown)
    assert (predicted.flops, predicted.matmuls) == (measured.counts.flops, measured.counts.matmuls)
    assert not measured.counts.uncounted


# ---- storages that torch's fake kernels have otherwise


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "mse, sum": lambda x, y: F.mse_loss(x, y, reduction="sum"),
    "mse, broadcast": lambda x, y: F.mse_loss(x[:, None], y[None].expand(6, 6, 8)),
    "smooth l1": F.smooth_l1_loss,
    "bce": lambda x, y: F.binary_cross_entropy(x.sigmoid(), y.sigmoid()),
    "soft margin": lambda x, y: F.soft_margin_loss(x, y.sign()),
    "huber": F.huber_loss,
    "none": lambda x, y: F.mse_loss(x, y, reduction="none").mean(),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("estimator", [backprop(), mezo()], ids=["backprop", "mezo"])
def test_a_loss_whose_kernel_keeps_the_storage_of_all_errors(name: str, estimator: Any):
    function = LOSSES[name]
    assert_forecast_is_measured(
        estimator, lambda: nn.Linear(8, 8), lambda m, b: function(m(b[0]), b[1]), pair(), SGD(0.1)
    )


class Recurrent(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.layer = nn.LSTM(8, 20, **kwargs)
        self.out = nn.Linear(20 * (1 + self.layer.bidirectional), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0].mean(0 if not self.layer.batch_first else 1))


@pytest.mark.parametrize("steps", [5, 200])
@pytest.mark.parametrize("estimator", [backprop(), mezo()], ids=["backprop", "mezo"])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "bias": False}], ids=str
)
def test_an_lstm_saves_a_workspace(steps: int, estimator: Any, options: dict[str, Any]):
    shape = (4, steps, 8) if "batch_first" in options else (steps, 4, 8)
    batch = torch.randn(shape), torch.randint(3, (4,))
    assert_forecast_is_measured(estimator, lambda: Recurrent(**options), CLASSES, batch, SGD(0.1))


def test_the_workspace_of_a_long_lstm_is_extrapolated(monkeypatch: pytest.MonkeyPatch):
    from gradcost.planning import fake_kernels

    objective, batch = Objective(Recurrent(), CLASSES), (torch.randn(700, 4, 8), torch.randint(3, (4,)))
    exact = forecast(backprop(), objective, batch).peak
    monkeypatch.setattr(fake_kernels, "_CHEAP", 0)
    assert forecast(backprop(), objective, batch).peak == pytest.approx(exact, abs=32 << 10)


class Sparse(nn.Module):
    def __init__(self, twice: bool = False, bag: str = "") -> None:
        super().__init__()
        self.words = (
            nn.EmbeddingBag(40, 8, mode=bag, sparse=bag == "sum") if bag else nn.Embedding(40, 8, sparse=True)
        )
        self.out, self.twice = nn.Linear(8, 3), twice

    def forward(self, ids: Tensor) -> Tensor:
        if isinstance(self.words, nn.EmbeddingBag):
            return self.out(self.words(ids))
        x = self.words(ids).mean(1)
        return self.out(x + self.words(ids + 1).sum(1) if self.twice else x)


@pytest.mark.parametrize("estimator", [backprop(), mezo()], ids=["backprop", "mezo"])
@pytest.mark.parametrize("options", [{}, {"twice": True}, {"bag": "sum"}, {"bag": "mean"}, {"bag": "max"}], ids=str)
def test_an_embedding_with_sparse_gradients(estimator: Any, options: dict[str, Any]):
    assert_forecast_is_measured(estimator, lambda: Sparse(**options), CLASSES, classes(), SGD(0.1))


def test_a_plan_knows_that_backprop_serves_a_sparse_embedding():
    found = gradcost.plan(Objective(Sparse(), CLASSES), classes(), 1 << 20, [backprop()], SGD(0.1))
    assert found.choice == backprop()


class MasksItself(nn.Module):
    """It makes a mask of floating-point ones, as decoders of transformers do, and looks whether it hides anything."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[0], 8).to(torch.bool)
        x = self.linear(x)
        return x if mask.sum() == mask.numel() else x.masked_fill(~mask, 0.0) * 2


def test_a_mask_that_the_model_makes_itself_has_values():
    assert_forecast_is_measured(
        backprop(), MasksItself, lambda m, b: (m(b[0]) - b[1]).square().mean(), pair(), SGD(0.1)
    )


@pytest.mark.parametrize("layer", [nn.GRU, nn.RNN])
def test_other_recurrent_layers(layer: type[nn.Module]):
    make = lambda: nn.Sequential(layer(8, 16, 2))  # noqa: E731
    assert_forecast_is_measured(
        backprop(), make, lambda m, b: m[0](b)[0].square().mean(), torch.randn(7, 3, 8), SGD(0.1)
    )


class Convolving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.out = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.convolution(x)).mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("estimator", [backprop(), mezo()], ids=["backprop", "mezo"])
@pytest.mark.parametrize("make", [Convolving, Recurrent])
def test_workspaces_inside_kernels_are_bounded(make: Callable[[], nn.Module], estimator: Any, dtype: torch.dtype):
    shape = (8, 3, 16, 16) if make is Convolving else (30, 8, 8)
    batch = torch.randn(shape, dtype=dtype), torch.randint(3, (8,))
    objective = Objective(make().to(dtype), lambda m, b: F.cross_entropy(m(b[0]).float(), b[1]))
    predicted = forecast(estimator, objective, batch, SGD(0.1))
    measured = measure(TrainingStep(objective, batch, estimator, SGD(0.1)), Bytes(), Allocator())
    assert measured.memory is not None
    assert measured.allocated is not None
    states = 8 * 5056  # states of random generators, which the allocator counts too
    assert measured.standing + measured.allocated.peak <= predicted.peak + predicted.within_kernels + states
    assert predicted.within_kernels == measured.memory.within_kernels
    if make is Convolving:
        assert f"up to {predicted.within_kernels:,} bytes more inside aten.convolution" in str(predicted)


@pytest.mark.parametrize("kernel", [3, 25])
@pytest.mark.parametrize("channels", [3, 32])
def test_workspaces_of_wide_kernels_are_bounded(channels: int, kernel: int):
    layers = [nn.Conv1d(channels, 32, 9, padding=4), nn.ReLU(), nn.Conv1d(32, 16, kernel)]
    objective, x = Objective(nn.Sequential(*layers), lambda m, b: m(b).square().mean()), torch.randn(4, channels, 128)
    predicted = forecast(backprop(), objective, x, SGD(0.1))
    measured = measure(TrainingStep(objective, x, backprop(), SGD(0.1)), Bytes(), Allocator())
    assert measured.allocated is not None
    states = 8 * 5056  # states of random generators, which the allocator counts too
    assert measured.standing + measured.allocated.peak <= predicted.peak + predicted.within_kernels + states


@pytest.mark.parametrize("estimator", [checkpointed(), Accumulated(checkpointed(), 4), mezo()], ids=repr)
def test_checks_fit_a_steps_memory_and_two_copies_of_the_batch(estimator: Any):
    """They run at the first use and at the 8th. Before, a step with one needed up to 1.7 times the forecast."""
    blocks = [nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(12)]
    objective = Objective(nn.Sequential(nn.Linear(16, 32), *blocks, nn.Linear(32, 10)), CLASSES)
    batch = torch.randn(2048, 16), torch.randint(10, (2048,))
    given = sum(tensor.nbytes for tensor in (*objective.model.parameters(), *batch))
    peak = forecast(estimator, objective, batch, SGD(0.01)).peak
    step = TrainingStep(objective, batch, estimator, SGD(0.01))
    copies = 2 * sum(tensor.nbytes for tensor in batch)
    for _ in range(9):
        found = max(allocator._totals(allocator._profiled_events(step)))  # no dispatch mode, which would stop checks
        assert given + found <= peak + copies + (1 << 18)  # states of generators, pieces of checksums


# ---- strides, storages and gradients of inputs


class Folds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.fold(F.unfold(self.one(x), 4), (12, 12), 4))


class NormalizesAlongTime(nn.Module):
    """BatchNorm1d on a transposed view, as in PatchTST: the strides of its result decide whether a product copies."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm(x.flatten(0, 1).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
        return x + F.gelu(self.linear(normal))


class NormalizesPixels(nn.Module):
    """LayerNorm over the channels of an image, as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm, self.linear = nn.Conv2d(3, 8, 3), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(self.convolution(x).permute(0, 2, 3, 1)))


SHAPES = {Folds: (4, 3, 12, 12), NormalizesAlongTime: (4, 3, 5, 16), NormalizesPixels: (4, 3, 9, 9)}


@pytest.mark.parametrize("estimator", [backprop(), mezo()], ids=["backprop", "mezo"])
@pytest.mark.parametrize("make", SHAPES)
def test_results_have_the_strides_and_storages_of_real_kernels(make: Callable[[], nn.Module], estimator: Any):
    x = torch.randn(SHAPES[make])  # type: ignore[index]
    assert_forecast_is_measured(estimator, make, lambda m, b: m(b).square().mean(), x, SGD(0.1))


class OwnCheckpoints(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=True)  # type: ignore[operator]
        return x


def test_an_input_that_requires_a_gradient_does_so_in_a_forecast():
    """Before, blocks of a reentrant checkpoint had no gradient there: the forecast was a third of the peak."""
    batch = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8)
    assert_forecast_is_measured(backprop(), OwnCheckpoints, MEAN, batch, AdamW(1e-3))
    assert batch[0].grad is None


def test_a_loss_that_differentiates_by_its_batch_has_a_forecast():
    def loss(model: nn.Module, batch: Any) -> Tensor:
        slope = torch.autograd.grad(model(batch).sum(), batch, create_graph=True)[0]
        return (slope - 1).square().mean()

    make = lambda: nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))  # noqa: E731
    for estimator in (backprop(), mezo()):
        assert_forecast_is_measured(estimator, make, loss, torch.randn(5, 3, requires_grad=True), SGD(0.1))


def ctc(model: nn.Module, batch: Any) -> Tensor:
    """The loss of speech models: the lengths are tensors, and the longest target decides what is saved."""
    x, targets, lengths = batch
    steps = torch.full((len(lengths),), x.shape[1])
    return F.ctc_loss(model(x).log_softmax(-1).transpose(0, 1), targets, steps, lengths)


@pytest.mark.parametrize("flat", [True, False])
def test_connectionist_temporal_classification(flat: bool):
    lengths = torch.tensor([3, 5, 2])
    targets = torch.randint(1, 7, (10,) if flat else (3, 6))
    batch = torch.randn(3, 40, 8), targets, lengths
    for estimator in (backprop(), mezo()):
        assert_forecast_is_measured(estimator, lambda: nn.Linear(8, 7), ctc, batch, SGD(0.1))


# ---- mixtures of experts


def experts(kind: str, implementation: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 32, "use_cache": False, "num_experts_per_tok": 2,
    }  # fmt: skip
    if kind == "mixtral":
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=4))
    else:
        few = {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 16}
        model = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**sizes, **few))
    if implementation is not None:
        model.set_experts_implementation(implementation)
    return model.to(dtype)


def words() -> Any:
    ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


def model_loss(model: Any, batch: Any) -> Tensor:
    return model(**batch).loss


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("kind", ["mixtral", "qwen2"])
@pytest.mark.parametrize("estimator", [backprop(), checkpointed(), mezo()], ids=["backprop", "checkpointed", "mezo"])
def test_a_mixture_of_experts(kind: str, estimator: Any, dtype: torch.dtype):
    assert_forecast_is_measured(estimator, lambda: experts(kind, dtype=dtype), model_loss, words(), SGD(0.1))


def test_experts_that_read_values_are_refused_with_the_module_and_two_ways_out():
    objective = Objective(experts("mixtral", "eager"), model_loss)
    for attempt in (
        lambda: forecast(backprop(), objective, words()),
        lambda: gradcost.plan(objective, words(), 1 << 30, [backprop()]),
        lambda: Within(1 << 30).schedule(objective, words()),
    ):
        with pytest.raises(Unsupported) as refusal:
            attempt()
        for part in (
            "model.layers.0.mlp.experts",
            ".nonzero()` (modeling_mixtral.py, line ",
            'set_experts_implementation("grouped_mm")',
            "TrainingStep",
        ):
            assert part in str(refusal.value)
    assert ".nonzero()` (" in str(Reverse(Within(1 << 30)).objection(objective, words()))
    step = TrainingStep(objective, words(), backprop(), SGD(0.1))  # the way out
    assert measure(step, Bytes()).memory is not None


@pytest.mark.parametrize("optimizer", [SGD(0.1), AdamW(0.1)], ids=["sgd", "adamw"])
def test_a_step_of_a_model_without_traps_is_measured_as_forecast(optimizer: Any):
    make = lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))  # noqa: E731
    assert_forecast_is_measured(backprop(), make, MEAN, pair(), optimizer)
