"""Orthogonal directions: a basis is one exactly, its numbers are functions of their index, whatever the dimension."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from alive import Alive
from gradcost.core.key import Key
from gradcost.core.objective import Leaf, Objective
from gradcost.directions import Orthogonal
from gradcost.estimators.probing import Probing
from gradcost.instruments.memory import MemoryTracker
from gradcost.noise import add as noise
from gradcost.noise.hartley import Hartley
from gradcost.noise.philox import Signs, generate
from gradcost.planning.forecast import forecast
from gradcost.slopes.slope import CentralDifference, Jvp, Slope
from tables import KEY as BUILD
from tables import OBJECTIVES, seeded_generators
from vectors import estimated, matrix, true_gradient

KEY = Key(31)
seeds = st.integers(0, 2**64 - 1)


def prime() -> tuple[Objective, tuple[Tensor, ...]]:
    """A network of 31 weights."""
    with seeded_generators(BUILD):
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2, bias=False), nn.Tanh())
        model.extend([nn.Linear(2, 1, bias=False), nn.PReLU()])
        batch = torch.randn(7, 4).double(), torch.randn(7, 1).double()
    return Objective(model.double(), lambda model, batch: (model(batch[0]) - batch[1]).square().mean()), batch


@pytest.mark.parametrize("slope", [Jvp(together=8), CentralDifference(1e-4)], ids=repr)
@pytest.mark.parametrize("made", [OBJECTIVES["tiny"].make, OBJECTIVES["linear"].make, prime], ids=["8", "20", "31"])
def test_as_many_directions_as_weights_are_the_gradient(made: Callable[..., Any], slope: Slope):
    """Entries are rounded to float32, so it is exact to that. Two bases are the gradient as well as one."""
    objective, batch = made() if made is prime else made(torch.float64)
    grad, d = true_gradient(objective, batch, KEY), objective.dimension
    for probes in (d, 2 * d):
        found = estimated(Probing(slope, Orthogonal(), probes), objective, batch, KEY.fold("of", probes))
        assert (found - grad).norm() <= 1e-6 * grad.norm()
    assert (estimated(Probing(slope, Orthogonal(), d - 1), objective, batch, KEY) - grad).norm() > 0.01 * grad.norm()


def test_the_networks_have_the_sizes_that_they_are_named_for():
    assert [OBJECTIVES[name].make()[0].dimension for name in ("tiny", "linear")] == [8, 20]
    assert prime()[0].dimension == 31


@pytest.mark.parametrize("dimension", [1, 2, 3, 8, 31, 256, 1237])
def test_a_basis_is_orthogonal(dimension: int):
    model = nn.ParameterList([torch.zeros(size) for size in (dimension // 3, dimension - dimension // 3) if size])
    objective = Objective(model, lambda model, batch: torch.zeros(()))
    for number in range(2):
        z = matrix(objective, Orthogonal(), Orthogonal().seeds(KEY.fold("of", number), dimension, dimension))
        assert (z @ z.T / dimension - torch.eye(dimension)).abs().max() <= 1e-5


def test_two_bases_are_unrelated():
    objective = Objective(nn.Linear(1236, 1), lambda model, batch: torch.zeros(()))
    z = matrix(objective, Orthogonal(), Orthogonal().seeds(KEY, 1237 + 5, 1237)[-10:])
    products = z @ z.T / 1237
    assert products[:5, 5:].abs().max() <= 5 / 1237**0.5
    assert products[:5, 5:].abs().max() > 1e-3


@settings(max_examples=40, deadline=None)
@given(seed=seeds, dimension=st.integers(2, 2**40), where=st.floats(0, 1), dtype=st.sampled_from([4, 8]))
def test_a_piece_is_the_same_bits_as_the_whole(seed: int, dimension: int, where: float, dtype: int):
    """Wherever it starts, on either path, and in whichever company of seeds."""
    stream, start, count = Hartley(dimension), int(where * (dimension - 1)), 700
    kind = torch.float32 if dtype == 4 else torch.float64
    base = torch.linspace(-1, 1, count, dtype=kind)

    def added(path: Callable[..., None], at: int, piece: Tensor) -> Tensor:
        out = torch.empty_like(piece)
        path(stream, [seed, seed ^ (1 << 63)], [0.3, -0.7], start + at, piece, out)
        return out

    whole = added(noise.reference, 0, base)
    for path in (noise.reference, noise.fused):
        cut = [added(path, at, base[at : at + size]) for at, size in ((0, 1), (1, 130), (131, 300), (431, 269))]
        assert torch.equal(torch.cat(cut), whole)


@settings(max_examples=100, deadline=None)
@given(
    dimension=st.integers(10**10 - 1000, 10**10) | st.integers(1, 50) | st.integers(2**44, 2**45 - 1),
    far=st.floats(0, 1),
    seed=seeds,
)
def test_the_phase_is_that_of_whole_numbers(dimension: int, far: float, seed: int):
    """The product k i goes far beyond 2^64, and a phase in floating point would be lost."""
    stream = Hartley(dimension)
    row, start = stream.row(seed), int(far * (dimension - 1))
    assert 0 <= row < dimension
    found = generate(stream, seed, start, 5).double()
    signs = generate(Signs(), stream.signs(seed), start, 5).double()
    for j in range(5):
        turn = 2 * math.pi * (row * (start + j) % dimension / dimension)
        assert float(found[j] * signs[j]) == pytest.approx(math.cos(turn) + math.sin(turn), abs=5e-7)


@given(seed=seeds, dimension=st.integers(1, 2**45 - 1), row=st.integers(0, 2**45))
def test_a_seed_holds_the_row_and_the_name_of_the_signs(seed: int, dimension: int, row: int):
    stream = Hartley(dimension)
    made = stream.seed(seed, row % dimension)
    assert 0 <= made < 2**64
    assert stream.row(made) == row % dimension
    assert stream.signs(made) == stream.signs(stream.seed(seed, 0))


def test_as_many_bits_as_the_dimension_needs_are_the_rows():
    assert [Hartley(d).bits for d in (1, 2, 3, 4, 5, 1024, 1025, 10**10)] == [1, 1, 2, 2, 3, 10, 11, 34]


@pytest.mark.parametrize("blocks", [1, 10, 512])
def test_the_workspace_is_what_the_reference_has_alive(blocks: int):
    stream = Hartley(10**6)
    with Alive() as alive:
        stream.reference(123, 5, blocks, torch.device("cpu"))
    assert alive.peak == blocks * stream.workspace


def test_a_leaf_at_an_odd_offset_is_a_slice_of_the_whole_vector():
    d = 70_001
    whole = Leaf("whole", nn.Parameter(torch.zeros(d)), 0, d)
    found = Orthogonal().seeds(KEY, 3, d)
    z = Orthogonal().add(torch.zeros(d), whole, found, [1.0, 0.5, -0.25])
    for start, size in ((1, 3), (127, 2), (129, 65_999), (69_998, 3)):
        leaf = Leaf("piece", nn.Parameter(torch.zeros(size)), start, d)
        assert torch.equal(Orthogonal().add(torch.zeros(size), leaf, found, [1.0, 0.5, -0.25]), z[start:][:size])


def test_a_forecast_without_numba_is_of_the_reference_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(noise, "has_fused_path", lambda: False)
    objective, batch = OBJECTIVES["mlp"].make()
    estimator = Probing(CentralDifference(1e-3), Orthogonal())
    live = MemoryTracker(objective.model)
    live.register("inputs", batch)
    with live.followed():
        estimator.stream(objective, batch, KEY, lambda name, gradient: None)
    assert forecast(estimator, objective, batch).peak == live.memory().peak
