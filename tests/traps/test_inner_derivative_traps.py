"""Traps of losses that use autograd inside: derivatives in the loss, torch.func transforms, parts under no_grad.

A slope is <grad, z> with torch's gradient of the loss, or the loss is refused in a sentence.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradcost
from counting import Flops
from gradcost.checkpointing.policies import Blocks, Segments, Selective
from gradcost.core.errors import GradcostError, Unsupported
from gradcost.core.evaluation.autograd_use import known_use
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective
from gradcost.directions import Gaussian, LowRank
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.presets import activity_perturbation, backprop, forward_gradient, hizoo, mezo
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.instruments import Bytes, Operations, TrainingStep
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp, Slope
from gradcost.training.optimizers import SGD
from snapshot import differences, snapshot

KEY = Key(9)
Loss = Callable[[nn.Module, Any], Tensor]


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BATCH = numbers(1, 6, 8), numbers(2, 6, 8)


class Normed(nn.Module):
    """A layer whose output is divided by its size, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        with torch.no_grad():
            size = y.square().mean().sqrt() * self.linear.weight.norm()
        return y / size


def linear() -> nn.Module:
    return nn.Linear(8, 8)


def net(*layers: Callable[[], nn.Module]) -> nn.Module:
    """A small network with the same weights at every call."""
    with seeded_generators(Key(0)):
        return nn.Sequential(*(layer() for layer in layers or (linear,)), nn.Tanh(), nn.Linear(8, 8)).double()


