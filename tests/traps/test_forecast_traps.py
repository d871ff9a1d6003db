"""A forecast leaves nothing behind, and says why it cannot be made."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_measured_traps import CLASSES, MEAN, assert_forecast_is_measured, classes, pair
from torch import Tensor, nn

import gradcost
from gradcost import (
    SGD,
    Accumulated,
    Key,
    Objective,
    Reverse,
    backprop,
    checkpointed,
    forecast,
    forward_gradient,
    mezo,
)
from gradcost.checkpointing.policies import Segments, Selective
from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.fake import is_fake
from gradcost.instruments import Bytes, TrainingStep, measure
from gradcost.planning import Within

# ---- nothing fake survives, and nothing real has moved


def holds_fake(value: Any) -> bool:
    if isinstance(value, Tensor):
        return is_fake(value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    return any(map(holds_fake, items))


class Cached(nn.Module):
    """Two blocks; `table` returns what the second one multiplies by, and may keep it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x)) * self.table(x)
        return x

    def table(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class InAttribute(Cached):
    kept: Any = None

    def table(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = torch.arange(8, dtype=x.dtype).cos()
        return self.kept


class InDictionary(Cached):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, list[Tensor]] = {"tables": []}

    def table(self, x: Tensor) -> Tensor:
        if not self.kept["tables"]:
            self.kept["tables"].append(torch.arange(8, dtype=x.dtype).cos())
        return self.kept["tables"][0]


class Keeper:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Any = None


class InObject(Cached):
    def __init__(self) -> None:
        super().__init__()
        self.keeper = Keeper()

    def table(self, x: Tensor) -> Tensor:
        if self.keeper.value is None:
            self.keeper.value = torch.arange(8, dtype=x.dtype).cos()
        return self.keeper.value


class InClass(Cached):
    kept: Any = None

    def table(self, x: Tensor) -> Tensor:
        if InClass.kept is None:
            InClass.kept = torch.arange(8, dtype=x.dtype).cos()
        return InClass.kept


_kept: dict[int, Tensor] = {}


class InGlobal(Cached):
    def table(self, x: Tensor) -> Tensor:
        if 8 not in _kept:
            _kept[8] = torch.arange(8, dtype=x.dtype).cos()
        return _kept[8]


@functools.lru_cache
def cosines(width: int) -> Tensor:
    return torch.arange(width).float().cos()


@functools.cache
def cosines_of(width: int) -> tuple[Tensor, int]:
    return torch.arange(width).float().cos(), width


class InLru(Cached):
    def table(self, x: Tensor) -> Tensor:
        return cosines(8)


class InCache(Cached):
    def table(self, x: Tensor) -> Tensor:
        return cosines_of(8)[0]


class InCachedMethod(Cached):
    @functools.lru_cache(maxsize=4)  # noqa: B019
    def cosines(self, width: int) -> Tensor:
        return torch.arange(width).float().cos()

    def table(self, x: Tensor) -> Tensor:
        return self.cosines(8)


class InProperty(Cached):
    @functools.cached_property
    def cosines(self) -> Tensor:
        return torch.arange(8).float().cos()

    def table(self, x: Tensor) -> Tensor:
        return self.cosines


class InBuffer(Cached):
    def table(self, x: Tensor) -> Tensor:
        if not hasattr(self, "angles"):
            self.register_buffer("angles", torch.arange(8, dtype=x.dtype).cos(), persistent=False)
        return self.get_buffer("angles")


KEEPERS = [
    InAttribute, InDictionary, InObject, InClass, InGlobal, InLru, InCache, InCachedMethod, InProperty, InBuffer,
]  # fmt: skip


@pytest.mark.parametrize("kind", KEEPERS)
@pytest.mark.parametrize("work", ["forecast", "plan", "within"])
def test_a_table_that_the_first_forward_keeps_is_not_fake_afterwards(kind: type[Cached], work: str):
    model, batch = kind(), pair()
    for cache in (cosines, cosines_of, InCachedMethod.cosines):
        cache.cache_clear()
    _kept.clear()
    InClass.kept = None
    objective = Objective(model, MEAN)
    before = set(vars(model))
    if work == "forecast":
        forecast(backprop(), objective, batch)
    elif work == "plan":
        gradcost.plan(objective, batch, 1 << 20, [backprop()])
    else:
        Reverse(Within(1 << 20)).objection(objective, batch)
    assert set(vars(model)) == before
    assert not any(map(holds_fake, (vars(model), _kept, InClass.kept)))
    assert not is_fake(model(batch[0]))
    assert torch.isfinite(backprop().estimate(objective, batch, Key(1)).loss)


def test_a_table_in_a_closure_of_the_loss_is_not_fake_afterwards():
    tables: list[Tensor] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if not tables:
            tables.append(torch.arange(8.0).cos())
        return (model(batch[0]) * tables[0] - batch[1]).square().mean()

    forecast(mezo(), Objective(nn.Linear(8, 8), loss), pair())
    assert tables == []


def test_a_forecast_moves_no_count_of_batches_and_writes_no_ids():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.norm, self.out = nn.Embedding(10, 8), nn.BatchNorm1d(8, momentum=None), nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            ids[0, 0] = 0
            return self.out(self.norm(self.words(ids).mean(1)))

    model, batch = Counting(), classes()
    before = batch[0].clone()
    objective = Objective(model, CLASSES)
    forecast(backprop(), objective, batch, SGD(0.1))
    gradcost.plan(objective, batch, 1 << 20, [backprop(), mezo()])
    assert int(model.norm.num_batches_tracked) == 0  # type: ignore[arg-type]
    assert torch.equal(batch[0], before)


# ---- the true reason


class ReadsMemory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * float(x.detach().numpy().std() > 0)


def test_a_loss_that_runs_but_not_on_fakes_is_not_said_to_be_wrong():
    objective = Objective(ReadsMemory(), MEAN)
    for attempt in (
        lambda: forecast(backprop(), objective, pair()),
        lambda: gradcost.plan(objective, pair(), 1 << 20, [backprop()]),
        lambda: Within(1 << 20).schedule(objective, pair()),
    ):
        with pytest.raises(Unsupported, match="TrainingStep") as refusal:
            attempt()
        assert "ReadsMemory" in str(refusal.value)
    assert Reverse(Within(1 << 20)).objection(objective, pair()) is not None


def test_a_loss_that_does_not_run_is_said_to_be_wrong():
    objective = Objective(ReadsMemory(), lambda model, batch: F.mse_loss(model(batch[0][:, :3]), batch[1]))
    for attempt in (
        lambda: forecast(backprop(), objective, pair()),
        lambda: gradcost.plan(objective, pair(), 1 << 20, [backprop()]),
        lambda: Within(1 << 20).schedule(objective, pair()),
    ):
        with pytest.raises(BadInput, match="cannot be evaluated on this batch: RuntimeError"):
            attempt()


def test_anomaly_detection_is_off_in_a_simulation():
    objective = Objective(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), MEAN)
    with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("ignore")
        assert Reverse(Within(1 << 20)).objection(objective, pair()) is None
        assert torch.is_anomaly_enabled()


