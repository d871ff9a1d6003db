"""Law 1. The mean estimate is the gradient: exactly over all sign vectors, and on average over random directions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from gradcost.core.key import Key
from gradcost.core.objective import Leaf
from gradcost.core.value import value
from gradcost.directions import Coordinates, Directions, Rademacher
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.probing import Probing
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp, Slope
from sampling import assert_mean
from tables import DIRECTIONS, OBJECTIVES
from vectors import estimated, flat, matrix, true_gradient

KEY = Key(1)
TINY, BATCH = OBJECTIVES["tiny"].make(torch.float64)  # cross-entropy: smooth, but not a polynomial


@functools.cache
def seeds_of_every_sign_vector() -> tuple[int, ...]:
    """256 seeds whose Rademacher directions in 8 dimensions are the 256 sign vectors, each once."""
    found: dict[tuple[float, ...], int] = {}
    seed = 0
    while len(found) < 256:
        found.setdefault(tuple(matrix(TINY, Rademacher(), [seed])[0].tolist()), seed)
        seed += 1
    return tuple(found.values())


@value
class EverySign(Directions):
    """All 256 Rademacher directions in turn, instead of random ones."""

    unbiased = True

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return seeds_of_every_sign_vector()[:probes]

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        return Rademacher().add(base, leaf, seeds, scales, in_place)


def test_256_seeds_of_the_real_noise_are_the_256_sign_vectors():
    signs = matrix(TINY, EverySign(), seeds_of_every_sign_vector())
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    assert len({tuple(row) for row in signs.tolist()}) == 256


@pytest.mark.parametrize("slope", [Jvp(), Jvp(together=3), Jvp(together=256)], ids=repr)
def test_the_mean_of_exact_slopes_over_all_sign_vectors_is_backprop(slope: Slope):
    grad = true_gradient(TINY, BATCH, KEY)
    mean = estimated(Probing(slope, EverySign(), 256), TINY, BATCH, KEY)
    assert (mean - grad).abs().max() <= 1e-12 * grad.norm()


@pytest.mark.parametrize("slope", [CentralDifference(1e-4), ForwardDifference(1e-4)], ids=repr)
def test_the_mean_of_differences_over_all_sign_vectors_is_backprop_to_the_order_of_eps_squared(slope: Slope):
    # The forward difference's bias of O(eps) is even in z, so over z and -z together it cancels.
    grad = true_gradient(TINY, BATCH, KEY)
    mean = estimated(Probing(slope, EverySign(), 256), TINY, BATCH, KEY)
    assert (mean - grad).abs().max() <= 1e-7 * grad.norm()


@pytest.mark.parametrize(
    "wrapped",
    [Accumulated(Probing(Jvp(), EverySign(), 256), 3), Clipped(Probing(Jvp(), EverySign(), 256), 100.0)],
    ids=["accumulated", "clipped above every slope"],
)
def test_a_wrapper_keeps_the_mean(wrapped: Accumulated | Clipped):
    grad = true_gradient(TINY, BATCH, KEY)
    mean = estimated(wrapped, TINY, BATCH, KEY)
    assert (mean - grad).abs().max() <= 1e-12 * grad.norm()


def test_a_clip_below_the_slopes_shrinks_the_mean():
    grad = true_gradient(TINY, BATCH, KEY)
    found = Clipped(Probing(Jvp(), EverySign(), 256), 0.5 * float(grad.norm())).estimate(TINY, BATCH, KEY)
    assert found.clipped is not None
    assert 0.2 < found.clipped < 0.9
    along = flat(found.gradient) @ grad / grad.square().sum()
    assert 0.2 < along < 0.8


@pytest.mark.parametrize("slope", [Jvp(), Jvp(together=3), CentralDifference(1e-4)], ids=repr)
def test_as_many_coordinates_as_weights_are_the_gradient(slope: Slope):
    grad = true_gradient(TINY, BATCH, KEY)
    for number in range(3):
        found = estimated(Probing(slope, Coordinates(), TINY.dimension), TINY, BATCH, Key(number))
        tolerance = 1e-12 if slope.exact else 1e-7
        assert (found - grad).abs().max() <= tolerance * grad.norm()


@pytest.mark.parametrize("name", DIRECTIONS)
@pytest.mark.parametrize("probes", [1, 3])
def test_directions_that_claim_it_have_the_identity_as_their_second_moment(name: str, probes: int):
    """E[z z'] = I, entry by entry over both leaves, within 5 standard errors of 6,000 real draws."""
    directions = DIRECTIONS[name]
    assert directions.unbiased
    keys = [Key(7).fold("draw", number) for number in range(6000)]
    seeds = [directions.seeds(key, probes, TINY.dimension)[probes - 1] for key in keys]
    z = matrix(TINY, directions, seeds)
    assert_mean(z.unsqueeze(1) * z.unsqueeze(2) - torch.eye(8), 0.0)
    if not isinstance(directions, Coordinates):  # its entries are never below 0, and need not be
        assert_mean(z, 0.0)


@pytest.mark.parametrize("dimension", [1, 2, 3, 5, 8, 12, 20, 33])
def test_every_coordinate_is_drawn_with_the_same_probability(dimension: int):
    """Cycle walking of a Feistel network prefers some, by 6% at 8 and 2% at 20; a random rotation corrects it."""
    draws = 20_000
    drawn = torch.tensor([Coordinates().seeds(Key(number), 1, dimension)[0] for number in range(draws)])
    expected = draws / dimension
    chi_squared = float((drawn.bincount(minlength=dimension) - expected).square().sum() / expected)
    degrees = dimension - 1
    assert chi_squared <= degrees + 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("dimension", [1, 2, 3, 8, 20, 100])
def test_coordinates_are_drawn_without_replacement(dimension: int):
    for number in range(5):
        seeds = Coordinates().seeds(Key(number), 2 * dimension, dimension)
        assert sorted(seeds[:dimension]) == sorted(seeds[dimension:]) == list(range(dimension))


def public(kind: type) -> Iterator[type]:
    """Yield the public concrete subclasses. Private are those that `StatefulDirections.resolve` returns."""
    for below in kind.__subclasses__():
        if below.__module__.startswith("gradcost.") and not (inspect.isabstract(below) or below.__name__[0] == "_"):
            yield below
        yield from public(below)


def test_every_kind_of_directions_has_a_row():
    # Not the directions of a paper's code, which are reproduced with their faults.
    kinds = {kind for kind in public(Directions) if not kind.__module__.startswith("gradcost.papers.")}
    assert kinds == {type(directions) for directions in DIRECTIONS.values()}
