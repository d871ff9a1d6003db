"""Activity perturbation: the noise is on outputs, the gradient on weights, and its mean is backprop's."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counting import Flops
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.value import value
from gradcost.directions import Gaussian, Rademacher, Sphere
from gradcost.directions.direction import independent
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.activity import ActivityPerturbation
from gradcost.estimators.gradient import Concatenated
from gradcost.estimators.outputs import layers_of
from gradcost.estimators.presets import activity_perturbation
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp
from sampling import assert_mean
from snapshot import differences, snapshot
from tables import KEY as BUILD
from tables import OBJECTIVES, cross_entropy
from vectors import estimated, true_gradient

KEY = Key(73)
SLOPES = [Jvp(), CentralDifference(1e-4)]


@pytest.mark.parametrize("slope", SLOPES, ids=repr)
def test_over_all_sign_vectors_of_the_outputs_the_mean_is_backprop(slope: Any):
    """A layer of 3 inputs and 2 outputs on a batch of 2: four outputs, whose 16 sign vectors are met once each."""
    with seeded_generators(BUILD):
        model, batch = nn.Linear(3, 2).double(), (torch.randn(2, 3, dtype=torch.float64), torch.tensor([0, 1]))
    objective = Objective(model, cross_entropy)
    estimator = ActivityPerturbation(slope, Rademacher())
    keys: dict[tuple[float, ...], Key] = {}
    number = 0
    while len(keys) < 16:
        key = KEY.fold("draw", number)
        (seed,) = Rademacher().seeds(key, 1, objective.dimension)
        place = objective.leaves[0]._replace(dimension=4)
        signs = Rademacher().add(torch.zeros(2, 2), place, [Key(seed).fold("weight", 0).seed], [1.0])
        keys.setdefault(tuple(signs.flatten().tolist()), key)
        number += 1
    found = torch.stack([estimated(estimator, objective, batch, key) for key in keys.values()]).mean(0)
    grad = true_gradient(objective, batch, KEY)
    assert (found - grad).abs().max() <= (1e-12 if slope.exact else 1e-7) * grad.norm()


@value
class Signs(Rademacher):
    """Rademacher's directions, other ones for each `number` under one key: the evaluations' draws stay the same."""

    number: int = 0

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return independent(key.fold("draw", self.number), probes)


@value
class Normals(Gaussian):
    """The same of Gaussian ones."""

    number: int = 0

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return independent(key.fold("draw", self.number), probes)


@pytest.mark.parametrize(
    ("slope", "directions"), [(Jvp(), Normals), (CentralDifference(1e-4), Signs)], ids=["jvp", "central"]
)
@pytest.mark.parametrize(
    "name", ["tiny", "mlp", "attention", "cnn", pytest.param("transformer", marks=pytest.mark.slow)]
)
def test_it_is_unbiased(name: str, slope: Any, directions: Any):
    """Under one dropout mask, with leaves that are perturbed as weights beside the layers, and convolutions. A
    difference across the kinks of `cnn`'s ReLU sees another function, but hardly ever at this eps."""
    objective, batch = OBJECTIVES[name].make(torch.float64)
    grad, draws = true_gradient(objective, batch, KEY), 160 if name in ("cnn", "transformer") else 60
    drawn = torch.stack(
        [estimated(ActivityPerturbation(slope, directions(n), 4), objective, batch, KEY) for n in range(draws)]
    )
    assert_mean(drawn - grad, 0.0)
    along = drawn @ grad / grad.square().sum()
    assert_mean(along, 1.0)
    assert 5 * float(along.std()) / len(along) ** 0.5 < 0.9, "too few draws to say so"


@pytest.mark.slow
def test_the_second_moment_on_the_outputs_is_that_of_their_number():
    """With inputs whose Gram matrix is the identity, |g_W|^2 is |s u|^2: 1 + (m + 1)/n over m = 6
    outputs, as many as weights here."""
    model = nn.Linear(3, 2, bias=False).double()
    batch, pull = torch.eye(3, dtype=torch.float64), torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    objective = Objective(model, lambda model, batch: (model(batch) * pull.double()).sum())
    grad = true_gradient(objective, batch, KEY)
    for directions, more in ((Gaussian(), 1), (Rademacher(), -1)):
        estimator = ActivityPerturbation(directions=directions, probes=2)
        keys = [KEY.fold("draw", n) for n in range(800)]
        squares = [
            float(estimated(estimator, objective, batch, key).square().sum() / grad.square().sum()) for key in keys
        ]
        assert_mean(squares, 1 + (6 + more) / 2)


