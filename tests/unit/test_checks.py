"""A check reports what is true and detects what is broken: each line is tested on something that must fail it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcost.checks.check import USABLE, check
from gradcost.checks.forward_mode_support import blocked_modules
from gradcost.checks.report import CheckReport, format_number
from gradcost.cli import spec
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.value import value
from gradcost.directions import Directions, Rademacher
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.estimator import Estimate, Estimator, Facts
from gradcost.estimators.gradient import Sum
from gradcost.estimators.presets import backprop, checkpointed, forward_gradient, mezo, spsa, zo_sgd_sign, zo_svrg
from gradcost.estimators.probing import Probing
from gradcost.estimators.structure import find, micro_batches
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp, Slope

AGREES, SAME = "agrees with backprop", "the same function"
BATCH = torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(10, 6).sin()


def squared(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square().mean()


def network(*middle: nn.Module) -> nn.Module:
    with seeded_generators(Key(3)):
        return nn.Sequential(nn.Linear(6, 5), *middle, nn.Linear(5, 3)).double()


def objective(*middle: nn.Module, **how: Any) -> Objective:
    return Objective(network(*middle), squared, data=lambda: [BATCH, -BATCH], **how)


def looked_at(estimator: Estimator, model: Objective | None = None, draws: int = 32) -> CheckReport:
    return check(estimator, objective(nn.Tanh()) if model is None else model, BATCH, Key(1), draws)


def failed(found: CheckReport) -> set[str]:
    return {line.what for line in found.failed}


WELL = {
    "backprop": backprop(),
    "forward": forward_gradient(3),
    "together": Probing(Jvp(together=2), Rademacher(), 4),
    "mezo": mezo(),
    "spsa": spsa(probes=2),
    "one-sided": Probing(ForwardDifference(1e-4)),
    "chosen eps": Probing(CentralDifference()),
    "sign": zo_sgd_sign(),
    "clipped": Clipped(forward_gradient(), 0.01),
    "accumulated": Accumulated(forward_gradient(2), 3),
    "accumulated-backprop": Accumulated(backprop(), 2),
    "stateful": zo_svrg(every=2),
}


@pytest.mark.parametrize(
    "layer", [nn.Tanh(), nn.Dropout(0.3), nn.BatchNorm1d(5)], ids=lambda layer: type(layer).__name__
)
@pytest.mark.parametrize("name", WELL)
def test_what_is_right_passes_and_backprop_is_the_measure(name: str, layer: nn.Module):
    found = looked_at(WELL[name], objective(nn.Tanh(), layer))
    assert failed(found) == set()
    assert found.line("nothing disturbed after an estimate").found == "bitwise"
    assert found.line("the same key").found == "bitwise"
    agreement = found.line(AGREES).numbers["error"]
    assert agreement < (1e-12 if not find(WELL[name], CentralDifference | ForwardDifference) else 1e-2)  # type: ignore[arg-type]
    dropped = [line for line in found.lines if line.what.startswith(SAME)]
    assert all((line.numbers["another key"] > 0) == isinstance(layer, nn.Dropout) for line in dropped)
    if name in ("backprop", "accumulated-backprop"):
        for what, expected in (("cosine", 1.0), ("length", 1.0), ("bias", 1.0), ("second moment", 1.0)):
            assert found.line(what).numbers["mean"] == pytest.approx(expected, abs=1e-9)


def test_every_preset_that_can_serve_passes():
    for name, preset in spec.presets().items():
        if name == "addax":  # needs a batch with an attention mask
            continue
        assert not failed(looked_at(preset(), draws=8)) - {USABLE}, name


@pytest.mark.parametrize("estimator", [forward_gradient(4), spsa(probes=4)], ids=repr)
def test_the_figures_are_those_of_theory_where_it_has_them(estimator: Estimator):
    found = looked_at(estimator, draws=400)
    for what in ("cosine", "bias", "second moment"):
        numbers = found.line(what).numbers
        assert abs(numbers["mean"] - numbers["theory"]) < 5 * numbers["standard error"] + 0.02 * numbers["theory"], (
            what
        )
    assert found.line("to reach cosine 0.5").numbers["probes"] < 30  # of 53 weights
    assert not [line for line in looked_at(backprop()).lines if line.what.startswith("to reach")]


# ---- what is broken


@value
class Scaled(Slope):
    """A difference that multiplies by eps where it should not: the slope of eps z."""

    eps: float = 1e-2
    exact = False

    def measure(
        self, objective: Objective, batch: Any, key: Key, directions: Directions, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        loss, slopes = CentralDifference(self.eps).measure(objective, batch, key, directions, seeds)
        return loss, self.eps * slopes

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return None


@value
class Walking(Estimator):
    """Moves the weights there and back in place, as many do, and leaves the rounding behind."""

    of: Estimator = backprop()

    @property
    def facts(self) -> Facts:
        return self.of.facts

    def init(self, objective: Objective) -> None:
        return None

    def estimate(self, objective: Objective, batch: Any, key: Key, state: Any = None) -> Estimate:
        with torch.no_grad():
            for leaf in objective.leaves:
                leaf.parameter.add_(0.3).sub_(0.6).add_(0.3)
        return self.of.estimate(objective, batch, key, state)

    def stream(self, objective: Objective, batch: Any, key: Key, use: Any, state: Any = None) -> Estimate:
        return self.of.stream(objective, batch, key, use, state)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return None


@value
class Doubled(Estimator):
    """Twice what an estimator finds."""

    of: Estimator

    @property
    def facts(self) -> Facts:
        return self.of.facts

    def init(self, objective: Objective) -> None:
        return None

    def estimate(self, objective: Objective, batch: Any, key: Key, state: Any = None) -> Estimate:
        found = self.of.estimate(objective, batch, key, state)
        return replace(found, gradient=Sum(objective, (found.gradient,), (2.0,)))

    def stream(self, objective: Objective, batch: Any, key: Key, use: Any, state: Any = None) -> Estimate:
        raise AssertionError

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return None


def test_a_slope_of_a_wrong_scale_fails():
    found = looked_at(Probing(Scaled(), Rademacher()))
    assert AGREES in {what[: len(AGREES)] for what in failed(found)}
    assert found.line(AGREES).numbers["error"] > 0.05


def test_a_slope_and_a_gradient_of_a_wrong_scale_fail_in_the_mean(monkeypatch: pytest.MonkeyPatch):
    found = looked_at(Probing(Scaled(), Rademacher(), 4), draws=64)
    assert {"bias: <mean g, grad> / |grad|^2", "second moment E|g|^2 / |grad|^2"} <= failed(found)
    assert {line.what for line in looked_at(Doubled(backprop())).failed} == {
        "agrees with backprop along one direction"
    }


def test_weights_that_are_walked_there_and_back_are_named():
    found = looked_at(Walking())
    line = found.line("nothing disturbed after an estimate")
    assert line.verdict == "failed"
    assert "0.weight: bits" in line.found


class Own(nn.Module):
    """A layer that draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * torch.rand(x.shape, generator=self.generator, dtype=x.dtype))


