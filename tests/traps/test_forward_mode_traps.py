"""Traps of forward mode in PyTorch: a tangent that is lost, doubled, or computed in vain."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from alive import Alive
from counting import Flops
from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective
from gradcost.directions import Gaussian, Rademacher
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import backprop, checkpointed, forward_gradient, mezo
from gradcost.estimators.probing import Probing
from gradcost.slopes import tangent_rules
from gradcost.slopes.slope import CentralDifference, Jvp, Slope
from tables import OBJECTIVES, Transformer, cross_entropy, seeded_generators
from vectors import assert_agrees, direction

KEY = Key(300)
JVPS: list[Slope] = [Jvp(), Jvp(together=2)]
EITHER = pytest.mark.parametrize("slope", JVPS, ids=repr)


def square_of(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).square().mean()


# ---- attention


class OperatorNames(TorchDispatchMode):
    """The names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def fused_attention_in(work: Callable[[], object]) -> bool:
    with OperatorNames() as operators:
        work()
    return any("attention" in name and "math" not in name for name in operators.names)


def test_attention_has_a_rule_for_jvp_and_runs_fused_for_other_methods():
    """The fused `scaled_dot_product_attention` has no forward rule (NotImplementedError). Methods that can
    use it should keep it."""
    objective, batch = OBJECTIVES["transformer"].make(torch.float64)
    objective.model.eval()
    for slope in JVPS:
        assert_agrees(objective, batch, slope)
        assert not fused_attention_in(lambda slope=slope: Probing(slope).estimate(objective, batch, KEY))
    for estimator in (backprop(), checkpointed(), mezo()):
        assert fused_attention_in(lambda estimator=estimator: estimator.estimate(objective, batch, KEY))


def test_the_switch_to_the_math_kernel_for_dropout_is_noted_once():
    objective, batch = OBJECTIVES["transformer"].make()
    tangent_rules.note_math_attention.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(3):
            forward_gradient(2).estimate(objective, batch, Key(number))
    notes = [warning for warning in caught if issubclass(warning.category, Note)]
    assert len(notes) == 1
    assert "math kernel" in str(notes[0].message)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, padding = batch
        return self.encoder(x, src_key_padding_mask=padding).masked_fill(padding[..., None], 0.0)


@EITHER
@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_is_differentiated_in_either_mode_with_padding(training: bool, slope: Slope):
    """In evaluation mode without gradients `TransformerEncoderLayer` takes a C++ path that loses tangents, and
    `TransformerEncoder` takes nested tensors."""
    with seeded_generators(KEY):
        model, x = Masked().double().train(training), torch.randn(3, 5, 8).double()
    padding = torch.arange(5)[None, :] >= torch.tensor([5, 3, 2])[:, None]
    objective = Objective(model, square_of)
    assert_agrees(objective, (x, padding), slope)


@EITHER
@pytest.mark.parametrize("trained", ["out_proj.weight", "out_proj.bias", "in_proj_weight"])
def test_a_parameter_that_only_a_parent_reads_gets_a_tangent(trained: str, slope: Slope):
    """`nn.MultiheadAttention` reads `out_proj.weight` without calling `out_proj`, so a hook on `out_proj` never fires
    and its direction would be silently skipped."""
    with seeded_generators(KEY):
        model, x = nn.MultiheadAttention(8, 2, batch_first=True).double().eval(), torch.randn(3, 5, 8).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == trained)
    objective = Objective(model, lambda model, batch: model(batch, batch, batch)[0].sin().mean())
    assert_agrees(objective, x, slope)
    assert_agrees(objective, x, CentralDifference(1e-4), tolerance=1e-5)


@EITHER
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU], ids=lambda kind: kind.__name__)
def test_the_weights_of_a_recurrent_layer_get_a_tangent(kind: type[nn.LSTM], slope: Slope):
    """`nn.LSTM` runs on `_flat_weights`, a list from construction: weights set by name are not in it."""
    with seeded_generators(KEY):
        model, x = kind(4, 5, num_layers=2).double(), torch.randn(6, 3, 4).double()
    objective = Objective(model, lambda model, batch: model(batch)[0].square().mean())
    assert_agrees(objective, x, slope)
    assert_agrees(objective, x, CentralDifference(1e-4), tolerance=1e-5)


