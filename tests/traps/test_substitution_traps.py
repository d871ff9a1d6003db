"""Weights that a loss reads by unusual ways: served, or refused with the name of the parameter or the module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from gradcost import (
    Gaussian,
    Jvp,
    Key,
    Objective,
    Probing,
    Reverse,
    Unsupported,
    backprop,
    forward_gradient,
    mezo,
    spsa,
)
from gradcost.checkpointing.policies import Blocks
from gradcost.estimators.gradient import Seeded
from gradcost.slopes import CentralDifference

KEY = Key(5)
SLOPES = [
    pytest.param(forward_gradient(), 1e-10, id="jvp"),
    pytest.param(Probing(Jvp(together=2), Gaussian(), 2), 1e-10, id="jvp-together"),
    pytest.param(spsa(eps=1e-5), 1e-6, id="spsa"),
    pytest.param(mezo(eps=1e-5), 1e-6, id="mezo"),
]
REFUSED = [forward_gradient(), mezo(eps=1e-5)]


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BATCH = numbers(6, 4), numbers(6, 4, seed=2)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()


def squares(model: Any, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def check_slopes(estimator: Any, model: nn.Module, loss: Callable[..., Tensor], tolerance: float) -> None:
    """Each slope is <grad, z>, with torch's gradient on a copy of the model."""
    reference = copy.deepcopy(model)
    value = loss(reference, BATCH)
    value.backward()
    objective = Objective(model, loss)
    estimate = estimator.estimate(objective, BATCH, KEY)
    assert float(estimate.loss) == pytest.approx(float(value), rel=1e-6)
    expected = []
    for seed in estimate.gradient.seeds:
        z = dict(Seeded(objective, estimate.gradient.directions, (seed,), (1.0,)).leaves())
        products = [(z[n] * p.grad).sum() for n, p in reference.named_parameters() if p.grad is not None]
        expected.append(float(sum(products)))
    assert estimate.slopes.tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance)


def refusal(estimator: Any, model: nn.Module, loss: Callable[..., Tensor] = squares) -> str:
    """The estimate and the objection refuse, in the same sentence; evaluation and model stay as they were."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objective = Objective(model, loss)
    with pytest.raises(Unsupported) as refused:
        estimator.estimate(objective, BATCH, KEY)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    if isinstance(estimator.slope, CentralDifference):
        assert estimator.objection(objective, BATCH) == str(refused.value)
    return str(refused.value)


# ---- one parameter in a module and in one inside it


class Head(nn.Module):
    """The head of transformers' BertForMaskedLM: its bias is that of its decoder, too."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(4, 4)
        self.bias = self.decoder.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x).tanh() + self.bias


class Recursive(Head):
    """Reads the bias before its decoder has run, between two calls, and after them."""

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.decoder(x * self.bias) + self.bias.sin()) + self.bias


@pytest.mark.parametrize("make", [Head, Recursive])
@pytest.mark.parametrize(("estimator", "tolerance"), SLOPES)
def test_a_parameter_of_a_module_and_of_its_child(estimator: Any, tolerance: float, make: type[nn.Module]):
    torch.manual_seed(0)
    model: Any = make().double()
    check_slopes(estimator, model, squares, tolerance)
    assert model.bias is model.decoder.bias


# ---- functional_call and torch.func