class Unkeyed(nn.Module):
    """A layer that draws from the operating system, so that no key sets its noise."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * int.from_bytes(os.urandom(4), "little") / 2**32)


@pytest.mark.parametrize("estimator", [mezo(), forward_gradient()], ids=repr)
def test_noise_of_a_generator_in_the_model_passes_and_noise_that_no_key_sets_is_a_failed_line(estimator: Estimator):
    assert failed(looked_at(estimator, objective(Own()))) == set()
    found = looked_at(estimator, objective(nn.Tanh(), Unkeyed()))
    assert failed(found) == {USABLE}
    assert "2" in found.line(USABLE).found  # the module


class Cut(nn.Module):
    """A layer whose second path backpropagation does not see."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() + 2 * x.detach().sin()


@pytest.mark.parametrize("estimator", [backprop(), forward_gradient(), mezo()], ids=repr)
def test_a_path_that_is_cut_is_found_by_one_difference(estimator: Estimator):
    found = looked_at(estimator, objective(Cut()))
    assert "backprop agrees with a difference of losses" in failed(found)
    assert ".detach()" in found.line("backprop agrees").found
    if estimator == forward_gradient():
        assert found.line(AGREES).verdict == "ok"  # both are blind to it


class NoRule(torch.autograd.Function):
    """x^2 without a rule for forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 2 * ctx.saved_tensors[0] * grads[0]


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return NoRule.apply(x)  # type: ignore[return-value]


class Twice(nn.Module):
    """Calls one opaque module two times, between layers that are fine."""

    def __init__(self) -> None:
        super().__init__()
        self.opaque, self.linear = Opaque(), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.opaque(self.linear(self.opaque(x)))


def test_every_module_without_a_forward_rule_is_named_with_its_line():
    model = objective(Opaque(), nn.Tanh(), Twice(), nn.Tanh(), Opaque())
    before = {name: list(vars(module)) for name, module in model.model.named_modules()}
    found = blocked_modules(model, BATCH, Key(0))
    assert [here.module for here in found] == ["1", "3.opaque", "5"]
    assert all("NoRule.apply(x)" in here.line for here in found)
    assert all("jvp" in here.reason for here in found)
    assert {name: list(vars(module)) for name, module in model.model.named_modules()} == before
    told = looked_at(forward_gradient(), model)
    lines = [line for line in told.failed if line.what == "forward-mode differentiation"]
    assert [line.found.split(",")[0] for line in lines] == ["not 1", "not 3.opaque", "not 5"]
    assert told.line(USABLE).verdict == "failed"
    assert {line.verdict for line in looked_at(mezo(), model).lines} == {"ok", "note"}


def test_no_module_is_named_where_all_can():
    assert blocked_modules(objective(nn.Tanh(), nn.BatchNorm1d(5), nn.Dropout(0.1)), BATCH, Key(0)) == ()


class Attends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        heads = x.reshape(1, 1, *x.shape)
        return F.scaled_dot_product_attention(heads, heads, heads).reshape(x.shape)


def test_attention_on_the_math_kernel_is_noted_where_tangents_need_it():
    model = objective(Attends())
    assert looked_at(forward_gradient(), model).line("attention").verdict == "note"
    for estimator, here in ((mezo(), model), (forward_gradient(), objective(nn.Tanh()))):
        assert not [line for line in looked_at(estimator, here).lines if line.what == "attention"]


def test_an_eps_below_what_the_loss_can_tell_is_noted_with_the_way_out():
    found = looked_at(Probing(CentralDifference(1e-15)))
    assert found.line(AGREES).verdict == "note"
    assert "Use a larger eps" in found.line(AGREES).found
    numbers = found.line("resolution of the loss").numbers
    assert numbers["gap"] == torch.finfo(torch.float64).eps  # the loss lies between 1 and 2
    assert "too small" in found.line("resolution of the loss").found
    assert "Use a smaller eps" in looked_at(Probing(CentralDifference(1.0))).line(AGREES).found


def test_a_loss_without_a_derivative_leaves_what_needs_none():
    steps = Objective(network(), lambda model, batch: (model(batch) > 0.1).double().mean())
    found = looked_at(mezo(0.1), steps)
    assert "nothing to compare with" in found.line("backpropagation").found
    assert found.line("nothing disturbed").verdict == "ok"
    assert failed(found) == set()


def test_a_loss_that_is_no_number_ends_it():
    found = looked_at(mezo(), Objective(network(), lambda model, batch: squared(model, batch) * float("nan")))
    assert [line.what for line in found.lines] == ["the loss is finite"]
    assert failed(found) == {"the loss is finite"}


def test_a_refusal_is_a_line_and_what_is_asked_wrongly_a_sentence():
    assert "measures no slopes to clip" in looked_at(Clipped(backprop())).line(USABLE).found
    with pytest.raises(ValueError, match="draws is a number of estimates"):
        looked_at(mezo(), draws=0)
    with pytest.raises(ValueError, match="cannot be evaluated on this batch: RuntimeError"):
        check(mezo(), objective(), BATCH[:, :5])


def test_nothing_is_disturbed_by_looking():
    from snapshot import differences, snapshot

    model = objective(nn.Dropout(0.2), nn.BatchNorm1d(5), Opaque())
    for leaf in model.leaves[:2]:
        leaf.parameter.grad = torch.ones_like(leaf.parameter)
    before = snapshot(model.model)
    for estimator in (forward_gradient(), mezo(), checkpointed()):
        looked_at(estimator, model, draws=2)
    assert differences(before, snapshot(model.model)) == []


def test_a_diagnosis_prints_as_a_table_and_as_data():
    found = looked_at(mezo())
    lines = str(found).splitlines()
    assert "53 trained weights" in lines[0]
    assert len(lines) == 1 + len(found.lines)
    assert all(line.rstrip().endswith(("ok", "failed", "note")) for line in lines[1:])
    record = json.loads(json.dumps(found.record()))
    assert record["ok"]
    assert record["method"] == repr(mezo())
    with pytest.raises(ValueError, match="starts with 'colour'"):
        found.line("colour")


# ---- what is to blame


class Failing(nn.Module):
    """Raises on its call number `at`."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls = at, [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        if self.calls[0] > self.at and torch.is_grad_enabled():
            raise IndexError("list index out of range")
        return x


