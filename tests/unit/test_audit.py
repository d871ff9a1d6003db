"""`audit`: the laws, on gradient functions that hold them and on functions that break each of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradcost import Key, Objective, Probing, backprop, checkpointed, forward_gradient, mezo, spsa
from gradcost.checks import CheckReport, audit
from gradcost.core.errors import BadInput
from gradcost.directions import Coordinates, Sphere
from gradcost.slopes.slope import CentralDifference
from in_process import inside

Loss = Callable[[], Tensor]
DRAWS = 300


def ours(estimator: Any) -> Any:
    numbers = itertools.count()
    made: dict[str, Any] = {}

    def function(model: nn.Module, loss: Loss) -> None:
        made["loss"] = loss
        if made.get("model") is not model:
            made["model"], made["objective"] = model, Objective(model, lambda model, batch: made["loss"]())
        objective: Objective = made["objective"]
        estimator.estimate(objective, None, Key(7).fold("step", next(numbers))).gradient.write()

    return function


def failed(report: CheckReport) -> list[str]:
    return [line.what for line in report.failed]


OURS = {
    "backprop": backprop(),
    "checkpointed": checkpointed(),
    "mezo": mezo(1e-3, 2),
    "forward_gradient": forward_gradient(2),
    "spsa": spsa(1e-3),
}


@pytest.mark.parametrize("name", ["backprop", "mezo", "forward_gradient"])
def test_our_estimators_pass(name: str):
    report = audit(ours(OURS[name]), draws=100)
    assert failed(report) == [], str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_our_estimators_pass_with_many_draws(name: str):
    report = audit(ours(OURS[name]), draws=1000)
    assert failed(report) == [], str(report)


@pytest.mark.slow
@pytest.mark.parametrize("directions", [Sphere(), Coordinates()], ids=repr)
def test_our_other_directions_pass(directions: Any):
    report = audit(ours(Probing(CentralDifference(1e-3), directions, 2)), draws=2000)
    assert failed(report) == [], str(report)


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def by_hand(
    model: nn.Module, loss: Loss, eps: float = 1e-3, factor: float = 1.0, drift: float = 0.0, keep: float = 1.0
) -> None:
    """A finite difference as people write it, with the errors that the arguments introduce."""
    with torch.no_grad():
        directions = [torch.randn_like(p) for p in parameters(model)]
        state = torch.get_rng_state()
        ends = []
        for sign in (1.0, -1.0):
            if keep:
                torch.set_rng_state(state)
            for p, z in zip(parameters(model), directions, strict=True):
                p.add_(z, alpha=sign * eps)
            ends.append(loss())
            for p, z in zip(parameters(model), directions, strict=True):
                p.add_(z, alpha=-sign * eps + drift)
        torch.set_rng_state(state)
        slope = factor * (ends[0] - ends[1]) / (2 * eps)
    for p, z in zip(parameters(model), directions, strict=True):
        p.grad = slope * z


def restored(**errors: float) -> Any:
    def function(model: nn.Module, loss: Loss) -> None:
        before = [p.detach().clone() for p in parameters(model)]
        by_hand(model, loss, **errors)
        with torch.no_grad():
            for p, b in zip(parameters(model), before, strict=True):
                p.copy_(b)

    return function


def test_a_finite_difference_by_hand_passes_if_it_restores_the_weights():
    assert failed(audit(restored(), draws=DRAWS)) == []


def test_weights_that_drift_by_rounding_are_found():
    assert failed(audit(by_hand, draws=DRAWS)) in (
        ["nothing disturbed in float32"],
        ["nothing disturbed in float64"],
        ["nothing disturbed in float64", "nothing disturbed in float32"],
    )


def test_a_wrong_scale_is_found_with_its_factor():
    report = audit(restored(factor=1000.0), draws=DRAWS)
    assert failed(report) == ["scale on a linear loss", "scale on a curved loss"]
    assert report.line("scale on a linear").numbers["mean"] == pytest.approx(1000, rel=0.5)
    assert "times too long" in report.line("scale on a linear").found
    report = audit(restored(factor=0.1), draws=DRAWS)
    assert "times too short" in report.line("scale on a linear").found


def test_other_dropout_masks_at_the_two_ends_are_found():
    report = audit(restored(keep=0.0), draws=DRAWS)
    assert failed(report) == ["the same function in all evaluations"]
    assert report.line("the same function").numbers["ratio"] > 10


def test_a_bias_is_found():
    def one_parameter_twice(model: nn.Module, loss: Loss) -> None:
        loss().backward()
        parameters(model)[0].grad.mul_(2)  # type: ignore[union-attr]

    assert "unbiased on a linear loss" in failed(audit(one_parameter_twice, draws=DRAWS))

    def signed(model: nn.Module, loss: Loss) -> None:
        loss().backward()
        for parameter in parameters(model):
            parameter.grad.sign_()  # type: ignore[union-attr]

    assert {"unbiased on a linear loss", "scale on a linear loss"} <= set(failed(audit(signed, draws=DRAWS)))


def test_a_direction_that_is_the_same_every_time_is_found():
    def function(model: nn.Module, loss: Loss) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            restored()(model, loss)

    report = audit(function, draws=DRAWS)
    assert report.line("unbiased on a linear").found == "all estimates are equal, and not parallel to the gradient"
    assert "unbiased on a linear loss" in failed(report)


def test_an_estimate_away_from_the_gradient_is_found():
    def ascent(model: nn.Module, loss: Loss) -> None:
        (-loss()).backward()

    report = audit(ascent, draws=DRAWS)
    assert "agreement: points away from the gradient" in failed(report)
    assert report.line("agreement").numbers["against"] == DRAWS


def test_what_fills_nothing_or_raises_is_one_failed_line():
    for function, message in [
        (lambda model, loss: None, r"vector.grad is not set"),
        (lambda model, loss: 1 / 0, "ZeroDivisionError"),
        (lambda model, loss: [setattr(p, "grad", torch.zeros_like(p)) for p in model.parameters()], "is frozen"),
    ]:
        report = audit(function, draws=DRAWS, name="theirs")
        assert failed(report) == ["fills .grad"]
        assert message in report.lines[0].found
        assert str(report).startswith("theirs   10 weights")
    with pytest.raises(BadInput, match="100 or more"):
        audit(ours(backprop()), draws=10)


@pytest.mark.parametrize("what", ["buffer", "mode"])
def test_a_changed_buffer_or_mode_is_found(what: str):
    def function(model: Any, loss: Loss) -> None:
        loss().backward()
        if what == "buffer":
            model.buffer.add_(1)
        else:
            model.train()

    report = audit(function, draws=100)
    assert failed(report) == ["nothing disturbed in float64", "nothing disturbed in float32"]


# ---- torchzero


def of_torchzero(module: Any) -> Any:
    """The estimate that a module of torchzero makes: the step of an optimizer with nothing but this module."""
    torchzero = pytest.importorskip("torchzero")
    made: dict[str, Any] = {}

    def function(model: nn.Module, loss: Loss) -> None:
        before = [p.detach().clone() for p in parameters(model)]
        if made.get("model") is not model:  # one optimizer for all steps: MeZO's directions follow from its counter
            made["model"], made["optimizer"] = model, torchzero.Optimizer(parameters(model), module())
        optimizer = made["optimizer"]

        def closure(backward: bool = True) -> Tensor:
            value = loss()
            if backward:
                optimizer.zero_grad()
                value.backward()
            return value

        optimizer.step(closure)
        with torch.no_grad():
            for p, b in zip(parameters(model), before, strict=True):
                p.grad = b - p
                p.copy_(b)

    return function


@pytest.mark.slow
def test_the_scale_error_of_torchzero_s_mezo_is_found():
    """torchzero 0.4.4: MeZO draws noise of variance h where its formula assumes h^2."""
    torchzero = pytest.importorskip("torchzero")
    report = audit(of_torchzero(lambda: torchzero.m.MeZO(h=1e-3, distribution="uniform")), draws=DRAWS)
    assert "scale on a linear loss" in failed(report)
    assert report.line("scale on a linear").numbers["mean"] == pytest.approx(1000, rel=0.5)
    for right in (lambda: torchzero.m.SPSA(h=1e-3), lambda: torchzero.m.ForwardGradient()):
        report = audit(of_torchzero(right), draws=1000)
        assert not [name for name in failed(report) if name.startswith(("scale", "unbiased", "agreement", "second"))]


# ---- the command

FILE = """
def exact(model, loss):
    loss().backward()

def double(model, loss):
    (2 * loss()).backward()
"""


def test_the_command_prints_the_report_and_fails_if_a_law_does(tmp_path: Path):
    (tmp_path / "theirs.py").write_text(FILE)
    ran = inside("audit", "theirs.py:exact", "--draws", "100", folder=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "nothing failed" in ran.stdout
    ran = inside("audit", "theirs:double", "--draws", "100", "--json", folder=tmp_path)
    assert ran.returncode == 1
    record = json.loads(ran.stdout)
    assert record["method"] == "theirs:double"
    assert {line["what"] for line in record["lines"] if line["verdict"] == "failed"} == {
        "scale on a linear loss",
        "scale on a curved loss",
    }
    ran = inside("audit", "theirs:absent", folder=tmp_path)
    assert ran.returncode == 2
    assert "defines no absent" in ran.stderr