class Scaled(nn.Module):
    """Calls a module with weights that it computes from the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(4, 4), nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(self.inner, {n: p * self.scale for n, p in self.inner.named_parameters()}, (x,))


def adapted(model: nn.Module, batch: Any) -> Tensor:
    """One step of gradient descent inside the loss."""
    weights: dict[str, Any] = dict(model.named_parameters())
    slopes = torch.func.grad(lambda w: (functional_call(model, w, (batch[0],)) - batch[1]).square().mean())(weights)
    fast = {n: w - 0.1 * slopes[n] for n, w in weights.items()}
    return (functional_call(model, fast, (batch[0],)) - 0.5 * batch[1]).square().mean()


def adapted_twice(model: nn.Module, batch: Any) -> Tensor:
    """A derivative of a derivative with respect to the weights."""
    weights: dict[str, Any] = dict(model.named_parameters())

    def inner(w: dict[str, Tensor]) -> Tensor:
        slopes = torch.func.grad(lambda v: functional_call(model, v, (batch[0],)).square().mean())(w)
        return sum((slope.square().sum() for slope in slopes.values()), torch.zeros(()))

    curvature = torch.func.grad(inner)(weights)
    return sum((c.square().sum() for c in curvature.values()), torch.zeros(())) + squares(model, batch)


def along_weights(model: nn.Module, batch: Any) -> Tensor:
    """A Jacobian-vector product with respect to the weights."""
    weights: dict[str, Any] = dict(model.named_parameters())
    ones = {name: torch.ones_like(weight) for name, weight in weights.items()}
    found = torch.func.jvp(lambda w: functional_call(model, w, (batch[0],)), (weights,), (ones,))
    return found[1].square().mean()


def of_own_weights(model: nn.Module, batch: Any) -> Tensor:
    return (functional_call(model, dict(model.named_parameters()), (batch[0],)) - batch[1]).square().mean()


@pytest.mark.parametrize(("estimator", "tolerance"), SLOPES)
@pytest.mark.parametrize("loss", [adapted, adapted_twice, of_own_weights], ids=lambda loss: loss.__name__)
def test_a_loss_that_calls_the_model_with_derived_weights(loss: Any, estimator: Any, tolerance: float):
    check_slopes(estimator, net(), loss, tolerance)


@pytest.mark.parametrize(("estimator", "tolerance"), SLOPES)
def test_a_module_that_calls_its_child_with_derived_weights(estimator: Any, tolerance: float):
    torch.manual_seed(0)
    check_slopes(estimator, Scaled().double(), squares, tolerance)


@pytest.mark.parametrize(("estimator", "tolerance"), SLOPES[2:])
def test_a_derivative_along_the_weights_in_the_loss(estimator: Any, tolerance: float):
    check_slopes(estimator, net(), along_weights, tolerance)


class Ensemble(nn.Module):
    """The weights of five members are stacked in one parameter, and vmap runs all members."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(numbers(5, 4, 4)), nn.Parameter(numbers(4, 5, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        def member(weight: Tensor, bias: Tensor) -> Tensor:
            return torch.tanh(F.linear(x, weight, bias))

        return torch.func.vmap(member, in_dims=(0, 1))(self.weight, self.bias).mean(0)


def stacked(model: nn.Module, batch: Any) -> Tensor:
    """The members are modules of their own; the loss stacks their parameters, and calls the first member."""
    members = list(model.children())
    weights = {n: torch.stack([dict(m.named_parameters())[n] for m in members]) for n in ("weight", "bias")}
    outputs = torch.func.vmap(lambda w: functional_call(members[0], w, (batch[0],)))(weights)
    return (outputs.mean(0) - batch[1]).square().mean()


def per_member(model: nn.Module, batch: Any) -> Tensor:
    """The stacked parameters are vmapped where the model does not run, with a derivative for each member."""
    weights: dict[str, Any] = dict(model.named_parameters())

    def member(w: dict[str, Tensor]) -> Tensor:
        return (torch.tanh(F.linear(batch[0], w["weight"], w["bias"])) - batch[1]).square().mean()

    in_dims = ({"weight": 0, "bias": 1},)
    slopes = torch.func.vmap(torch.func.grad(member), in_dims=in_dims)(weights)
    return torch.func.vmap(member, in_dims=in_dims)(weights).mean() + slopes["weight"].square().mean()


@pytest.mark.parametrize(("estimator", "tolerance"), SLOPES)
@pytest.mark.parametrize("loss", [squares, per_member], ids=lambda loss: loss.__name__)
def test_an_ensemble_with_stacked_parameters(loss: Any, estimator: Any, tolerance: float):
    check_slopes(estimator, Ensemble(), loss, tolerance)


@pytest.mark.parametrize(("estimator", "tolerance"), SLOPES)
def test_an_ensemble_that_the_loss_stacks(estimator: Any, tolerance: float):
    torch.manual_seed(0)
    check_slopes(estimator, nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]).double(), stacked, tolerance)


@pytest.mark.parametrize(("estimator", "tolerance"), SLOPES)
def test_a_frozen_module_that_is_called_with_weights_of_another(estimator: Any, tolerance: float):
    torch.manual_seed(0)
    shell, source = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)
    model = nn.ModuleList([shell, source]).double()

    def loss(model: Any, batch: Any) -> Tensor:
        return (functional_call(model[0], dict(model[1].named_parameters()), (batch[0],)) - batch[1]).square().mean()

    check_slopes(estimator, model, loss, tolerance)