@value
class Broken(Estimator):
    """Raises where another estimator would work."""

    error: type[Exception] = TypeError

    @property
    def facts(self) -> Facts:
        return Facts()

    def init(self, objective: Objective) -> None:
        return None

    def estimate(self, objective: Objective, batch: Any, key: Key, state: Any = None) -> Estimate:
        raise self.error("of an estimate")

    def stream(self, objective: Objective, batch: Any, key: Key, use: Any, state: Any = None) -> Estimate:
        raise AssertionError

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return None


def test_an_exception_is_a_line():
    found = looked_at(Broken(), draws=1)
    assert "the same key gives the same estimate" in failed(found)
    assert found.line("the same key").found == "TypeError: of an estimate"
    assert found.line("backprop agrees").verdict == "ok"

    @value
    class Objecting(Broken):  # type: ignore[misc]
        def objection(self, objective: Objective, batch: Any) -> str | None:
            raise IndexError("list index out of range")

    assert looked_at(Objecting(), draws=1).line(USABLE).found == "IndexError: list index out of range"


def test_a_model_that_backprop_cannot_differentiate_is_a_note():
    found = looked_at(mezo(), objective(nn.Tanh(), Failing(0)), draws=1)
    assert "IndexError: list index out of range" in found.line("backpropagation").found
    assert failed(found) == set()