# ---- matmuls and memory


@EITHER
def test_a_frozen_weight_costs_no_product_with_its_missing_tangent(slope: Slope):
    """PyTorch's own forward rule for F.linear does three matmuls, also where the weight is frozen."""
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(4))).requires_grad_(False)
    model[0].requires_grad_(True)
    objective, one = Objective(model, square_of), 2 * 4 * 16 * 16
    with Flops() as flops:
        Probing(slope, Gaussian(), 2).estimate(objective, torch.randn(4, 16), KEY)
    together = isinstance(slope, Jvp) and slope.together == 2
    # The forward, and a probe's tangent: of the trained weight once, and through each of the three frozen ones.
    assert flops.total == ((4 + 2 * (1 + 3)) if together else 2 * (4 + 1 + 3)) * one


@pytest.mark.parametrize("slope", [*JVPS, CentralDifference()], ids=repr)
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "attention", "direct"])
def test_a_slope_makes_no_graph(name: str, slope: Slope):
    """Without `no_grad` autograd keeps the graph of the tangents, and forward mode needs the memory of backprop."""
    objective, batch = OBJECTIVES[name].make()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        found = Probing(slope, Gaussian(), 2).estimate(objective, batch, KEY)
    assert saved == []
    assert found.slopes is not None
    for tensor in (found.loss, found.slopes):
        assert tensor.grad_fn is None
        assert not tensor.requires_grad


@pytest.mark.parametrize("slope", [*JVPS, CentralDifference()], ids=repr)
def test_memory_does_not_grow_with_depth(slope: Slope):
    """Forward mode holds a few layers' activations at any depth; backprop holds all of them."""

    def peak(layers: int, estimator: Estimator) -> int:
        model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(layers)))
        objective = Objective(model, square_of)
        batch = torch.ones(500, 64)
        with Alive() as alive:
            estimator.stream(objective, batch, KEY, lambda name, gradient: None)
        return alive.peak

    assert peak(12, Probing(slope, Gaussian(), 2)) == peak(4, Probing(slope, Gaussian(), 2))
    kept = 500 * 64 * 4  # the output of a Tanh
    assert peak(12, backprop()) == peak(4, backprop()) + 8 * kept


# ---- tied, detached


@EITHER
def test_a_tied_weight_gets_its_tangent_at_every_use(slope: Slope):
    """Setting weights by name is silently wrong where two names share one tensor: 301 instead of 140."""
    with seeded_generators(KEY):
        model, words = Transformer(layers=1).double(), torch.randint(11, (4, 6))
    assert model.head.weight is model.embed.weight
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "embed.weight")
    objective = Objective(model, cross_entropy)
    assert len(objective.leaves) == 1
    assert_agrees(objective, (words[:, :-1], words[:, 1:]), slope)
    assert_agrees(objective, (words[:, :-1], words[:, 1:]), CentralDifference(1e-4), tolerance=1e-4)