class Twice(nn.Module):
    """One layer called twice, a second one never, and a third with a bias alone to train."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.last.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


def test_each_call_of_a_layer_has_noise_of_its_own_and_they_add_up():
    with seeded_generators(BUILD):
        objective = Objective(Twice().double(), cross_entropy)
        batch = torch.randn(5, 4, dtype=torch.float64), torch.randint(2, (5,))
    grad = true_gradient(objective, batch, KEY)
    drawn = torch.stack(
        [estimated(ActivityPerturbation(probes=4), objective, batch, KEY.fold("draw", n)) for n in range(200)]
    )
    assert_mean(drawn - grad, 0.0)
    gradient = dict(ActivityPerturbation().estimate(objective, batch, KEY).gradient.leaves())
    assert bool(gradient["never.weight"].eq(0).all())
    assert set(gradient) == {"twice.weight", "twice.bias", "never.weight", "never.bias", "last.bias"}


def test_what_is_no_plain_layer_or_is_shared_is_perturbed_as_a_weight():
    objective, batch = OBJECTIVES["transformer"].make(torch.float64)
    inside = {leaf.name for leaves in layers_of(objective).values() for leaf in leaves}
    outside = {leaf.name for leaf in objective.leaves} - inside
    assert "blocks.0.qkv.weight" in inside
    assert {"embed.weight", "positions", "blocks.0.first.weight", "blocks.2.second.bias"} <= outside
    found = ActivityPerturbation(probes=3).estimate(objective, batch, KEY)
    assert isinstance(found.gradient, Concatenated)
    assert found.gradient.nbytes == 16 * 3 + sum(
        p.numel() * 8 for n, p in objective.model.named_parameters() if n in inside
    )
    attention, _ = OBJECTIVES["attention"].make()
    names = {leaf.name for leaves in layers_of(attention).values() for leaf in leaves}
    assert names == {"head.weight", "head.bias"}, "a MultiheadAttention reads its projection without calling it"


@pytest.mark.parametrize("slope", SLOPES, ids=repr)
def test_micro_batches_have_the_noise_of_the_whole(slope: Any):
    objective, batch = OBJECTIVES["attention"].make(torch.float64)
    estimator = ActivityPerturbation(slope, probes=2)
    whole = estimated(estimator, objective, batch, KEY)
    for parts in (2, 7):
        found = estimated(Accumulated(estimator, parts), objective, batch, KEY)
        assert (found - whole).abs().max() <= (1e-12 if slope.exact else 1e-10) * whole.abs().max()


@pytest.mark.parametrize("layers", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_a_frozen_layer_costs_what_passes_through_it_and_no_product_of_its_own(layers: int):
    width = 12
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    model[0].requires_grad_(False)
    objective = Objective(model, lambda model, batch: model(batch).square().mean())
    with Flops() as flops:
        ActivityPerturbation(probes=3).estimate(objective, torch.ones(6, width), KEY)
    # Tangents start behind the second layer.
    expected = 3 * (layers + layers - 2) + layers + layers - 1
    assert flops.total == 2 * 6 * width**2 * expected


def test_the_second_pass_has_one_layers_gradient_alive():
    objective, batch = OBJECTIVES["mlp"].make()
    last: list[weakref.ref[Tensor]] = []

    def use(name: str, gradient: Tensor) -> None:
        assert sum(reference() is not None for reference in last[:-1]) == 0  # a layer's bias and its weight
        last.append(weakref.ref(gradient))

    ActivityPerturbation(probes=2).stream(objective, batch, KEY, use)
    assert len(last) == len(objective.leaves)


def test_a_hook_of_the_users_is_a_part_of_the_function():
    """It comes after the noise: what it does to the output, it does to the noise."""
    objective, batch = OBJECTIVES["tiny"].make(torch.float64)
    objective.model.register_forward_hook(lambda module, args, output: output * 3)  # type: ignore[operator]
    objective.model.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    grad = true_gradient(objective, batch, KEY)
    before = snapshot(objective.model)
    keys = [KEY.fold("draw", n) for n in range(300)]
    drawn = torch.stack([estimated(ActivityPerturbation(probes=2), objective, batch, key) for key in keys])
    assert_mean(drawn - grad, 0.0)
    assert differences(before, snapshot(objective.model)) == []


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.layer.weight


def test_a_weight_that_is_read_without_its_layer_is_refused():
    objective = Objective(Reads(), lambda model, batch: model(batch).square().mean())
    before = snapshot(objective.model)
    estimator = ActivityPerturbation()
    reason = estimator.objection(objective, torch.ones(2, 3))
    assert reason is not None
    assert reason.startswith("`layer.weight` is read without calling its layer")
    with pytest.raises(ValueError, match="read without calling its layer"):
        estimator.estimate(objective, torch.ones(2, 3), KEY)
    assert differences(before, snapshot(objective.model)) == []
    assert torch.is_grad_enabled()


REFUSED: list[tuple[Any, str]] = [
    (lambda: ActivityPerturbation(probes=0), "1 or more, not 0."),
    (lambda: ActivityPerturbation(Jvp(together=2)), r"use Jvp\(\) or CentralDifference\(eps=0.001\)."),
    (lambda: ActivityPerturbation(ForwardDifference(1e-3)), "one probe at a time by a fixed length"),
    (lambda: ActivityPerturbation(CentralDifference(None)), "one probe at a time by a fixed length"),
    (lambda: ActivityPerturbation(directions=Sphere()), r"use Gaussian\(\) or Rademacher\(\)."),  # type: ignore
]


@pytest.mark.parametrize(("make", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_what_cannot_be_is_refused_in_a_sentence(make: Any, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_the_preset_is_the_papers():
    assert activity_perturbation(3) == ActivityPerturbation(Jvp(), Gaussian(), 3)