def adapted_by_autograd(model: nn.Module, batch: Any) -> Tensor:
    """One step of gradient descent inside the loss, by torch.autograd.grad."""
    weights: dict[str, Any] = dict(model.named_parameters())
    slopes = torch.autograd.grad(squares(model, batch), list(weights.values()), create_graph=True)
    fast = {n: w - 0.1 * slope for (n, w), slope in zip(weights.items(), slopes, strict=True)}
    return (functional_call(model, fast, (batch[0],)) - 0.5 * batch[1]).square().mean()


def gradient_penalty(model: nn.Module, batch: Any) -> Tensor:
    loss = squares(model, batch)
    slopes = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return loss + sum((slope.square().sum() for slope in slopes), torch.zeros(()))


@pytest.mark.parametrize(("estimator", "tolerance"), SLOPES)
@pytest.mark.parametrize("loss", [adapted_by_autograd, gradient_penalty], ids=lambda loss: loss.__name__)
def test_a_derivative_by_autograd_grad_with_respect_to_parameters(loss: Any, estimator: Any, tolerance: float):
    check_slopes(estimator, net(), loss, tolerance)


def sharpness_aware(model: nn.Module, batch: Any) -> Tensor:
    """The loss at weights that are moved along the gradient, which is a constant."""
    weights: dict[str, Any] = dict(model.named_parameters())
    slopes = torch.autograd.grad(squares(model, batch), list(weights.values()))
    norm = torch.stack([slope.norm() for slope in slopes]).norm()
    moved = {n: w + 0.1 * slope / norm for (n, w), slope in zip(weights.items(), slopes, strict=True)}
    return (functional_call(model, moved, (batch[0],)) - batch[1]).square().mean()


