"""Directions of low rank: what they scatter, hold and cost, and that a held factor is refreshed in one place."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alive import Alive
from counting import Flops
from gradcost import Probing
from gradcost.core.key import Key
from gradcost.core.objective import Leaf, Objective
from gradcost.directions import Directions, LazyLowRank, LowRank
from gradcost.directions.low_rank import Held
from gradcost.estimators.estimator import Estimate
from gradcost.estimators.gradient import Seeded
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp, Slope
from sampling import assert_mean
from tables import OBJECTIVES, seeded_generators
from vectors import direction, estimated, flat, matrix, true_gradient

KEY = Key(32)


def leaf_of(*shape: int, dtype: torch.dtype = torch.float32, start: int = 0) -> Leaf:
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
    return Leaf("leaf", parameter, start, start + parameter.numel())


# ---- what they are


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("shape", [(6, 9), (6, 3, 3), (1, 20), (20, 1)], ids=str)
def test_a_matrix_has_the_rank_and_is_the_product_of_its_factors(shape: tuple[int, ...], rank: int):
    leaf = leaf_of(*shape, dtype=torch.float64)
    z = LowRank(rank).draw(leaf, [7], [1.0]).reshape(shape[0], -1)
    left, right = LowRank(rank).factors(leaf, 7)
    assert left.shape == (rank, z.shape[0])
    assert right.shape == (rank, z.shape[1])
    assert torch.allclose(z, left.T @ right / rank**0.5, rtol=1e-13, atol=1e-13)
    assert int(torch.linalg.matrix_rank(z)) == min(rank, *z.shape)


def test_no_factor_has_a_number_of_another_nor_of_a_vector():
    model = nn.ParameterList([torch.zeros(40, 30), torch.zeros(30, 40), torch.zeros(70), torch.zeros(40, 30)])
    objective = Objective(model, lambda model, batch: torch.zeros(()))
    numbers: list[float] = []
    for seed in (5, 6):
        for leaf in objective.leaves:
            if leaf.parameter.ndim == 2:
                for factor in LowRank(3).factors(leaf, seed):
                    numbers += factor.flatten().tolist()
            else:
                numbers += LowRank(3).draw(leaf, [seed], [1.0]).tolist()
    assert len(numbers) == 2 * (3 * 3 * 70 + 70)
    assert len(set(numbers)) > 0.999 * len(numbers)  # of 1,400 float32 numbers a pair may be equal by chance


@pytest.mark.parametrize(
    "rank", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_the_second_moment_is_the_one_of_the_docstring(rank: int):
    """E[|z|^2 (g . z)^2] = (d + 2)|g|^2 + (2 / rank) sum over matrices of (m + n + 1)|g_matrix|^2."""
    objective, batch = OBJECTIVES["linear"].make(torch.float64)  # a 3 x 4 matrix and two vectors, of 3 and of 5
    grad = true_gradient(objective, batch, KEY)
    z = matrix(objective, LowRank(rank), range(20_000))
    drawn = z.square().sum(1) * (z @ grad).square()
    within = sum(
        (leaf.parameter.shape[0] + leaf.parameter.shape[1] + 1)
        * grad[leaf.start : leaf.start + leaf.parameter.numel()].square().sum()
        for leaf in objective.leaves
        if leaf.parameter.ndim == 2
    )
    stated = float((20 + 2) * grad.square().sum() + 2 / rank * within)
    assert_mean(drawn, stated)
    assert 5 * float(drawn.std()) / len(drawn) ** 0.5 < 0.25 * stated, "too few draws to say so"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype):
    leaf = leaf_of(1500, 1000, dtype=dtype)  # more than one piece
    base = torch.linspace(-2, 2, 1_500_000).reshape(1500, 1000).to(dtype)
    found = LowRank(2).add(base, leaf, [3, 4], [0.01, -0.02])
    expected = base.double()
    for seed, scale in ((3, 0.01), (4, -0.02)):
        left, right = (factor.double() for factor in LowRank(2).factors(leaf, seed))
        expected += scale / 2**0.5 * left.T @ right
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert ((found.double() - expected).abs() <= 1.001 * unit * expected.abs() + 1e-6).all()


@pytest.mark.parametrize("shape", [(5, 300_001), (700, 401)], ids=str)
def test_the_bits_are_those_of_every_number_of_threads(shape: tuple[int, int]):
    """A matrix product of 5 x 8 and 8 x 300,001 factors differs between one thread and two."""
    leaf, before, found = leaf_of(*shape), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(LowRank(8).add(torch.ones(shape), leaf, [1, 2], [0.3, -0.7]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


# ---- what they hold


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("directions", [LowRank, LazyLowRank])
def test_nothing_as_large_as_the_leaf_is_made_beside_it(directions: Any, rank: int):
    leaf = leaf_of(600, 500)
    objective = Objective(nn.Linear(500, 600, bias=False), lambda model, batch: torch.zeros(()))
    made: Any = directions(rank)
    resolve = made if isinstance(made, Directions) else made.resolve(objective, KEY, Held(1, 7))[0]
    base = torch.zeros(600, 500)
    with Alive() as alive:
        resolve.add(base, leaf, [1, 2, 3], [1.0, 2.0, 3.0], in_place=True)
        assert alive.bytes == 0
    # The factors and the left one scaled.
    assert alive.peak <= 4 * rank * (600 + 500 + 600)
    with Alive() as alive:
        resolve.add(base, leaf, [1, 2, 3], [1.0, 2.0, 3.0])
    assert alive.peak <= base.nbytes + 4 * rank * (600 + 500 + 600)


@pytest.mark.parametrize("together", [1, 4])
def test_forward_mode_makes_no_tangent_of_a_linear_layers_weight(together: int):
    model = nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 200))
    objective = Objective(model, lambda model, batch: model(batch).square().mean())
    batch = torch.randn(2, 200)
    with Alive() as alive:
        Probing(Jvp(together), LowRank(2), together).estimate(objective, batch, KEY)
    assert alive.peak < 200 * 300 * 4 / 2


# ---- forward mode


class Uses(nn.Module):
    """Every way of using a matrix: tied, read directly, in a convolution, in a subclass, behind another forward."""

    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + self.weight.sum()

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.plain, self.own, self.hooked = nn.Linear(6, 6), self.Own(6, 6), nn.Linear(6, 6)
        self.replaced, self.called = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.conv = nn.Conv1d(5, 5, 3, padding=1)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.unbatched = nn.Linear(6, 4)
        self.bilinear = nn.Parameter(torch.randn(6, 6))
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight
        self.replaced.forward = lambda x: torch.tanh(x @ self.replaced.weight.T)  # type: ignore[method-assign]
        self.hooked.register_forward_hook(self.scaled_by_its_weight)

    @staticmethod
    def scaled_by_its_weight(module: Any, inputs: Any, out: Tensor) -> Tensor:
        return out * module.weight.square().mean()

    def forward(self, words: Tensor) -> Tensor:
        x = torch.tanh(self.plain(self.embed(words)))
        x = self.frozen(torch.tanh(self.own(x)) + self.hooked(x)) + self.replaced(x)
        x = torch.tanh(self.conv(x)) + torch.nn.functional.linear(x, self.called.weight, bias=self.called.bias)
        x = x + self.called(input=x) @ self.bilinear + nn.functional.linear(self.bilinear, self.plain.weight).mean()
        return self.head(x) + self.unbatched(x[0, 0]).sum()


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("slope", [Jvp(), Jvp(together=3)], ids=repr)
def test_every_use_of_a_matrix_counts_once(slope: Slope, rank: int):
    with seeded_generators(KEY):
        words, model = torch.randint(9, (4, 5)), Uses().double()
    objective = Objective(model, lambda model, batch: model(batch).square().mean())
    seeds = LowRank(rank).seeds(KEY, 4, objective.dimension)
    _, measured = slope.measure(objective, words, KEY, LowRank(rank), seeds)
    grad = true_gradient(objective, words, KEY)
    assert all(bool(grad[leaf.start : leaf.start + leaf.parameter.numel()].any()) for leaf in objective.leaves)
    assert (measured - matrix(objective, LowRank(rank), seeds) @ grad).abs().max() <= 1e-10 * grad.norm()


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("slope", [Jvp(), Jvp(together=3)], ids=repr)
def test_a_transformer_with_tied_weights_agrees(slope: Slope, rank: int):
    objective, batch = OBJECTIVES["transformer"].make(torch.float64)
    seeds = LowRank(rank).seeds(KEY, 4, objective.dimension)
    _, measured = slope.measure(objective, batch, KEY, LowRank(rank), seeds)
    grad = true_gradient(objective, batch, KEY)
    assert (measured - matrix(objective, LowRank(rank), seeds) @ grad).abs().max() <= 1e-10 * grad.norm()


def test_in_half_precision_the_slope_is_along_the_direction_that_is_replayed():
    objective, batch = OBJECTIVES["mlp"].make(torch.bfloat16)
    exact, exact_batch = OBJECTIVES["mlp"].make(torch.float64)
    exact.model.load_state_dict(objective.model.state_dict())
    found = Probing(Jvp(together=4), LowRank(), 4).estimate(objective, batch, KEY)
    assert isinstance(found.gradient, Seeded)
    assert found.slopes is not None
    grad = true_gradient(exact, exact_batch, KEY)
    expected = matrix(objective, LowRank(), found.gradient.seeds) @ grad
    assert (found.slopes - expected).abs().max() <= 0.05 * expected.norm()


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("probes", [1, 4])
def test_a_probe_costs_a_matmul_a_layer_and_two_thin_ones(probes: int, layers: int, rank: int):
    """(1 + k) L matmuls for k directions in one forward, less k for the first layer's input, which has no tangent;
    and for each layer and direction the products with the factors: 2 x batch x rank x (m + n) operations."""
    width, batch = 12, 6
    model = nn.Sequential(*(nn.Linear(width, width, bias=layers == 2) for _ in range(layers)))
    objective = Objective(model, lambda model, batch: model(batch).square().mean())
    with Flops() as flops:
        Probing(Jvp(probes), LowRank(rank), probes).estimate(objective, torch.randn(batch, width), KEY)
    one, thin = 2 * batch * width * width, 2 * batch * rank * (width + width)
    assert flops.total == one * (layers + probes * (layers - 1)) + thin * probes * layers


# ---- a factor that is held


def steps(directions: LazyLowRank, count: int, slope: Slope, state: Any = None) -> list[Estimate]:
    objective, batch = OBJECTIVES["linear"].make(torch.float64)
    estimator, found = Probing(slope, directions, 2), []
    for number in range(count):
        found.append(estimator.estimate(objective, batch, KEY.fold("step", number), state))
        state = found[-1].state
    return found


@pytest.mark.parametrize("slope", [Jvp(together=2), ForwardDifference(0.5)], ids=repr)
def test_what_is_looked_along_is_what_is_applied_on_every_step_of_a_period(slope: Slope):
    """LOZO's code refreshes its factor for the perturbation and not for the update: cosine -0.07 on those steps. On a
    linear loss the slope along z is <grad, z>, for the z of the replay and no other."""
    objective, batch = OBJECTIVES["linear"].make(torch.float64)
    grad = true_gradient(objective, batch, KEY)
    for found in steps(LazyLowRank(every=3), 8, slope):
        assert isinstance(found.gradient, Seeded)
        assert found.slopes is not None
        z = matrix(objective, found.gradient.directions, found.gradient.seeds)
        assert (found.slopes - z @ grad).abs().max() <= 1e-11


def rights(found: list[Estimate]) -> list[int]:
    held: list[Any] = [estimate.state for estimate in found]
    return [state.right for state in held]


def test_a_factor_is_held_for_as_many_estimates_as_stated():
    found = steps(LazyLowRank(rank=2, every=3), 7, Jvp())
    seen = rights(found)
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[4] == seen[5] != seen[6]
    rows = [next(leaf for _, leaf in estimate.gradient.leaves() if leaf.ndim == 2) for estimate in found]  # 3 x 4
    assert int(torch.linalg.matrix_rank(torch.cat(rows[:3]), rtol=1e-10)) == 2
    assert int(torch.linalg.matrix_rank(torch.cat(rows[:4]), rtol=1e-10)) == 4
    assert not any(torch.equal(rows[0], other) for other in rows[1:])


def test_it_resumes_within_a_period():
    whole = steps(LazyLowRank(every=3), 6, Jvp())
    objective, batch = OBJECTIVES["linear"].make(torch.float64)
    kept: Any = whole[3].state
    state = Held(*json.loads(json.dumps(kept)))
    again = Probing(Jvp(), LazyLowRank(every=3), 2).estimate(objective, batch, KEY.fold("step", 4), state)
    assert torch.equal(flat(again.gradient), flat(whole[4].gradient))
    assert again.state == whole[4].state
    fresh = Probing(Jvp(), LazyLowRank(every=3), 2).estimate(objective, batch, KEY.fold("step", 4))
    assert not torch.equal(flat(fresh.gradient), flat(whole[4].gradient))


def test_given_the_factor_the_mean_estimate_is_the_gradients_part_along_it():
    """E[g | B] = G B B' / rank on the matrix, and the gradient itself on the vectors."""
    objective, batch = OBJECTIVES["linear"].make(torch.float64)
    grad, directions, state = true_gradient(objective, batch, KEY), LazyLowRank(rank=2), Held(1, 99)
    resolve: Any = directions.resolve(objective, KEY, state)[0]
    _, right = resolve.factors(next(leaf for leaf in objective.leaves if leaf.parameter.ndim == 2), 0)
    expected = grad.clone()
    for leaf in objective.leaves:
        if leaf.parameter.ndim == 2:
            part = slice(leaf.start, leaf.start + leaf.parameter.numel())
            expected[part] = (grad[part].view(leaf.parameter.shape) @ right.T @ right / 2).flatten()
    z = torch.stack([direction(objective, resolve, seed) for seed in range(5000)])
    assert_mean((z @ grad).unsqueeze(1) * z - expected, 0.0)


