"""Traps of forward mode in PyTorch: unsupported models are refused, with the module and an alternative."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective
from gradcost.directions import Gaussian
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import backprop, forward_gradient, mezo
from gradcost.estimators.probing import Probing
from gradcost.slopes.slope import CentralDifference, Jvp, Slope
from snapshot import differences, snapshot
from tables import seeded_generators
from vectors import assert_agrees

KEY = Key(300)
JVPS: list[Slope] = [Jvp(), Jvp(together=2)]
EITHER = pytest.mark.parametrize("slope", JVPS, ids=repr)


def square_of(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).square().mean()


# ---- the model's checkpointing


class Adapted(nn.Module):
    """A frozen layer with a trained one beside it (LoRA), run under torch's checkpointing."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.base, self.adapter, self.reentrant = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), reentrant
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: torch.tanh(self.base(x) + self.adapter(x)), x, use_reentrant=self.reentrant)  # type: ignore[return-value]


def test_reentrant_checkpointing_is_refused_and_the_message_states_the_setting():
    """Its autograd.Function turns forward mode off inside. The tangents of an adapter whose input has none are lost
    silently: a slope of 3.28 instead of 4.48."""
    with seeded_generators(KEY):
        objective, x = Objective(Adapted(reentrant=True).double(), square_of), torch.randn(3, 6).double()
    for estimator in (forward_gradient(), forward_gradient(3)):
        with pytest.raises(ValueError, match=r"its tangent would be lost\. Use use_reentrant=False"):
            estimator.estimate(objective, x, KEY)
        objection = estimator.objection(objective, x)
        assert objection is not None
        assert objection.startswith("`adapter` cannot be differentiated forward, at `")
        assert "use_reentrant=False" in objection
    assert Probing(Jvp(together=2), Gaussian(), 2).objection(objective, x) is not None
    assert mezo().objection(objective, x) is None
    with pytest.raises(ValueError, match="the loss has no graph"):
        backprop().estimate(objective, x, KEY)  # loses the same path, for the same reason


@EITHER
def test_checkpointing_without_reentry_is_differentiated(slope: Slope):
    with seeded_generators(KEY):
        objective, x = Objective(Adapted(reentrant=False).double(), square_of), torch.randn(3, 6).double()
    assert_agrees(objective, x, slope)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("estimator", [backprop(), forward_gradient(2), mezo()], ids=repr)
def test_the_checkpointing_of_a_transformers_model_is_off_during_an_estimate(estimator: Estimator, reentrant: bool):
    """`gradient_checkpointing_enable()` fails under forward mode, and would turn "backprop" into checkpointing."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=31, n_positions=16, n_embd=8, n_layer=2, n_head=2, use_cache=False)
    with seeded_generators(KEY):
        model, words = GPT2LMHeadModel(config).train(), torch.randint(31, (2, 7))
    calls: list[bool] = []
    block: Any = model.transformer.h[0]
    block.mlp.register_forward_hook(lambda *_: calls.append(block.gradient_checkpointing))
    objective = Objective(model, lambda model, batch: model(input_ids=batch, labels=batch).loss)
    estimator.estimate(objective, words, KEY)  # the first use examines the loss, in more forward passes
    calls.clear()
    plain = estimator.estimate(objective, words, KEY)
    once = len(calls)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    before = snapshot(model)
    with pytest.warns(Note, match=r"is on in this GPT2LMHeadModel, and off inside an estimate.*checkpointed\(\)"):
        found = estimator.estimate(objective, words, KEY)
    assert len(calls) == 2 * once, "no block ran twice"
    assert set(calls) == {False}
    assert model.is_gradient_checkpointing
    assert torch.equal(found.loss, plain.loss)
    for (_, one), (_, other) in zip(plain.gradient.leaves(), found.gradient.leaves(), strict=True):
        assert torch.equal(one, other)
    assert differences(before, snapshot(model)) == []


# ---- refusals


class Exponential(torch.autograd.Function):
    """As in bitsandbytes, Liger and similar: a backward, and no jvp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        out = x.exp()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * ctx.saved_tensors[0]


class Activation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Exponential.apply(x)  # type: ignore[return-value]


@EITHER
def test_an_operation_without_a_forward_rule_is_refused_with_module_line_and_alternative(slope: Slope):
    with seeded_generators(KEY):
        inner = nn.Sequential(nn.Linear(4, 4), Activation())
        model, x = nn.Sequential(nn.Linear(4, 4), inner, nn.Linear(4, 2)).double(), torch.randn(5, 4).double()
    objective = Objective(model, square_of)
    before = snapshot(model)
    objection = Probing(slope, Gaussian(), 2).objection(objective, x)
    assert objection is not None
    assert objection.startswith("`1.1` cannot be differentiated forward, at `return Exponential.apply(x)")
    assert objection.endswith("otherwise mezo(), which needs no derivative, or backprop().")
    assert differences(before, snapshot(model)) == []
    assert mezo().objection(objective, x) is None
    assert backprop().objection(objective, x) is None
    assert_agrees(objective, x, CentralDifference(1e-5), tolerance=1e-5)


def test_a_refusal_names_the_loss_itself():
    objective = Objective(nn.Linear(4, 4), lambda model, batch: Exponential.apply(model(batch)).mean())  # type: ignore[union-attr]
    objection = forward_gradient().objection(objective, torch.ones(2, 4))
    assert objection is not None
    assert objection.startswith("the loss cannot be differentiated forward, at `")


class Plain(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(4, 4), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x))


def compiled_outside() -> nn.Module:
    return torch.compile(Plain(nn.Linear(4, 4)), backend="eager")  # type: ignore[return-value]


def compiled_inside() -> nn.Module:
    return Plain(torch.compile(nn.Linear(4, 4), backend="eager"))  # type: ignore[arg-type]


def compiled_in_place() -> nn.Module:
    model = Plain(nn.Linear(4, 4))
    model.inner.compile(backend="eager")
    return model


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return Plain(torch.jit.script(nn.Linear(4, 4)))


@pytest.mark.parametrize("make", [compiled_outside, compiled_inside, compiled_in_place, scripted])
@pytest.mark.parametrize("estimator", [forward_gradient(), mezo()], ids=repr)
def test_compiled_code_is_refused_because_it_does_not_see_substituted_weights(
    estimator: Probing, make: Callable[[], nn.Module]
):
    """Compiled code called on duals drops tangents in some releases, and Dynamo may ignore a custom jvp."""
    model = make()
    objective = Objective(model, square_of)
    objection = estimator.objection(objective, torch.ones(2, 4))
    assert objection is not None
    assert "is compiled, and compiled code does not see substituted weights" in objection
    assert "or use backprop()" in objection
    assert backprop().objection(objective, torch.ones(2, 4)) is None
