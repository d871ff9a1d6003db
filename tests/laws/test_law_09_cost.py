"""Law 9. What an estimate costs is an exact integer: counted in forward matmuls of one layer, for L linear layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from counting import Flops
from gradcost.checkpointing.policies import Blocks, Segments
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import Coordinates, Gaussian, Rademacher
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp
from tables import ESTIMATORS

KEY = Key(9)
WIDTH, BATCH = 12, 6
ONE = 2 * BATCH * WIDTH * WIDTH  # the FLOPs of one layer's forward


def chain(layers: int, between: Callable[[], nn.Module] | None = None, bias: bool = False) -> nn.Sequential:
    """`layers` square linear layers, each followed by `between` if there is one."""
    modules: list[nn.Module] = []
    for _ in range(layers):
        modules.append(nn.Linear(WIDTH, WIDTH, bias=bias))
        if between is not None:
            modules.append(between())
    return nn.Sequential(*modules)


def matmuls(estimator: Estimator, model: nn.Module) -> float:
    """Return the cost of an estimate in forward passes of one layer."""
    batch = torch.randn(BATCH, WIDTH)
    objective = Objective(model, lambda model, batch: model(batch).square().mean(), data=lambda: [batch])
    return counted(lambda: estimator.estimate(objective, batch, KEY))


def counted(work: Callable[[], object]) -> float:
    with Flops() as flops:
        work()
    return flops.total / ONE


@pytest.mark.parametrize("layers", [2, 3, 6])
def test_a_forward_costs_one_matmul_a_layer(layers: int):
    objective = Objective(chain(layers), lambda model, batch: model(batch).square().mean())
    assert counted(lambda: objective.evaluate(torch.randn(BATCH, WIDTH), KEY)) == layers


@pytest.mark.parametrize("layers", [2, 3, 6])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_row_of_the_table_costs_what_it_states(name: str, layers: int):
    assert matmuls(ESTIMATORS[name].estimator, chain(layers)) == ESTIMATORS[name].matmuls(layers)


@pytest.mark.parametrize("layers", [1, 4])
def test_the_first_layers_input_needs_neither_a_gradient_nor_a_tangent(layers: int):
    assert matmuls(Reverse(), chain(layers)) == 3 * layers - 1
    assert matmuls(Probing(Jvp()), chain(layers)) == 3 * layers - 1


@pytest.mark.parametrize("probes", [1, 2, 5])
def test_probes_cost_the_same_each_unless_they_share_a_forward(probes: int):
    layers = 4
    assert matmuls(Probing(Jvp(), Gaussian(), probes), chain(layers)) == probes * (3 * layers - 1)
    shared = matmuls(Probing(Jvp(together=probes), Rademacher(), probes), chain(layers))
    assert shared == layers + probes * (2 * layers - 1)
    assert matmuls(Probing(CentralDifference(), Coordinates(), probes), chain(layers)) == probes * 2 * layers
    assert matmuls(Probing(ForwardDifference(), Gaussian(), probes), chain(layers)) == (probes + 1) * layers


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("between", [None, nn.ReLU, nn.Tanh], ids=["linear", "relu", "tanh"])
def test_a_bias_and_an_activation_cost_no_matmul(between: type[nn.Module] | None, bias: bool):
    layers = 4
    made = chain(layers, between, bias)
    assert matmuls(Reverse(), made) == 3 * layers - 1
    assert matmuls(Probing(Jvp()), made) == 3 * layers - 1
    assert matmuls(Probing(Jvp(together=2), Gaussian(), 2), made) == layers + 2 * (2 * layers - 1)
    assert matmuls(Probing(CentralDifference()), made) == 2 * layers


@pytest.mark.parametrize("layers", [3, 6])
@pytest.mark.parametrize("trained", [0, 1, 2])
def test_frozen_weights_cost_no_matmul_for_a_tangent_or_a_gradient(layers: int, trained: int):
    """One layer trains: it costs its own product, and each later layer one for its input. PyTorch's own forward rule
    for F.linear would multiply by zeros in place of each frozen weight's missing tangent."""
    model = chain(layers).requires_grad_(False)
    model[trained].requires_grad_(True)
    later = layers - 1 - trained
    assert matmuls(Reverse(), model) == layers + 1 + later
    assert matmuls(Probing(Jvp()), model) == layers + 1 + later
    assert matmuls(Probing(Jvp(together=3), Gaussian(), 3), model) == layers + 3 * (1 + later)
    assert matmuls(Probing(CentralDifference()), model) == 2 * layers


