"""Forecasts of deep models whose blocks differ in what they do, or whose steps depend on the number of blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradcost
from gradcost import SGD, AdamW
from gradcost.cli import spec
from gradcost.planning import copies
from gradcost.planning.forecast import Forecast, forecast
from gradcost.planning.forecasts import Forecasts

DEPTH = 7
LARGE, SMALL = (128, 256), (8, 32)  # widths of a block, with and without a leaf of 64 KiB


@pytest.fixture(autouse=True)
def shallow_models_count_as_deep(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(copies, "_LEAST_BLOCKS", 6)


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, widths: tuple[int, int] = LARGE, depth: int = DEPTH) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, widths[0]), nn.Linear(widths[0], 5)
        self.layers = nn.ModuleList(Block(*widths) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(self.first(x)))

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class DetachesInTheMiddle(Net):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x.detach() if index == 5 else x)
        return x


class RecomputesTheFirstBlocks(Net):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            is_recomputed = index < 6 and torch.is_grad_enabled()
            x = checkpoint(layer, x, use_reentrant=False) if is_recomputed else layer(x)
        return x


class KeepsTwoFeatures(Net):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in (2, 6):
                kept.append(x)
        return x + sum(kept)


class KeepsTheLastFeatures(Net):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        kept: deque[torch.Tensor] = deque(maxlen=6)
        for layer in self.layers:
            x = layer(x)
            kept.append(x)
        return x + sum(kept)


class TrainsTheLastBlocks(Net):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= 6):
                x = layer(x)
        return x


def with_own_forward() -> Net:
    model = Net()
    block = model.layers[5]
    block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def with_a_transposed_weight() -> Net:
    model = Net()
    weight = model.get_parameter("layers.5.up.weight")
    weight.data = weight.data.T.contiguous().T
    return model


def with_a_hook() -> Net:
    model, kept = Net(), {}
    model.layers[5].register_forward_hook(lambda _, args, out: kept.update(output=out))
    return model


def batch(examples: int = 8, length: int = 4) -> dict[str, torch.Tensor]:
    labels = torch.zeros(examples, length, dtype=torch.int64)
    return {"x": torch.randn(examples, length, 6), "y": labels, "mask": torch.ones_like(labels)}


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())


def in_mixed_precision(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.autocast(batch["x"].device.type, dtype=torch.bfloat16):
        logits = model(batch["x"])
    return F.cross_entropy(logits.flatten(0, 1).float(), batch["y"].flatten())


def cut_to_the_longest(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    length = int(batch["mask"].sum(1).max())
    return loss(model, {"x": batch["x"][:, :length], "y": batch["y"][:, :length]})


def figures(found: Forecast | str) -> dict[str, Any]:
    assert isinstance(found, Forecast), found
    result = {**vars(found), **vars(found.counts), **vars(found.memory)}
    return {key: value for key, value in result.items() if key not in ("counts", "memory", "timeline", "cuda")}


def assert_equal(
    objective: gradcost.Objective, batch: Any, optimizer: Any, device: str | None, *methods: str
) -> bool:
    """Return whether the forecasts come from copies with fewer blocks."""
    forecasts = Forecasts(objective, batch, optimizer, device)
    for method in map(spec.method, methods):
        whole = forecast(method, objective, batch, optimizer, device)
        assert figures(forecasts.of(method)) == figures(whole), method
    return bool(forecasts._by_depth.computed)


MODELS = [
    (DetachesInTheMiddle, "backprop()", "checkpointed()"),
    (RecomputesTheFirstBlocks, "backprop()"),
    (KeepsTwoFeatures, "mezo()", "forward_gradient(probes=1)"),
    (KeepsTheLastFeatures, "mezo()"),
    (TrainsTheLastBlocks, "mezo()", "forward_gradient(probes=1)"),
    (with_own_forward, "backprop()"),
    (with_a_transposed_weight, "mezo()"),
    (with_a_hook, "mezo()"),
]


@pytest.mark.parametrize(("make", "methods"), [(make, methods) for make, *methods in MODELS])
def test_a_model_that_treats_its_blocks_differently_is_simulated(make: Callable[[], Net], methods: list[str]):
    assert not assert_equal(gradcost.Objective(make(), loss), batch(), AdamW(1e-3), None, *methods)


@pytest.mark.parametrize(
    ("device", "optimizer", "methods"),
    [
        ("cuda", AdamW(1e-3), ["Accumulated(checkpointed(), 4)"]),
        pytest.param("cuda", AdamW(1e-3), ["checkpointed()", "backprop()"], marks=pytest.mark.slow),
        pytest.param(None, SGD(0.1), ["Accumulated(checkpointed(), 4)"], marks=pytest.mark.slow),
        (None, SGD(0.1), ["checkpointed()", "backprop()"]),
    ],
)
def test_the_casts_of_all_blocks_are_freed_at_once(device: str | None, optimizer: Any, methods: list[str]):
    objective = gradcost.Objective(Net(), in_mixed_precision)
    assert assert_equal(objective, batch(), optimizer, device, *methods)


@pytest.mark.parametrize("methods", [["Accumulated(checkpointed(), 2)"], ["Accumulated(backprop(), 4)"]])
def test_gradients_of_all_blocks_are_scaled_where_micro_batches_have_unequal_weights(methods: list[str]):
    padded = batch()
    padded["y"][5:, 2:] = -100
    assert_equal(gradcost.Objective(Net(), loss), padded, SGD(0.1), None, *methods)


def test_small_leaves_of_several_blocks_that_move_together_are_simulated():
    objective = gradcost.Objective(Net(SMALL, 24), loss)
    methods = ("backprop()", "Accumulated(checkpointed(), 4)", "mezo()")
    assert not assert_equal(objective, batch(4, 1), AdamW(1e-3), None, *methods)
    assert assert_equal(objective, batch(4, 1), None, None, "checkpointed()", "mezo()")


@pytest.mark.parametrize("depth", [3, DEPTH])
def test_the_first_micro_batches_do_not_stand_for_longer_ones(depth: int):
    unequal = batch(8, 6)
    unequal["mask"][:6, 1:] = 0
    objective = gradcost.Objective(Net(depth=depth), cut_to_the_longest)
    assert_equal(objective, unequal, SGD(0.1), None, "Accumulated(checkpointed(), 4)")


def test_operators_whose_sizes_depend_on_the_micro_batches_are_not_extrapolated():
    model = Net()
    for layer in model.layers:
        layer.norm = nn.BatchNorm1d(4)
    assert_equal(gradcost.Objective(model, loss), batch(), SGD(0.1), None, "Accumulated(checkpointed(), 4)")