def adversarial(model: nn.Module, batch: Any) -> Tensor:
    """The loss at inputs that are moved along the gradient, which is a constant."""
    x = batch[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(squares(model, (x, batch[1])), x)
    return squares(model, (batch[0] + slope, batch[1]))


@pytest.mark.parametrize(("estimator", "tolerance"), SLOPES)
@pytest.mark.parametrize("loss", [sharpness_aware, adversarial], ids=lambda loss: loss.__name__)
def test_a_derivative_without_create_graph_is_a_constant(loss: Any, estimator: Any, tolerance: float):
    check_slopes(estimator, net(), loss, tolerance)


@pytest.mark.parametrize("estimator", REFUSED)
def test_a_loss_that_calls_backward_is_refused_and_leaves_grads(estimator: Any):
    def loss(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        squares(model, (x, batch[1])).backward()
        return squares(model, (batch[0] + x.grad, batch[1]))

    model = net()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert "the loss calls backward()" in refusal(estimator, model, loss)
    assert all(parameter.grad is not None and bool(parameter.grad.eq(1).all()) for parameter in model.parameters())


class StateStacked(nn.Module):
    """The stacked state of several members, called by a member on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        members = [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(3)]
        weights, _ = torch.func.stack_module_state(members)  # pyright: ignore[reportArgumentType]
        self.names = list(weights)
        self.weights = nn.ParameterList([nn.Parameter(weight.detach()) for weight in weights.values()])
        self.bases = [copy.deepcopy(members[0]).to("meta")]

    def forward(self, x: Tensor) -> Tensor:
        weights = dict(zip(self.names, self.weights, strict=True))
        return torch.func.vmap(lambda w: functional_call(self.bases[0], w, (x,)))(weights).mean(0)


@pytest.mark.parametrize(("estimator", "tolerance"), SLOPES)
def test_an_ensemble_by_stack_module_state(estimator: Any, tolerance: float):
    torch.manual_seed(0)
    check_slopes(estimator, StateStacked().double(), squares, tolerance)


# ---- code that torch functions do not show


@torch.jit.script
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    y = x + bias
    return y * 0.5 * (1.0 + torch.tanh(0.79788456 * y))


class WithoutBias(nn.Linear):
    """A linear layer that leaves its bias to whoever calls it."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.t()


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = WithoutBias(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(bias_gelu(self.up(x), self.up.bias))


class View(nn.Module):
    """Keeps a view of its weight that was made at construction."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers(4, 4))
        self.head = nn.Linear(4, 4).double()
        self.transposed = [self.weight.t()]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x @ self.transposed[0])


class Scripted(nn.Module):
    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.body: Any = torch.jit.script(nn.Linear(4, 4).double().requires_grad_(trained))
        self.head = nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("estimator", REFUSED)
def test_a_scripted_helper_that_is_given_a_bias(estimator: Any):
    torch.manual_seed(0)
    assert "`up.bias` is read where" in refusal(estimator, Fused().double())


@pytest.mark.parametrize("estimator", REFUSED)
def test_a_scripted_helper_that_returns_no_number_at_other_weights(estimator: Any):
    @torch.jit.script
    def checked(x: Tensor, bias: Tensor) -> Tensor:
        assert bool((bias == 0).all())
        return x + bias

    class Checked(Fused):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(checked(self.up(x), self.up.bias))

    torch.manual_seed(0)
    model = Checked().double()
    nn.init.zeros_(model.up.bias)
    assert "`up.bias` is read where" in refusal(estimator, model)


@pytest.mark.parametrize("estimator", REFUSED)
def test_a_view_that_was_made_at_construction(estimator: Any):
    message = refusal(estimator, View())
    assert "`transposed[0]` was computed from `weight` before the forward pass" in message


class ViewInClosure(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4).double()
        turned = self.layer.weight.t()
        self.call = lambda x: x @ turned

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x) + self.layer.bias


class ViewInBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4).double()
        self.register_buffer("turned", self.layer.weight.t())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.get_buffer("turned") + self.layer.bias


@pytest.mark.parametrize("model", [ViewInClosure, ViewInBuffer])
def test_a_view_in_a_closure_or_a_buffer(model: Any):
    torch.manual_seed(0)
    made = model()
    assert "`turned` was computed from `layer.weight`" in refusal(mezo(eps=1e-5), made)
    exact = dict(backprop().estimate(Objective(made, squares), BATCH, KEY).gradient.leaves())
    squares(made, BATCH).backward()
    assert torch.equal(exact["layer.weight"], made.layer.weight.grad)


@pytest.mark.parametrize("estimator", REFUSED)
def test_a_scripted_module_with_trainable_parameters(estimator: Any):
    assert "`body` is compiled" in refusal(estimator, Scripted(trained=True))
    model = Scripted(trained=True)
    model.body = torch.jit.trace(nn.Linear(4, 4).double(), BATCH[0])
    assert "`body` is compiled" in refusal(estimator, model)


@pytest.mark.parametrize(("estimator", "tolerance"), SLOPES[2:])
def test_a_frozen_scripted_module(estimator: Any, tolerance: float):
    torch.manual_seed(0)
    objective = Objective(Scripted(trained=False), squares)
    estimate = estimator.estimate(objective, BATCH, KEY)
    z = dict(Seeded(objective, estimate.gradient.directions, estimate.gradient.seeds, (1.0,)).leaves())
    slopes = torch.autograd.grad(squares(objective.model, BATCH), [leaf.parameter for leaf in objective.leaves])
    expected = sum(float((z[leaf.name] * s).sum()) for leaf, s in zip(objective.leaves, slopes, strict=True))
    assert float(estimate.slopes) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("estimator", REFUSED)
@pytest.mark.parametrize("where", ["model", "block", "in place", "forward"])
def test_compiled_code_is_refused_by_the_estimate_itself(where: str, estimator: Any):
    model: Any = net()
    name = {"model": "OptimizedModule", "block": "0", "in place": "Sequential", "forward": "0"}[where]
    if where == "model":
        model = torch.compile(model, backend="eager")
    elif where == "block":
        model[0] = torch.compile(model[0], backend="eager")
    elif where == "in place":
        model.compile(backend="eager")
    else:
        model[0].forward = torch.compile(model[0].forward, backend="eager")
    assert f"`{name}` is compiled" in refusal(estimator, model)


def test_a_compiled_loss_is_refused():
    message = refusal(mezo(eps=1e-5), net(), torch.compile(squares, backend="eager"))
    assert "the loss function is compiled" in message


def test_a_module_that_is_compiled_after_the_first_estimate_is_refused():
    model = net()
    objective = Objective(model, squares)
    mezo(eps=1e-5).estimate(objective, BATCH, KEY)
    model.compile(backend="eager")
    with pytest.raises(Unsupported, match="is compiled"):
        mezo(eps=1e-5).estimate(objective, BATCH, KEY)


# ---- weights that hooks make


@pytest.mark.parametrize(("estimator", "tolerance"), SLOPES[2:])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_a_weight_that_a_hook_makes_in_each_forward(estimator: Any, tolerance: float):
    torch.manual_seed(0)
    layers = [nn.utils.weight_norm(nn.Linear(4, 4)), nn.Tanh(), nn.utils.weight_norm(nn.Linear(4, 4))]
    model: Any = nn.Sequential(*layers).double()
    weight = model[0].weight.detach().clone()
    objective = Objective(model, squares)
    estimate = estimator.estimate(objective, BATCH, KEY)
    assert torch.equal(model[0].weight, weight)
    z = dict(Seeded(objective, estimate.gradient.directions, estimate.gradient.seeds, (1.0,)).leaves())
    slopes = torch.autograd.grad(squares(model, BATCH), [leaf.parameter for leaf in objective.leaves])
    expected = sum(float((z[leaf.name] * s).sum()) for leaf, s in zip(objective.leaves, slopes, strict=True))
    assert float(estimate.slopes) == pytest.approx(expected, rel=tolerance)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_a_hook_made_weight_that_a_penalty_reads_before_the_forward_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4).double()))

    def loss(model: Any, batch: Any) -> Tensor:
        return model[0].weight.square().sum() + squares(model, batch)

    message = refusal(mezo(eps=1e-5), model, loss)
    assert "`0.weight` was computed from `0.weight_" in message


# ---- weights that are constants for backprop


class Normalised(nn.Linear):
    """Divides by a size of its weight that is taken as a constant."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight / self.weight.detach().norm(), self.bias)


def self_distilled(model: nn.Module, batch: Any) -> Tensor:
    """The teacher is the model itself, called with detached weights."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return (model(batch[0]) - functional_call(model, weights, (batch[1],))).square().mean()


def copied_teacher(model: nn.Module, batch: Any) -> Tensor:
    teacher = copy.deepcopy(model)
    return (model(batch[0]) - teacher(batch[1]).detach()).square().mean()


def data_penalty(model: nn.Module, batch: Any) -> Tensor:
    sizes = [(parameter * parameter.data).sum() for parameter in model.parameters()]
    return squares(model, batch) + torch.stack(sizes).sum()


@pytest.mark.parametrize(("estimator", "tolerance"), SLOPES)
@pytest.mark.parametrize("loss", [self_distilled, copied_teacher, data_penalty], ids=lambda loss: loss.__name__)
def test_detached_weights_are_constants(loss: Any, estimator: Any, tolerance: float):
    check_slopes(estimator, net(), loss, tolerance)


@pytest.mark.parametrize(("estimator", "tolerance"), SLOPES)
def test_a_module_that_detaches_its_own_weight(estimator: Any, tolerance: float):
    torch.manual_seed(0)
    check_slopes(estimator, nn.Sequential(Normalised(4, 4), nn.Tanh(), nn.Linear(4, 4)).double(), squares, tolerance)


def test_blocks_inside_a_compiled_model_are_not_recomputed_silently():
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]
    model: Any = nn.Sequential(*blocks).double()
    model.compile(backend="eager")
    with pytest.raises(Unsupported, match="Compile the blocks instead"):
        Reverse(Blocks()).estimate(Objective(model, squares), BATCH, KEY)


def test_a_module_has_its_own_weights_again_as_soon_as_it_has_run():
    """Otherwise the perturbed weights of all layers would be in memory at once."""
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.LayerNorm(8))
    own = [dict(module._parameters) for module in model]
    held = []

    def loss(model: Any, batch: Tensor) -> Tensor:
        for module, parameters in zip(model, own, strict=True):
            batch = module(batch)
            held.append(all(module._parameters[name] is p for name, p in parameters.items()))
        return batch.square().mean()

    mezo().estimate(Objective(model, loss), torch.randn(2, 1, 6), KEY)
    assert all(held)


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.actor, self.critic = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()


def freeze_by_method(critic: nn.Module, train: bool) -> None:
    critic.requires_grad_(train)


def freeze_by_attribute(critic: nn.Module, train: bool) -> None:
    for parameter in critic.parameters():
        parameter.requires_grad = train


@pytest.mark.parametrize("freeze", [freeze_by_method, freeze_by_attribute])
@pytest.mark.parametrize(("estimator", "tolerance"), SLOPES)
def test_parameters_that_the_loss_freezes_for_one_of_its_terms(estimator: Any, tolerance: float, freeze: Any):
    """Soft actor-critic and pix2pix: the actor's term gives the critic no gradient."""

    def loss(model: Any, batch: Any) -> Tensor:
        freeze(model.critic, False)
        term = model.critic(torch.tanh(model.actor(batch[0]))).mean()
        freeze(model.critic, True)
        return (model.critic(batch[0]) - batch[1]).square().mean() - term

    check_slopes(estimator, ActorCritic(), loss, tolerance)