# ---- the state that the first step makes


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.over, self.out, self.hidden = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 8), None

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), 64) if self.hidden is None else self.hidden
        hidden = torch.tanh(self.into(x) + self.over(hidden))
        self.hidden = hidden.detach()
        return self.out(hidden)


class KeepsAttention(nn.Module):
    """Its attribute gets the same value at each forward pass on a batch, but for dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.into, self.out = nn.BatchNorm1d(8), nn.Linear(8, 64), nn.Linear(64, 8)
        self.dropout, self.weights = nn.Dropout(dropout), None

    def forward(self, x: Tensor) -> Tensor:
        weights = self.dropout(self.into(self.norm(x)).softmax(-1))
        self.weights = weights.detach()
        return self.out(weights)


class AbsentBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mean", None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        mean = y.detach().mean(0).repeat(30)
        self.mean = mean if self.mean is None else 0.9 * self.mean + 0.1 * mean
        return y + self.mean[:8]


class ExpandedBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(1).expand(100, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.mean = 0.9 * self.mean + y.detach().mean(0)
        return y + self.mean[0]


STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "hidden state": Recurrent,
    "spectral norm by hooks": lambda: nn.Sequential(*[nn.utils.spectral_norm(nn.Linear(8, 8)) for _ in range(2)]),
    "attention": lambda: KeepsAttention(0.0),
    "attention with dropout": lambda: KeepsAttention(0.5),
    "absent buffer": AbsentBuffer,
    "expanded buffer": ExpandedBuffer,
}


@pytest.mark.parametrize("model", STATEFUL)
def test_a_forecast_contains_the_state_that_the_first_step_makes(model: str):
    for estimator in (backprop(), mezo()):
        assert_forecast_is_measured(estimator, STATEFUL[model], MEAN, pair(), SGD(0.1))


# ---- running statistics, transforms and fast paths


def blocks_with_statistics() -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()) for _ in range(4)])


@pytest.mark.parametrize("estimator", [checkpointed(), Reverse(Segments(2)), Reverse(Selective())], ids=repr)
def test_recomputed_blocks_keep_no_copies_of_running_statistics(estimator: Any):
    assert_forecast_is_measured(estimator, blocks_with_statistics, MEAN, pair(), SGD(0.1))


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
@pytest.mark.parametrize("estimator", [checkpointed(), Reverse(Segments(2)), Reverse(Selective())], ids=repr)
def test_recomputed_blocks_with_statistics_have_the_bits_of_backprop(estimator: Any, mode: str):
    def gradient(estimator: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model: Any = blocks_with_statistics().train(mode != "eval")
        if mode == "mixed":
            model[1].eval()
        objective = Objective(model, MEAN)
        estimator.estimate(objective, pair(), Key(0))
        return dict(estimator.estimate(objective, pair(), Key(0)).gradient.leaves())

    found, expected = gradient(estimator), gradient(backprop())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def derivative_of_outputs(model: nn.Module, batch: Any) -> Tensor:
    slopes = torch.func.vmap(torch.func.grad(lambda x: model(x[None]).sum()))(batch[0])
    return slopes.square().mean() + MEAN(model, batch)


@pytest.mark.parametrize("estimator", [backprop(), mezo(), forward_gradient()], ids=repr)
def test_a_loss_with_a_transform_of_torch_func_has_a_forecast_and_a_measurement(estimator: Any):
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    assert_forecast_is_measured(estimator, model, derivative_of_outputs, pair(), SGD(0.1))


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding).mean(1)


@pytest.mark.parametrize("estimator", [backprop(), checkpointed(), mezo(), forward_gradient()], ids=repr)
def test_an_encoder_with_a_fast_path_for_padding_is_evaluated_as_in_training(estimator: Any):
    """Without gradients, torch's fast path gives zeros at padding, and other means."""
    torch.manual_seed(0)
    model = Pooled().eval()
    batch = torch.randn(3, 5, 8), torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [2]])
    value = model(*batch).square().mean()
    value.backward()
    expected: dict[str, Any] = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    objective = Objective(model, lambda model, batch: model(*batch).square().mean())
    estimate = estimator.estimate(objective, batch, Key(0))
    assert float(estimate.loss) == pytest.approx(float(value), rel=1e-4)  # of mezo: the mean of two shifted losses
    if isinstance(estimator, Reverse):
        assert all(torch.allclose(g, expected[name], atol=1e-6) for name, g in estimate.gradient.leaves())


