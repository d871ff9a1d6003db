"""What shows only after many steps: results of checks that outlive their loss or model, caches that keep models."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradcost
from gradcost import SGD, Key, Objective, Reverse, backprop, checkpoint, mezo
from gradcost.checkpointing import Blocks
from gradcost.instruments import Bytes, TrainingStep
from gradcost.planning import Within, fake_results
from gradcost.planning.within import MemoryTradeoff

KEY = Key(51)


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


def test_a_new_loss_at_the_address_of_an_old_one_moves_the_running_statistics():
    """Before, 7 of 150 updates were made: the new losses passed for those before, without BatchNorm."""
    model, x = Normalised(), torch.randn(8, 4)
    first = Objective(model, squares)
    for number in range(260):
        if number < 130:
            objective = first.with_loss(lambda m, b, w=number: squares(m.get_submodule("linear"), b) * w)
        else:
            objective = first.with_loss(lambda m, b, w=number: squares(m, b) * w)
        objective.advance(x, KEY.fold("step", number))
    assert int(model.norm.num_batches_tracked) == 130  # type: ignore[arg-type]


class Head(nn.Module):
    def __init__(self, is_noisy: bool) -> None:
        super().__init__()
        self.linear, self.generator = nn.Linear(4, 1), torch.Generator() if is_noisy else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if self.generator is None else y + torch.randn(y.shape, generator=self.generator)


def test_a_new_module_at_the_address_of_an_old_one_is_examined():
    """Before, its generator was not isolated, and the two losses of a difference had different noise."""
    x = torch.randn(8, 4)

    def at_the_same_addresses() -> nn.Module | None:
        model = nn.Sequential(nn.Linear(4, 4), Head(False))
        mezo().estimate(Objective(model, squares), x, KEY)
        addresses = [id(module) for module in model.modules()]
        for _ in range(20):
            model[1] = nn.Identity()
            model[1] = Head(True)
            if [id(module) for module in model.modules()] == addresses:
                return model
        return None

    model = next((model for model in (at_the_same_addresses() for _ in range(50)) if model is not None), None)
    if model is None:
        pytest.skip("Python has reused no address")
    objective = Objective(model, squares)
    slopes = [mezo().estimate(objective, x, KEY).slopes for _ in range(3)]
    assert slopes[0] is not None
    assert all(torch.equal(slopes[0], other) for other in slopes if other is not None)


def blocks(activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), activation()) for _ in range(4)))


def in_a_loop(model: nn.Module, x: Tensor) -> None:
    with checkpoint(model, Within(100_000)):
        squares(model, x).backward()


def estimated(model: nn.Module, x: Tensor) -> None:
    objective = Objective(model, lambda _, batch: squares(model, batch))  # refers to the model
    Reverse(Within(100_000)).estimate(objective, x, KEY).gradient.write()


def measured(model: nn.Module, x: Tensor) -> None:
    gradcost.measure(TrainingStep(Objective(model, squares), x, backprop(), SGD(0.1)), Bytes())


def planned(model: nn.Module, x: Tensor) -> None:
    gradcost.plan(Objective(model, squares), x, 100_000, [backprop(), Reverse(Within(100_000)), mezo()], SGD(0.1))


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU])  # one that saves its own result, and one that does not
@pytest.mark.parametrize("use", [in_a_loop, estimated, measured, planned])
def test_a_model_is_freed_after_its_last_use(use: Callable[[nn.Module, Tensor], None], activation: type[nn.Module]):
    """Before, forecasts of schedules, memory trackers and the cache of `Within` kept it for ever."""
    x = torch.randn(4, 8)

    def used() -> weakref.ref[nn.Module]:
        model = blocks(activation)
        use(model, x)
        return weakref.ref(model)

    models = [used() for _ in range(2)]
    gc.collect()
    assert [model() for model in models] == [None, None]


def test_a_context_that_is_entered_again_plans_nothing_again(monkeypatch: pytest.MonkeyPatch):
    """Before, each `with checkpoint(...)` examined the model and searched a schedule anew: 100 ms instead of 1."""
    planned: list[int] = []
    original = MemoryTradeoff._best_schedules
    monkeypatch.setattr(MemoryTradeoff, "_best_schedules", lambda self: (planned.append(1), original(self))[1])
    model, x = blocks(nn.Tanh), torch.randn(4, 8)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.register_forward_hook(count)
    for policy in (Within(100_000), Blocks()):
        found = []
        for _ in range(4):
            calls = 0
            with checkpoint(model, policy):
                squares(model, x).backward()
            found.append(calls)
        assert found[1:] == [1, 1, 1]
    assert len(planned) == 1


class Weighted:
    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.name = "a loss with a weight"

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        return self.weight * squares(model, batch)


def test_an_object_that_is_made_for_each_step_is_examined_as_seldom_as_a_function():
    calls: list[int] = []

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            calls.append(1)
            return super().forward(x)

    def cost(make: Callable[[float], Any]) -> int:
        model, x = Counted(4, 4), torch.randn(3, 4)
        calls.clear()
        for number in range(40):
            mezo().estimate(Objective(model, make(float(number))), x, KEY.fold("step", number))
        return len(calls)

    assert cost(Weighted) == cost(lambda w: lambda m, b: w * squares(m, b))


def test_a_full_cache_of_fake_results_takes_new_ones(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fake_results, "_MOST", 50)
    monkeypatch.setattr(fake_results, "_known", {})
    for width in range(3, 9):
        objective = Objective(nn.Linear(width, 2), squares)
        known = set(fake_results._known)
        gradcost.forecast(backprop(), objective, torch.zeros(4, width), SGD(0.1))
        assert len(fake_results._known) <= 50
        assert fake_results._known.keys() - known