class Cuts(nn.Module):
    """Half of the path runs through `.data`, which no derivative follows."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + F.linear(x, self.other.weight.data, self.other.bias.detach())


@EITHER
def test_forward_mode_and_backprop_both_ignore_a_path_through_data_or_detach(slope: Slope):
    """For weights that are cut, a finite difference follows the declared derivative too. For activations it follows
    the function: comparing the two finds the cut, and a Note names it."""
    with seeded_generators(KEY):
        objective, x = Objective(Cuts().double(), lambda m, b: m(b).sin().mean()), torch.randn(5, 4).double()
    assert_agrees(objective, x, slope)
    assert_agrees(objective, x, CentralDifference(1e-5), tolerance=1e-6)
    objective = Objective(objective.model, lambda m, b: (m(b) * m(b).detach()).sin().mean())
    assert_agrees(objective, x, slope)
    with pytest.warns(Note, match="detach"), pytest.raises(AssertionError):
        assert_agrees(objective, x, CentralDifference(1e-5), tolerance=0.05)


@pytest.mark.parametrize(
    "cut",
    [
        lambda model, batch: model(batch).data.square().mean(),
        lambda model, batch: torch.tensor(model(batch).square().mean().item()),
        lambda model, batch: F.linear(batch, model[0].weight.data).square().mean(),
        lambda model, batch: model(batch).argmax(-1).float().mean(),
    ],
    ids=["data", "item", "the weight's data", "argmax"],
)
def test_a_missing_tangent_is_an_error_with_its_cause(cut: Callable[[nn.Module, Tensor], Tensor]):
    """`.data` and `.detach()` in a forward give a tangent of None or 0, silently."""
    with seeded_generators(KEY):
        objective, x = Objective(nn.Sequential(nn.Linear(4, 4)), cut), torch.randn(5, 4)
    for estimator in (forward_gradient(), backprop()):
        with pytest.raises(ValueError, match=r"differentiable path \(\.data, \.detach\(\)") as refused:
            estimator.estimate(objective, x, KEY)
        assert "does not depend on the trainable parameters" in str(refused.value)


# ---- dropout, BatchNorm


@pytest.mark.parametrize("probes", [1, 3])
def test_probes_that_share_a_forward_use_the_mask_of_other_methods(probes: int):
    """`func.jvp` draws another dropout mask than eager code where a tensor is not contiguous."""
    seen: list[Tensor] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        dropped = F.dropout(model(batch).transpose(0, 2), 0.5)
        seen.append(dropped)
        return dropped.square().mean()

    with seeded_generators(KEY):
        objective, x = Objective(nn.Linear(6, 6).double(), loss), torch.randn(3, 4, 6).double()
    plain = objective.evaluate(x, KEY)
    found, _ = Jvp(together=probes).measure(objective, x, KEY, Gaussian(), range(probes))
    assert float(found) == pytest.approx(float(plain), rel=1e-14)
    assert_agrees(objective, x, Jvp(together=probes))


@EITHER
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_with_running_statistics_is_differentiated_in_either_mode(training: bool, slope: Slope):
    """`func.jvp` fails on BatchNorm that tracks statistics in training mode."""
    objective, batch = OBJECTIVES["cnn"].make(torch.float64)
    for number in range(3):
        objective.advance(batch, Key(number))
    objective.model.train(training)
    assert_agrees(objective, batch, slope)


def test_tangents_are_those_of_one_direction_and_not_of_two():
    """`load_state_dict` of duals doubles the tangents."""
    model = nn.Linear(3, 1, bias=False).double()
    objective, x = Objective(model, lambda model, batch: model(batch).sum()), torch.ones(1, 3).double()
    expected = [float(direction(objective, Rademacher(), seed).sum()) for seed in (4, 5)]
    for slope in JVPS:
        _, slopes = slope.measure(objective, x, KEY, Rademacher(), [4, 5])
        assert slopes.tolist() == expected


def test_a_loss_that_vmap_refuses_takes_one_direction_per_pass():
    """As an operation of an extension that has a forward-mode rule and no batching rule."""
    with seeded_generators(KEY):
        model, x = nn.Linear(4, 4), torch.randn(6, 4)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        if torch._C._functorch.maybe_current_level() is not None:  # pyright: ignore[reportAttributeAccessIssue]
            raise RuntimeError("Batching rule not implemented for an operation.")
        return model(x).square().sum()

    objective = Objective(model, loss)
    with pytest.warns(Note, match="do not share a forward pass here: Batching rule not implemented"):
        shared = forward_gradient(4).estimate(objective, x, KEY)
    for _ in range(2):
        alone = forward_gradient(4, together=1).estimate(objective, x, KEY)
        assert torch.equal(shared.slopes, alone.slopes)  # type: ignore[arg-type]
        shared = forward_gradient(4).estimate(objective, x, KEY)


class Doubled(torch.autograd.Function):
    """A custom function of the older form: it works in forward mode, but not under torch.func transforms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return 2 * tangents[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return 2 * gradients[0]


def test_custom_functions_of_the_older_form_take_one_direction_per_pass():
    with seeded_generators(KEY):
        model, x = nn.Linear(4, 4), torch.randn(6, 4)
    objective = Objective(model, lambda model, x: Doubled.apply(model(x)).square().mean())
    shared = forward_gradient(4).estimate(objective, x, KEY)
    alone = forward_gradient(4, together=1).estimate(objective, x, KEY)
    assert torch.equal(shared.slopes, alone.slopes)  # type: ignore[arg-type]