def test_a_trained_bias_on_a_frozen_layer_costs_the_input_products_of_later_layers():
    model = chain(4, bias=True).requires_grad_(False)
    model[1].bias.requires_grad_(True)  # type: ignore[union-attr]
    assert matmuls(Reverse(), model) == 4 + 2
    assert matmuls(Probing(Jvp()), model) == 4 + 2


@pytest.mark.parametrize("layers", [4, 7])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_segment_of_bare_layers_recomputes_all_but_its_last(layers: int, count: int):
    """The last layer's output is the region's output; its backward needs only its input. A segment of m layers
    costs m - 1 more, so `count` of them cost layers - count more."""
    assert matmuls(Reverse(Segments(count)), chain(layers)) == 3 * layers - 1 + layers - count
    assert matmuls(Reverse(Blocks()), chain(layers)) == 3 * layers - 1


@pytest.mark.parametrize("between", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("layers", [4, 7])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_segment_that_ends_in_an_activation_recomputes_all(count: int, layers: int, between: type[nn.Module]):
    """Tanh and ReLU save their result, which is the region's output and not its input."""
    assert matmuls(Reverse(Segments(count)), chain(layers, between)) == 4 * layers - 1
    assert matmuls(Reverse(Blocks()), chain(layers, between)) == 4 * layers - 1


def test_a_frozen_segment_before_the_first_trained_layer_is_not_recomputed():
    layers = 6
    model = chain(layers, nn.Tanh).requires_grad_(False)
    model[8:].requires_grad_(True)  # the last two layers
    # 2 weight gradients, 1 input gradient (the first trained layer needs none), 2 layers recomputed.
    assert matmuls(Reverse(Blocks()), model) == layers + 3 + 2


@pytest.mark.parametrize("parts", [2, 3])
def test_micro_batches_cost_what_the_whole_costs(parts: int):
    for estimator in (Reverse(), Reverse(Segments(2)), Probing(Jvp(2), Gaussian(), 3), Probing(CentralDifference())):
        assert matmuls(Accumulated(estimator, parts), chain(4)) == matmuls(estimator, chain(4))


def test_a_replay_and_a_message_cost_no_matmul():
    objective = Objective(chain(3), lambda model, batch: model(batch).square().mean())
    estimate = Probing(Jvp(), Gaussian(), 2).estimate(objective, torch.randn(BATCH, WIDTH), KEY)
    assert counted(estimate.gradient.write) == 0


class Tied(nn.Module):
    """One weight used by three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(nn.functional.linear(x, self.weight))
        return x


def test_a_tied_weight_costs_its_uses():
    assert matmuls(Reverse(), Tied()) == 3 * 3 - 1
    assert matmuls(Probing(Jvp()), Tied()) == 3 * 3 - 1
    assert matmuls(Probing(CentralDifference()), Tied()) == 2 * 3


def test_the_count_sees_every_kind_of_matmul():
    """The oracle itself: mm, addmm, bmm, baddbmm and in-place addmm_."""
    x, w = torch.randn(BATCH, WIDTH), torch.randn(WIDTH, WIDTH)
    assert counted(lambda: x @ w) == 1
    assert counted(lambda: torch.addmm(x, x, w)) == 1
    assert counted(lambda: torch.zeros(BATCH, WIDTH).addmm_(x, w)) == 1
    assert counted(lambda: torch.bmm(x.expand(3, -1, -1), w.expand(3, -1, -1))) == 3
    assert counted(lambda: torch.baddbmm(x.expand(3, -1, -1), x.expand(3, -1, -1), w.expand(3, -1, -1))) == 3