def squares(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


# ---- losses that differentiate


def physics_informed(model: nn.Module, batch: Any) -> Tensor:
    x = batch[0].clone().requires_grad_()
    (u_x,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
    return (u_x + u_xx - batch[1]).square().mean()


def causal(model: nn.Module, batch: Any) -> Tensor:
    """Residuals weighted by constants that depend on the weights, as causal physics-informed networks do."""
    x = batch[0].clone().requires_grad_()
    (u_x,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    residual = (u_x - batch[1]).square().mean(1)
    with torch.no_grad():
        weight = torch.exp(-residual)
    return (weight * residual).mean()


def forces(model: nn.Module, batch: Any) -> Tensor:
    """As energy-force models do: the gradient is on inside, whatever it is outside."""
    with torch.enable_grad():
        x = batch[0].clone().requires_grad_()
        energy = model(x).square().sum()
        force = -torch.autograd.grad(energy, x, create_graph=True)[0]
        return (force - batch[1]).square().mean()


def forces_if_enabled(model: nn.Module, batch: Any) -> Tensor:
    x = batch[0].clone().requires_grad_(torch.is_grad_enabled())
    energy = model(x).square().sum()
    force = -torch.autograd.grad(energy, x, create_graph=True)[0] if torch.is_grad_enabled() else torch.zeros_like(x)
    return (force - batch[1]).square().mean()


def gradient_penalty(model: nn.Module, batch: Any) -> Tensor:
    share = torch.rand(6, 1, dtype=torch.float64)
    x = (share * batch[0] + (1 - share) * batch[1]).requires_grad_()
    (slopes,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return model(batch[0]).mean() + (slopes.norm(dim=1) - 1).square().mean()


def by_backward(model: nn.Module, batch: Any) -> Tensor:
    x = batch[0].clone().requires_grad_()
    model(x).sum().backward(inputs=[x], create_graph=True)
    assert x.grad is not None
    return (x.grad - batch[1]).square().mean()


def adversarial(model: nn.Module, batch: Any) -> Tensor:
    """The attack is no part of the gradient."""
    x = batch[0].clone().requires_grad_()
    (slopes,) = torch.autograd.grad(model(x).square().sum(), x)
    return (model(batch[0] + 0.1 * slopes.sign()) - batch[1]).square().mean()


def jacobian(model: nn.Module, batch: Any) -> Tensor:
    found: Any = torch.autograd.functional.jacobian(lambda x: model(x).sum(0), batch[0], create_graph=True)
    return found.square().mean()


def jvp_of_input(model: nn.Module, batch: Any) -> Tensor:
    out, change, *_ = torch.func.jvp(model, (batch[0],), (batch[1],))
    return (out - change).square().mean() + model(batch[1]).square().mean()


def func_grad(model: nn.Module, batch: Any) -> Tensor:
    slopes: Any = torch.func.vmap(torch.func.grad(lambda x: model(x).square().sum()))(batch[0])
    return (slopes - batch[1]).square().mean()


def laplacian(model: nn.Module, batch: Any) -> Tensor:
    def of(x: Tensor) -> Any:
        return torch.func.hessian(lambda x: model(x).sum())(x).diagonal().sum()

    return torch.func.vmap(of)(batch[0]).square().mean()


def meta_learning(model: nn.Module, batch: Any) -> Tensor:
    weights = dict(model.named_parameters())

    def inner(weights: Any) -> Tensor:
        return (torch.func.functional_call(model, weights, (batch[0],)) - batch[1]).square().mean()

    slopes = torch.func.grad(inner)(weights)
    fast = {name: weight - 0.1 * slopes[name] for name, weight in weights.items()}
    return (torch.func.functional_call(model, fast, (batch[1],)) - batch[0]).square().mean()


DERIVATIVES: list[Loss] = [physics_informed, causal, forces, forces_if_enabled, gradient_penalty, by_backward]
DERIVATIVES += [adversarial, jacobian]
TRANSFORMS: list[Loss] = [jvp_of_input, func_grad, laplacian, meta_learning]

# ---- losses with constant parts


def teacher(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        target = model(batch[1])
    return (model(batch[0]) - target).square().mean()


def q_learning(model: nn.Module, batch: Any) -> Tensor:
    @torch.no_grad()
    def best(x: Tensor) -> Tensor:
        return model(x).max(1).values

    return F.mse_loss(model(batch[0])[:, 0], 1 + 0.9 * best(batch[1]))


def switched(model: nn.Module, batch: Any) -> Tensor:
    torch.set_grad_enabled(False)
    target = model(batch[1])
    torch.set_grad_enabled(True)
    return (model(batch[0]) - target).square().mean()


def inference(model: nn.Module, batch: Any) -> Tensor:
    with torch.inference_mode():
        target = model(batch[1])
    return (model(batch[0]) - target.clone()).square().mean()


def enabled_inside(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        target = model(batch[1])
        with torch.enable_grad():
            out = model(batch[0])
    return (out - target).square().mean()


def checkpointed_student(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        target = model(batch[1])
    out: Any = checkpoint(model, batch[0], use_reentrant=False)
    return (out - target).square().mean()


def read_weight(model: nn.Module, batch: Any) -> Tensor:
    assert isinstance(model[0], nn.Linear)  # type: ignore[index]
    with torch.no_grad():
        size = model[0].weight.norm()  # type: ignore[index]
    return (model(batch[0]) / size - batch[1]).square().mean()


def derivative_of_constant(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        _, change, *_ = torch.func.jvp(model, (batch[0],), (batch[1],))
    return (model(batch[0]) - change).square().mean()


CONSTANTS: list[Loss] = [teacher, q_learning, switched, inference, enabled_inside, checkpointed_student, read_weight]
CONSTANTS += [derivative_of_constant]
SITUATIONS: dict[str, tuple[Loss, Callable[[], nn.Module]]] = {
    loss.__name__: (loss, net) for loss in DERIVATIVES + TRANSFORMS + CONSTANTS
} | {
    "constant_in_a_layer": (squares, lambda: net(Normed)),
    "normalised_in_a_layer": (forces, lambda: net(linear, lambda: nn.LayerNorm(8))),
    "spectral_norm": (squares, lambda: net(lambda: nn.utils.parametrizations.spectral_norm(linear()))),
    "dropout": (physics_informed, lambda: net(linear, lambda: nn.Dropout(0.3))),
}
EVERY = pytest.mark.parametrize("name", SITUATIONS)


def true_gradient(objective: Objective) -> tuple[float, dict[str, Tensor]]:
    """The loss and its gradient by torch's autograd, under the key."""
    weights = [leaf.parameter for leaf in objective.leaves]
    for _, loss, *_ in objective.losses(BATCH, KEY):
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        gradient = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
        names = [leaf.name for leaf in objective.leaves]
        return float(loss.detach()), dict(zip(names, gradient, strict=True))
    raise AssertionError


def make(name: str) -> Objective:
    loss, model = SITUATIONS[name]
    return Objective(model(), loss)


def size_of(gradient: dict[str, Tensor]) -> float:
    return sum(float(g.square().sum()) for g in gradient.values()) ** 0.5


def worst_slope(estimator: Probing, objective: Objective, gradient: dict[str, Tensor]) -> float:
    """The largest error of a slope, relative to |grad|."""
    assert estimator.objection(objective, BATCH) is None
    found = estimator.estimate(objective, BATCH, KEY)
    assert isinstance(found.gradient, Seeded)
    assert found.slopes is not None
    errors = []
    for seed, slope in zip(found.gradient.seeds, found.slopes, strict=True):
        z = dict(Seeded(objective, found.gradient.directions, (seed,), (1.0,)).leaves())
        errors.append(abs(float(slope) - sum(float((z[n] * g).sum()) for n, g in gradient.items())))
    return max(errors) / size_of(gradient)


@EVERY
@pytest.mark.parametrize("slope", [Jvp(), Jvp(together=2)], ids=repr)
def test_a_jvp_is_the_inner_product_with_the_gradient_of_a_loss_that_uses_autograd(name: str, slope: Slope):
    """Custom rules that leave tangents out of the inner backward, and tangents that no_grad does not stop."""
    _, gradient = true_gradient(make(name))
    assert worst_slope(Probing(slope, Gaussian(), 2), make(name), gradient) < 1e-10


@EVERY
@pytest.mark.parametrize("slope", [CentralDifference(1e-5), ForwardDifference(1e-7)], ids=repr)
def test_a_difference_holds_constant_what_backprop_holds_constant(name: str, slope: Slope):
    _, gradient = true_gradient(make(name))
    assert worst_slope(Probing(slope, Gaussian(), 2), make(name), gradient) < 1e-5


@pytest.mark.parametrize("name", ["physics_informed", "jvp_of_input", "teacher", "constant_in_a_layer"])
def test_low_rank_directions_of_a_loss_that_uses_autograd(name: str):
    _, gradient = true_gradient(make(name))
    assert worst_slope(Probing(Jvp(), LowRank(1), 2), make(name), gradient) < 1e-10


@EVERY
@pytest.mark.parametrize(
    "estimator", [Reverse(), Reverse(Blocks()), Reverse(Segments(2)), Reverse(Selective())], ids=repr
)
def test_recomputation_of_a_loss_that_uses_autograd(name: str, estimator: Estimator):
    loss, gradient = true_gradient(make(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        found = estimator.estimate(make(name), BATCH, KEY)
    assert float(found.loss) == pytest.approx(loss, rel=1e-12)
    for leaf, tensor in found.gradient.leaves():
        assert torch.allclose(tensor, gradient[leaf], rtol=1e-12, atol=1e-14)


@EVERY
@pytest.mark.parametrize("estimator", [forward_gradient(2), mezo(1e-4)], ids=repr)
def test_an_estimate_of_such_a_loss_changes_nothing_and_repeats(name: str, estimator: Estimator):
    objective = make(name)
    before = snapshot(objective.model)
    first = estimator.estimate(objective, BATCH, KEY)
    assert differences(before, snapshot(objective.model)) == []
    assert torch._C._is_fwd_grad_enabled()
    second = estimator.estimate(objective, BATCH, KEY)
    assert torch.equal(first.loss, second.loss)
    assert first.slopes is not None
    assert second.slopes is not None
    assert torch.equal(first.slopes, second.slopes)
    assert first.loss.grad_fn is None
    assert objective.evaluate(BATCH, KEY).grad_fn is None


@pytest.mark.parametrize("loss", [physics_informed, teacher, forces])
def test_micro_batches_of_a_loss_that_uses_autograd(loss: Loss):
    objective = Objective(net(), loss).in_micro_batches(3)
    whole = backprop().estimate(Objective(net(), loss), BATCH, KEY)
    found = backprop().estimate(objective, BATCH, KEY)
    assert float(found.loss) == pytest.approx(float(whole.loss), rel=1e-12)
    gradient = dict(whole.gradient.leaves())
    for estimator, bound in ((forward_gradient(2), 1e-10), (mezo(1e-5), 1e-5)):
        assert isinstance(estimator, Probing)
        assert worst_slope(estimator, objective, gradient) < bound


@pytest.mark.parametrize("name", ["physics_informed", "causal", "teacher", "constant_in_a_layer", "spectral_norm"])
@pytest.mark.parametrize("estimator", [backprop(), mezo(1e-3), forward_gradient()], ids=repr)
def test_forecasts_of_a_loss_that_uses_autograd(name: str, estimator: Estimator):
    told = gradcost.forecast(estimator, make(name), BATCH, SGD(0.1))
    step = TrainingStep(make(name), BATCH, estimator, SGD(0.1))
    found = gradcost.measure(step, Bytes(), Operations())
    assert found.memory is not None
    assert found.counts is not None
    assert told.peak == found.memory.peak
    assert told.flops == found.counts.flops


def test_a_plan_knows_that_backprop_serves_a_loss_that_differentiates():
    plan = gradcost.plan(make("physics_informed"), BATCH, 1 << 20)
    row = next(row for row in plan.rows if row.method == "backprop()")
    assert row.forecast is not None


# ---- what is examined


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (squares, set()),
        (physics_informed, {"differentiates"}),
        (teacher, {"has_constants", "sets_mode"}),
        (causal, {"differentiates", "has_constants", "reads_moved", "sets_mode"}),
        (read_weight, {"has_constants", "sets_mode"}),
        (func_grad, {"transforms", "sets_mode"}),
        (jvp_of_input, {"transforms", "forward_mode"}),
    ],
)
def test_what_a_loss_does_with_autograd_is_found_once(loss: Loss, expected: set[str]):
    calls: list[bool] = []

    def counted(model: nn.Module, batch: Any) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return loss(model, batch)

    objective = Objective(net(), counted)
    mezo(1e-3).estimate(objective, BATCH, KEY)
    use = known_use(objective)
    assert use is not None
    assert {name for name, holds in use._asdict().items() if holds} == expected
    calls.clear()
    mezo(1e-3).estimate(Objective(objective.model, counted), BATCH, KEY)
    assert len(calls) == 2 + ("reads_moved" in expected)
    assert set(calls) == {use.needs_gradients}


def test_a_log_under_no_grad_leaves_an_estimate_as_it_is():
    logged: list[float] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            logged.append(float(model(batch[0]).square().mean()))
        return squares(model, batch)

    plain, found = Objective(net(), squares), Objective(net(), loss)
    assert activity_perturbation().objection(found, BATCH) is None
    for estimator in (mezo(1e-3), forward_gradient(), hizoo()):
        assert estimator.objection(found, BATCH) is None
        one, other = estimator.estimate(plain, BATCH, KEY), estimator.estimate(found, BATCH, KEY)
        assert torch.equal(one.loss, other.loss)
        for (_, a), (_, b) in zip(one.gradient.leaves(), other.gradient.leaves(), strict=True):
            assert torch.equal(a, b)
    assert logged


def test_a_loss_that_is_under_no_grad_as_a_whole_is_followed_by_a_difference():
    """A metric has no gradient in torch; a zero-order method is made for it."""

    @torch.no_grad()
    def metric(model: nn.Module, batch: Any) -> Tensor:
        return squares(model, batch)

    found = mezo(1e-3).estimate(Objective(net(), metric), BATCH, KEY)
    expected = mezo(1e-3).estimate(Objective(net(), squares), BATCH, KEY)
    assert found.slopes is not None
    assert expected.slopes is not None
    assert torch.equal(found.slopes, expected.slopes)


def test_a_loss_that_leaves_torch_is_followed_by_a_difference():
    """`.numpy()` fails with gradients on."""

    def black_box(model: nn.Module, batch: Any) -> Tensor:
        return torch.tensor(float((model(batch[0]).numpy() ** 2).mean()), dtype=torch.float64)

    assert mezo(1e-3).estimate(Objective(net(), black_box), BATCH, KEY).slopes is not None


def test_a_note_says_that_a_difference_follows_a_detached_activation():
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - model(batch[1]).detach()).square().mean()

    with pytest.warns(Note, match=r"uses `\.detach\(\)`.*Compute it under torch\.no_grad\(\)"):
        mezo(1e-3).estimate(Objective(net(), loss), BATCH, KEY)


# ---- refusals


def penalised_if_tracked(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch[0])
    return out.square().mean() + (model[0].weight.square().sum() if out.requires_grad else 0)  # type: ignore[index]


@pytest.mark.parametrize("estimator", [forward_gradient(), mezo(1e-3)], ids=repr)
def test_a_loss_that_depends_on_requires_grad_of_an_activation_is_refused(estimator: Estimator):
    objective = Objective(net(), penalised_if_tracked)
    objection = estimator.objection(objective, BATCH)
    assert objection is not None
    assert "its code reads `requires_grad`" in objection
    with pytest.raises(Unsupported, match="has another value where weights require no gradient"):
        estimator.estimate(objective, BATCH, KEY)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (physics_informed, "differentiates the model"),
        (func_grad, r"applies a torch\.func transform"),
        (teacher, r"reads weights or activations under torch\.no_grad\(\)"),
    ],
)
def test_activity_perturbation_refuses_a_loss_that_uses_autograd(loss: Loss, reason: str):
    """The layers' inputs have no graph, so the inner derivative would fail or miss the weights."""
    objective = Objective(net(), loss)
    objection = activity_perturbation().objection(objective, BATCH)
    assert objection is not None
    with pytest.raises(Unsupported, match=reason):
        activity_perturbation().estimate(objective, BATCH, KEY)


def test_no_grad_inside_a_transform_of_a_difference_is_refused():
    def loss(model: nn.Module, batch: Any) -> Tensor:
        def of(x: Tensor) -> Tensor:
            y = model(x)
            with torch.no_grad():
                size = y.square().mean()
            return (y / size).sum()

        return torch.func.grad(of)(batch[0]).square().mean()

    with pytest.raises(Unsupported, match=r"under torch\.no_grad\(\).* applies torch\.func transforms"):
        mezo(1e-3).estimate(Objective(net(), loss), BATCH, KEY)


def test_inference_mode_around_an_estimate_is_named():
    """Forward mode is off there; the refusal blamed a custom autograd.Function."""
    objective = Objective(net(), squares)
    with torch.inference_mode(), pytest.raises(Unsupported, match=r"torch\.inference_mode\(\) is on around"):
        forward_gradient().estimate(objective, BATCH, KEY)
    with torch.inference_mode(), pytest.raises(GradcostError, match=r"torch\.inference_mode\(\) is on around"):
        backprop().estimate(objective, BATCH, KEY)


class Logger(nn.Module):
    def forward(self, x: Tensor) -> None:
        self.shape = x.shape


class Fallback(nn.Module):
    """A module that handles the error of a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = Fails()

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.fails(x)
        except RuntimeError:
            return x


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("a fast path that is not there")


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * ctx.saved_tensors[0].cos()


class Culprit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Sine.apply(x)  # type: ignore[return-value]


class Watched(nn.Module):
    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.linear, self.culprit = first, nn.Linear(8, 8), Culprit()

    def forward(self, x: Tensor) -> Tensor:
        self.first(x)
        return self.culprit(self.linear(x))


@pytest.mark.parametrize("first", [Logger, Fallback])
def test_a_refusal_names_the_module_that_raised_and_not_one_that_returned_none(first: Callable[[], nn.Module]):
    objective = Objective(Watched(first()).double(), squares)
    try:
        raise ValueError("an error that the caller handles")
    except ValueError:
        objection = forward_gradient().objection(objective, BATCH)
    assert objection is not None
    assert objection.startswith("`culprit` cannot be differentiated forward, at `return Sine.apply(x)")


@pytest.mark.parametrize("probes", [1, 2])
def test_inputs_that_require_a_gradient_for_checkpointing_do_not_stop_forward_mode(probes: int):
    """`enable_input_require_grads` of transformers: a hook calls requires_grad_ on the embeddings."""
    model = net()
    model[0].register_forward_hook(lambda module, args, output: output.requires_grad_())  # type: ignore[operator]
    _, gradient = true_gradient(Objective(model, squares))
    estimator = Probing(Jvp(together=probes), Gaussian(), 2)
    assert worst_slope(estimator, Objective(model, squares), gradient) < 1e-10


@pytest.mark.parametrize("name", ["teacher", "constant_in_a_layer", "physics_informed", "jvp_of_input"])
@pytest.mark.parametrize("estimator", [forward_gradient(2), mezo(1e-5)], ids=repr)
def test_a_first_estimate_under_a_dispatch_mode_is_right_too(name: str, estimator: Probing):
    """A profiler around the whole training: no check runs there unless the loss needs it."""
    _, gradient = true_gradient(make(name))
    with Flops() as flops:
        error = worst_slope(estimator, make(name), gradient)
    assert flops.total > 0
    assert error < (1e-10 if estimator.slope.exact else 1e-5)
