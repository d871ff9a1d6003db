"""One group of leaves at a time: the identity as the second moment, the stated scatter, and what it saves."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counting import Flops
from gradcost.core.key import Key
from gradcost.core.memory_events import observe
from gradcost.core.objective import Objective
from gradcost.directions import Coordinates, Directions, Gaussian, Rademacher, SparseDirections, Sphere
from gradcost.directions.groups import EachBlock, EachLeaf, EachModule, Grouping
from gradcost.directions.layerwise import Layerwise
from gradcost.directions.masks import Masked, Named
from gradcost.estimators.probing import Probing
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp, Slope
from sampling import assert_mean
from tables import OBJECTIVES
from vectors import direction, estimated, matrix, true_gradient

KEY = Key(410)
GROUPINGS: list[Grouping] = [EachLeaf(), EachModule(), EachBlock()]


def resolve(objective: Objective, by: Grouping, directions: Directions | None = None) -> Directions:
    return Layerwise(directions or Gaussian(), by).resolve(objective, KEY, None)[0]


@pytest.mark.parametrize("directions", [Gaussian(), Rademacher(), Sphere(), Coordinates()], ids=repr)
@pytest.mark.parametrize("probe", [0, 2])
def test_the_second_moment_is_the_identity(directions: Directions, probe: int):
    tiny, _ = OBJECTIVES["tiny"].make(torch.float64)
    assert Layerwise(directions).unbiased
    found = resolve(tiny, EachLeaf(), directions)
    seeds = [found.seeds(KEY.fold("draw", number), probe + 1, 8)[probe] for number in range(5000)]
    z = matrix(tiny, found, seeds)
    assert_mean(z.unsqueeze(1) * z.unsqueeze(2) - torch.eye(8), 0.0)


@pytest.mark.parametrize("by", GROUPINGS, ids=repr)
def test_a_direction_is_in_one_group_and_groups_are_sampled_without_replacement(by: Grouping):
    made, _ = OBJECTIVES["transformer"].make()
    group_of = by.groups(made)
    count = len(set(group_of.values()))
    found, place = resolve(made, by), torch.cat([torch.full((leaf.parameter.numel(),), group_of[leaf.name])
                                                 for leaf in made.leaves])  # fmt: skip
    seeds = found.seeds(KEY, 2 * count, made.dimension)
    assert all(0 <= seed < 1 << 64 for seed in seeds)
    assert len(set(seeds)) == 2 * count
    touched = [set(place[direction(made, found, seed) != 0].tolist()) for seed in seeds]
    for half in (touched[:count], touched[count:]):
        assert sorted(group for groups in half for group in groups) == list(range(count))
    inner = direction(made, Gaussian(), seeds[0] // count)
    here = place == touched[0].pop()
    assert direction(made, found, seeds[0])[here] == pytest.approx(count**0.5 * inner[here], rel=1e-6)


def test_groups_are_leaves_modules_or_blocks():
    made, _ = OBJECTIVES["mlp"].make()
    names = [leaf.name for leaf in made.leaves]
    assert names == ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
    assert EachLeaf().groups(made) == dict(zip(names, range(6), strict=True))
    assert EachModule().groups(made) == dict(zip(names, [0, 0, 1, 1, 2, 2], strict=True))
    assert EachBlock().groups(made) == EachModule().groups(made)
    large, _ = OBJECTIVES["transformer"].make()
    found = EachBlock().groups(large)
    assert Counter(found.values()) == {0: 2, 1: 12, 2: 12, 3: 12}  # the embedding, tied to the head, and positions
    assert found["embed.weight"] == found["positions"] == 0
    free, _ = OBJECTIVES["direct"].make()
    assert set(EachBlock().groups(free).values()) == {0}, "a model without blocks is one group"
    few = made.only(["4.weight", "0.bias"])
    assert EachBlock().groups(few) == {"0.bias": 0, "4.weight": 1}, "no group is empty"


@pytest.mark.slow
@pytest.mark.parametrize("probes", [1, 2, 3])
def test_it_scatters_as_it_states(probes: int):
    """(G / n) sum_g (d_g + 2) |grad_g|^2 for Gaussian directions, n <= G = 3: groups of 12, 3 and 5 weights."""
    linear, batch = OBJECTIVES["linear"].make(torch.float64)
    grad = true_gradient(linear, batch, KEY)
    # Leaves lie in a row: free, layer.weight, layer.bias.
    parts = grad.split([leaf.parameter.numel() for leaf in linear.leaves])
    assert sorted(len(part) for part in parts) == [3, 5, 12]
    stated = 3 / probes * sum((len(part) + 2) * float(part.square().sum()) for part in parts)
    estimator = Probing(Jvp(), Layerwise(), probes)
    keys = [KEY.fold("draw", number) for number in range(3000)]
    squares = torch.tensor([float(estimated(estimator, linear, batch, key).square().sum()) for key in keys])
    assert_mean(squares.double(), stated)
    assert 5 * float(squares.std()) / 3000**0.5 < 0.3 * stated, "too few draws to say so"


SLOPES = [
    Jvp(),
    *(pytest.param(s, marks=pytest.mark.slow) for s in (Jvp(3), CentralDifference(0.5), ForwardDifference(0.5))),
]


@pytest.mark.parametrize("slope", SLOPES, ids=repr)
def test_the_mean_is_the_gradient(slope: Slope):
    linear, batch = OBJECTIVES["linear"].make(torch.float64)
    estimator = Probing(slope, Layerwise(Rademacher()), 4)
    drawn = torch.stack([estimated(estimator, linear, batch, KEY.fold("mean", number)) for number in range(600)])
    assert_mean(drawn - true_gradient(linear, batch, KEY), 0.0)


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_slope_is_that_of_the_gradient(name: str, together: int):
    """Whatever of the network carries no tangent, also where a weight is not used at all, or is used twice."""
    made, batch = OBJECTIVES[name].make(torch.float64)
    grad = true_gradient(made, batch, KEY)
    for by in GROUPINGS:
        count = 1 + max(by.groups(made).values())
        probes = min(count, 12)
        found = Probing(Jvp(together), Layerwise(by=by), probes).estimate(made, batch, KEY)
        z = matrix(made, resolve(made, by), found.gradient.seeds)  # type: ignore[attr-defined]
        assert found.slopes is not None
        assert (found.slopes - z @ grad).abs().max() <= 1e-10 * grad.norm() * count


# ---- what is not reached costs nothing

WIDTH, BATCH, LAYERS = 12, 6, 4


def chain() -> Objective:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    return Objective(model, lambda model, batch: model(batch).square().mean())


def cost(slope: Slope, seeds: list[int], objective: Objective, directions: Directions) -> float:
    with Flops() as flops:
        slope.measure(objective, torch.randn(BATCH, WIDTH), KEY, directions, seeds)
    return flops.total / (2 * BATCH * WIDTH * WIDTH)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_probe_into_one_layer_costs_its_tangent_and_those_behind_it(layer: int):
    made = chain()
    found = resolve(made, EachLeaf())
    later = LAYERS - 1 - layer
    assert cost(Jvp(), [layer], made, found) == LAYERS + 1 + later
    assert cost(Jvp(3), [layer, layer + LAYERS, layer + 2 * LAYERS], made, found) == LAYERS + 3 * (1 + later)
    assert cost(CentralDifference(), [layer], made, found) == 2 * LAYERS


def test_probes_that_share_a_forward_pay_for_every_leaf_that_one_of_them_reaches():
    made = chain()
    found = resolve(made, EachLeaf())
    # Two products for each of layers 1 and 3 (from 0), and two for the inputs of 2 and 3.
    assert cost(Jvp(2), [1, 3], made, found) == LAYERS + 2 * 2 + 2 * 2
    assert cost(Jvp(4), [0, 1, 2, 3], made, found) == LAYERS + 4 * (2 * LAYERS - 1)


def test_a_name_that_is_not_matched_costs_nothing_either():
    made = chain()
    named, _ = Masked(Named("2.*")).resolve(made, KEY, None)
    assert cost(Jvp(), [5], made, named) == LAYERS + 1 + 1


class Tags:
    """The kinds and sizes of the tensors that a method tags."""

    def __init__(self) -> None:
        self.sizes: list[tuple[str, int]] = []

    def on_tag(self, kind: Any, tensor: Tensor) -> None:
        self.sizes.append((kind, tensor.numel()))


@pytest.mark.parametrize("by", GROUPINGS, ids=repr)
def test_only_the_group_has_tangents_and_noise(by: Grouping):
    made, batch = OBJECTIVES["mlp"].make()
    found, group_of = resolve(made, by), by.groups(made)
    for group in set(group_of.values()):
        sizes = sorted(leaf.parameter.numel() for leaf in made.leaves if group_of[leaf.name] == group)
        for slope, kind, times in ((Jvp(), "tangents", 1), (CentralDifference(), "noise", 2)):
            tags = Tags()
            with observe(tags):
                slope.measure(made, batch, KEY, found, [group])
            assert sorted(size for what, size in tags.sizes if what == kind) == sorted(sizes * times)


def test_a_leaf_that_is_not_reached_is_not_copied():
    made, _ = OBJECTIVES["mlp"].make()
    found = resolve(made, EachLeaf())
    assert isinstance(found, SparseDirections)
    for number, leaf in enumerate(made.leaves):
        base = leaf.parameter.detach()
        for group in range(6):
            assert found.touches(leaf, [group]) == (group == number)
            assert (found.add(base, leaf, [group], [0.1]) is base) == (group != number)
        assert found.touches(leaf, range(6))


def test_a_weight_that_the_loss_does_not_use_has_slope_0_and_not_an_error():
    made, batch = OBJECTIVES["direct"].make(torch.float64)
    group = EachLeaf().groups(made)["unused"]
    for slope in (Jvp(), Jvp(together=2)):
        seeds = [group, group + len(made.leaves)]
        _, slopes = slope.measure(made, batch, KEY, resolve(made, EachLeaf()), seeds)
        assert slopes.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("slope", [Jvp(), Jvp(together=2)], ids=repr)
def test_a_loss_that_is_cut_off_is_still_an_error(slope: Slope):
    """A missing tangent is not taken as 0 because some leaves have none."""
    made, batch = OBJECTIVES["mlp"].make()
    cut = Objective(made.model, lambda model, batch: made.loss(model, batch).detach())
    with pytest.raises(ValueError, match="the loss came out without a tangent"):
        Probing(slope, Layerwise(), 2).estimate(cut, batch, KEY)