@pytest.mark.slow
def test_over_the_draw_of_the_factor_the_mean_is_the_gradient():
    objective, batch = OBJECTIVES["linear"].make(torch.float64)
    grad, estimator = true_gradient(objective, batch, KEY), Probing(Jvp(2), LazyLowRank(), 2)
    found = torch.stack([estimated(estimator, objective, batch, KEY.fold("draw", n)) for n in range(1500)])
    assert_mean(found - grad, 0.0)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LowRank(0), "the rank of a direction is the number of columns of its factors: 1 or more, not 0."),
        (lambda: LazyLowRank(rank=-1), "1 or more, not -1."),
        (lambda: LazyLowRank(every=0), "the number of estimates that use one factor B, must be 1 or more, not 0."),
    ],
)
def test_a_bad_argument_is_refused_in_a_sentence(make: Any, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_central_difference_moves_by_the_same_direction_both_ways():
    seen: list[Tensor] = []
    model = nn.Linear(30, 20, bias=False)
    nn.init.zeros_(model.weight)

    def loss(model: nn.Module, batch: None) -> Tensor:
        seen.append((model.weight * 1).clone())  # type: ignore[operator]
        return seen[-1].mean()

    Probing(CentralDifference(1.0), LazyLowRank(3)).estimate(Objective(model, loss), None, KEY)
    assert torch.equal(seen[0], -seen[1])