def test_micro_batches_of_an_embedding_with_gradients_by_counts_are_refused():
    model = nn.Sequential(nn.Embedding(12, 8, scale_grad_by_freq=True), nn.Tanh())
    objective = Objective(model, lambda model, x: model(x).square().mean())
    x = torch.tensor([[0, 1, 1, 3], [3, 0, 0, 5], [1, 1, 1, 0]])
    backprop().estimate(objective, x, Key(0))
    with pytest.raises(Unsupported, match="counts in that micro-batch only"):
        Accumulated(backprop(), 3).estimate(objective, x, Key(0))


# ---- sums of sparse gradients


class Lookups(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.embedding, self.head, self.count = nn.Embedding(4096, 64, sparse=True), nn.Linear(64, 4), count

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(sum(self.embedding(part) for part in ids.chunk(self.count, 1)))


@pytest.mark.parametrize("optimizer", [gradcost.SGD(0.1), gradcost.AdamW(0.001)], ids=["SGD", "AdamW"])
@pytest.mark.parametrize(
    "estimator", [backprop(), gradcost.Accumulated(backprop(), 2), gradcost.Accumulated(backprop(), 4)], ids=repr
)
@pytest.mark.parametrize("lookups", [1, 2])
def test_a_sum_of_sparse_gradients_is_exact_for_distinct_ids_and_otherwise_a_bound(
    lookups: int, estimator: Any, optimizer: Any
):
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randperm(4096, generator=generator)[:1024].view(32, 32)
    repeated = torch.randint(4096, (32, 32), generator=generator)
    for ids in (distinct, repeated, distinct % 7):
        torch.manual_seed(0)
        objective = Objective(Lookups(lookups), lambda model, ids: model(ids).square().mean())
        forecasted = forecast(estimator, objective, ids, optimizer).peak
        memory = measure(TrainingStep(objective, ids, estimator, optimizer), Bytes()).memory
        assert memory is not None
        assert forecasted == memory.peak if ids is distinct else forecasted >= memory.peak