@torch.jit.script
def scripted(x: Tensor, bias: Tensor) -> Tensor:
    return torch.tanh(x + bias)


class WithoutBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(0.3 * torch.eye(5)), nn.Parameter(torch.linspace(-1, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Fused(nn.Module):
    """Gives a scripted function the bias of another module, where a substituted weight is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.up = WithoutBias()

    def forward(self, x: Tensor) -> Tensor:
        return scripted(self.up(x), self.up.bias)


def test_an_exact_backprop_is_not_blamed_where_substituted_weights_are_not_seen():
    assert failed(looked_at(backprop(), objective(Fused()), draws=1)) == set()
    found = looked_at(mezo(), objective(Fused()), draws=1)
    assert found.line("backprop agrees").verdict == "ok"
    assert "1.up.bias" in found.line(USABLE).found


def test_an_exact_backprop_is_not_blamed_for_a_coarse_loss():
    """Autocast in bfloat16: a difference of losses has few digits."""
    model = network(nn.Tanh()).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = check(backprop(), Objective(model, squared), BATCH.float(), Key(1), 2)
    assert failed(found) == set()


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(5, 5, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
        )

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex128) @ self.weight).abs()


@pytest.mark.parametrize("estimator", [backprop(), mezo(1e-5)], ids=repr)
def test_complex_weights_pass(estimator: Estimator):
    found = looked_at(estimator, objective(Spectral()), draws=8)
    assert failed(found) == set()
    assert found.line("backprop agrees").numbers["error"] < 1e-6


@value
class Writing(Walking):  # type: ignore[misc]
    """Changes the batch."""

    def estimate(self, objective: Objective, batch: Any, key: Key, state: Any = None) -> Estimate:
        batch[0] += 1
        return self.of.estimate(objective, batch, key, state)


def test_a_changed_batch_is_named():
    found = check(Writing(), objective(), BATCH.clone(), Key(1), 1)
    assert "batch, entry 0" in found.line("nothing disturbed after an estimate").found


def test_micro_batches_are_compared_with_the_whole_batch():
    def padded(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def contrastive(model: nn.Module, batch: Any) -> Tensor:
        out = model(batch[0])
        return F.cross_entropy(out @ out.T, torch.arange(len(out)))

    what = "micro-batches give the gradient of the whole batch"
    batch = BATCH, torch.tensor([0, -100, 1, 2, -100, -100, -100, 1, 2, 0])
    found = check(Accumulated(backprop(), 3), Objective(network(nn.Dropout(0.5)), padded), batch, Key(1), 2)
    assert found.line(what).verdict == "ok"
    assert failed(found) == set()
    found = check(Accumulated(backprop(), 3), Objective(network(), contrastive), batch, Key(1), 2)
    assert failed(found) == {USABLE}
    assert not [line for line in looked_at(backprop(), draws=1).lines if line.what == what]


def test_micro_batches_with_statistics_of_their_own_are_noted():
    from gradcost.checks.accumulation import WHAT

    draws = torch.Generator().manual_seed(0)
    made, batch = objective(nn.Dropout(0.5), nn.BatchNorm1d(5)), torch.randn(10, 6, generator=draws).double()
    found = check(Accumulated(backprop(), 2), made, batch, Key(1), 2)
    assert found.line(WHAT).verdict == "ok"
    line = found.line(f"{WHAT} in train mode")
    assert line.verdict == "note"
    assert line.numbers["error"] > 0.01
    made.model.eval()
    found = check(Accumulated(backprop(), 2), made, batch, Key(1), 2)
    assert not [line for line in found.lines if "in train mode" in line.what]


def test_micro_batches_of_another_gradient_fail(monkeypatch: pytest.MonkeyPatch):
    from gradcost.checks.accumulation import accumulation_lines

    made = objective()
    monkeypatch.setattr(
        Objective, "in_micro_batches", lambda self, count: self.with_loss(lambda m, b: squared(m, b[:4]))
    )
    (line,) = accumulation_lines(made, 2, BATCH, Key(1), 1e-6)
    assert line.verdict == "failed"


def test_parts_are_found_at_any_depth():
    inner = Accumulated(Clipped(Accumulated(mezo(), 3), 0.5), 2)
    assert micro_batches(inner) == 6
    assert find(inner, Slope) == [CentralDifference(1e-3)]
    assert find(backprop(), Slope) == []


@pytest.mark.parametrize(
    ("figure", "text"), [(0.0031, "0.0031"), (284419.0, "284,419"), (1.3e-7, "1.3e-7"), (0.0, "0"), (1e20, "1.0e20")]
)
def test_figures_are_short(figure: float, text: str):
    assert format_number(figure) == text
