"""Counter-based noise: the published vectors, the invariances that make it one stream, and its statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from gradcost.core.objective import Objective
from gradcost.directions import Gaussian, Rademacher
from gradcost.estimators.gradient import Seeded
from gradcost.noise import add as noise
from gradcost.noise import parallel, philox

STREAMS: list[philox.Stream] = [philox.Signs(), philox.Normals()]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EITHER = pytest.mark.parametrize("stream", STREAMS, ids=repr)
seeds = st.integers(0, 2**64 - 1)
starts = st.integers(0, 2**45)  # beyond 2^32 blocks of a stream of normals


def drawn(stream: philox.Stream, seed: int, start: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return noise.add_noise(stream, [seed], [1.0], start, torch.zeros(count, dtype=dtype))


def by(path: Callable[..., None], stream: philox.Stream, start: int, base: Tensor, seeds: Sequence[int]) -> Tensor:
    """base + sum_k scale_k z_k on one path, with a few scales that are not exact in half precision."""
    out = torch.empty_like(base)
    path(stream, seeds, [0.1 * (number - 1) + 1e-3 for number in range(len(seeds))], start, base, out)
    return out


# ---- the generator

# Random123's kat_vectors, philox4x32-10: counter, key, output.
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_philox_gives_its_published_vectors(counter: str, key: str, expected: str):
    """The key 0xffffffff finds arithmetic shifts: one that smears the sign bit ruins the high words."""
    low, high = words(key)
    found = philox.philox_rounds([torch.tensor([word]) for word in words(counter)], (low, high))
    assert [int(word) for word in found] == words(expected)


def test_a_seed_is_the_key_and_a_block_the_counter():
    zero = words(PUBLISHED[0][2])
    assert [int(word) for word in philox.philox(0, 0, 1)] == zero
    seed, block = 0x299F31D0A4093822, 0x85A308D3243F6A88 & (2**62 - 1)
    found = philox.philox(seed, block, 2)
    for number in range(2):
        at = block + number
        counter = [torch.tensor([word]) for word in (at & 0xFFFFFFFF, at >> 32, 0, 0)]
        assert [int(w[number]) for w in found] == [
            int(w) for w in philox.philox_rounds(counter, (0xA4093822, 0x299F31D0))
        ]


def test_signs_are_the_bits_and_normals_are_box_and_muller_of_the_words():
    """Against the definition, in float64: the polynomials are good to float32."""
    block = np.array(words(PUBLISHED[0][2]), dtype=np.uint32)
    bits = (block[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    assert drawn(philox.Signs(), 0, 0, 128).tolist() == (1.0 - 2.0 * bits.astype(float)).flatten().tolist()
    first, second = (np.stack([w.numpy() for w in philox.philox(7, 0, 50_000)])[[k, k + 2]] for k in (0, 1))
    radius, angle = np.sqrt(-2 * np.log((first + 0.5) / 2**32)), 2 * np.pi * second / 2**32
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).transpose(1, 0, 2).reshape(-1)
    # uniforms within 2^-24 of 1 are rounded in float32: there the radius is small, and so is the normal
    assert np.abs(drawn(philox.Normals(), 7, 0, 200_000).numpy() - expected).max() < 4e-4
    assert np.quantile(np.abs(drawn(philox.Normals(), 7, 0, 200_000).numpy() - expected), 0.999) < 2e-6


# ---- one stream, however it is asked for


@EITHER
@settings(max_examples=60, deadline=None)
@given(seed=seeds, start=starts, lengths=st.lists(st.integers(0, 700), min_size=1, max_size=5))
def test_pieces_are_the_whole(stream: philox.Stream, seed: int, start: int, lengths: list[int]):
    """Whatever the cuts, and in whatever order they are made."""
    whole, cuts, pieces = drawn(stream, seed, start, sum(lengths)), np.cumsum([0, *lengths]), {}
    for number in reversed(range(len(lengths))):
        pieces[number] = drawn(stream, seed, start + int(cuts[number]), lengths[number])
    assert torch.equal(torch.cat([pieces[number] for number in range(len(lengths))]), whole)


@EITHER
@settings(max_examples=60, deadline=None)
@given(
    seeds=st.lists(seeds, min_size=1, max_size=4),
    start=starts,
    count=st.integers(0, 2000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_fused_path_is_the_reference_path(
    stream: philox.Stream, seeds: list[int], start: int, count: int, dtype: torch.dtype
):
    base = torch.linspace(-1, 1, count, dtype=dtype)
    one, other = (by(path, stream, start, base, seeds) for path in (noise.fused, noise.reference))
    assert torch.equal(one, other)


@EITHER
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_million_elements_are_the_same_bits_on_both_paths(
    stream: philox.Stream, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    base = torch.linspace(-1, 1, 1_000_003).to(dtype)
    fused = noise.add_noise(stream, [3, 2**64 - 1], [0.5, -1e-3], 12_345, base)
    monkeypatch.setattr(noise, "has_fused_path", lambda: False)
    reference = noise.add_noise(stream, [3, 2**64 - 1], [0.5, -1e-3], 12_345, base)
    assert fused.dtype == dtype
    assert torch.equal(fused.view(torch.uint8), reference.view(torch.uint8))
    assert not torch.equal(fused, base)


def append_later(done: list[int]) -> None:
    time.sleep(0.1)
    done.append(5)


def test_the_threads_of_torch_and_a_pool_run_every_job_and_hand_on_its_error(monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise KeyboardInterrupt

    assert parallel._openmp_parallel() is not None
    for way in (parallel._openmp_parallel, lambda: None):
        monkeypatch.setattr(parallel, "_openmp_parallel", way)
        done: list[int] = []
        parallel.run_in_parallel([partial(done.append, number) for number in range(5)])
        assert sorted(done) == [0, 1, 2, 3, 4]
        with pytest.raises(KeyboardInterrupt):
            parallel.run_in_parallel([fail, partial(append_later, done)])
        now = list(done)
        time.sleep(0.2)
        assert done == now, "no job runs on after the return"


@EITHER
def test_the_bits_do_not_depend_on_the_number_of_threads(stream: philox.Stream):
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(noise.add_noise(stream, [9, 8], [0.5, 0.25], 77, torch.ones(700_001)))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@EITHER
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_seeds_are_added_one_after_the_other(stream: philox.Stream, dtype: torch.dtype):
    base, scales = torch.linspace(-2, 2, 5000, dtype=torch.float64).to(dtype), [0.3, -0.7, 1e-3]
    together = noise.add_noise(stream, [1, 2, 3], scales, 10, base)
    wide = base.to(torch.float64 if dtype == torch.float64 else torch.float32)
    for seed, scale in zip([1, 2, 3], scales, strict=True):
        wide = noise.add_noise(stream, [seed], [scale], 10, wide)
    assert torch.equal(together, wide.to(dtype))  # half precision is rounded once, at the end


@EITHER
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_is_read_in_its_logical_order_and_left_as_it_is(stream: philox.Stream, dtype: torch.dtype):
    base = torch.linspace(-1, 1, 6 * 7 * 8).to(dtype).reshape(6, 7, 8).permute(2, 0, 1)
    kept = base.clone()
    found = noise.add_noise(stream, [5], [0.5], 3, base)
    assert torch.equal(found, noise.add_noise(stream, [5], [0.5], 3, base.contiguous()))
    assert torch.equal(base, kept)
    assert found.shape == base.shape
    for odd in (torch.tensor(2.0, dtype=dtype), torch.empty(0, 3, dtype=dtype)):
        assert noise.add_noise(stream, [5], [1.0], 3, odd).shape == odd.shape
    assert torch.equal(noise.add_noise(stream, [], [], 3, base), base)


@EITHER
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_is_the_same_numbers_in_the_same_memory(stream: philox.Stream, dtype: torch.dtype):
    base = torch.linspace(-1, 1, 300_000).to(dtype).reshape(100, 3000)
    expected, at = noise.add_noise(stream, [5, 6], [0.5, 2.0], 3, base), base.data_ptr()
    found = noise.add_noise(stream, [5, 6], [0.5, 2.0], 3, base, in_place=True)
    assert found is base
    assert base.data_ptr() == at
    assert torch.equal(base, expected)


@EITHER
def test_elements_far_along_a_stream_are_its_own(stream: philox.Stream):
    """Counters beyond 2^32: the high word counts too."""
    near, far = (drawn(stream, 1, start, 4096) for start in (0, stream.per_block * 2**32))
    assert not torch.equal(near, far)
    by_hand = stream.reference(1, 2**32, 4096 // stream.per_block, torch.device("cpu"))
    assert torch.equal(far, by_hand)


@EITHER
def test_each_bit_of_a_seed_matters(stream: philox.Stream):
    found = {tuple(drawn(stream, 1 << bit, 0, 64).tolist()) for bit in range(64)} | {
        tuple(drawn(stream, 0, 0, 64).tolist())
    }
    assert len(found) == 65


# ---- statistics, over ten million draws of each stream; five standard errors

COUNT = 10_000_000


@cache
def sample(name: str, seed: int = 20, start: int = 0, count: int = COUNT) -> np.ndarray:
    stream = {"signs": philox.Signs(), "normals": philox.Normals()}[name]
    return drawn(stream, seed, start, count).numpy()


def standard_errors(found: float, expected: float, variance: float, count: int = COUNT) -> float:
    return abs(found - expected) / (variance / count) ** 0.5


@pytest.mark.parametrize(
    ("power", "expected", "variance"), [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)], ids=["1", "2", "3", "4"]
)
def test_normals_have_the_moments_of_a_normal(power: int, expected: float, variance: float):
    """E z^p, where the variance of z^p is E z^2p - (E z^p)^2: 1, 3 - 1, 15, 105 - 9."""
    z = sample("normals").astype(np.float64)
    assert standard_errors(float((z**power).mean()), expected, variance) <= 5


def test_signs_are_plus_and_minus_one_in_equal_shares():
    z = sample("signs")
    assert np.array_equal(np.abs(z), np.ones_like(z))
    assert standard_errors(float(z.mean(dtype=np.float64)), 0, 1) <= 5


def test_every_place_within_a_block_is_fair():
    """Each of the 128 bits and of the four normals of a block by itself."""
    signs = sample("signs").reshape(-1, 128).astype(np.float64)
    assert np.abs(signs.mean(0)).max() * len(signs) ** 0.5 <= 5
    normals = sample("normals").reshape(-1, 4).astype(np.float64)
    assert np.abs(normals.mean(0)).max() * len(normals) ** 0.5 <= 5
    assert np.abs((normals**2).mean(0) - 1).max() * (len(normals) / 2) ** 0.5 <= 5
    between = normals.T @ normals / len(normals) - np.eye(4)  # also cosine beside sine of one angle
    assert np.abs(between[np.triu_indices(4, 1)]).max() * len(normals) ** 0.5 <= 5
    squares = (normals**2 - 1) / 2**0.5  # and their sizes, which share a radius if done wrong
    between = squares.T @ squares / len(squares)
    assert np.abs(between[np.triu_indices(4, 1)]).max() * len(squares) ** 0.5 <= 5


def test_normals_have_the_distribution_of_a_normal_and_no_more_than_its_tail():
    z = sample("normals")[:2_000_000]
    assert stats.kstest(z, "norm").pvalue > 1e-6
    z = np.abs(sample("normals"))
    for size in (3.0, 4.0, 4.5):
        share = 2 * float(stats.norm.sf(size))
        assert standard_errors(float((z > size).mean()), share, share) <= 5
    assert 4.8 < z.max() <= 6.77


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 31, 32, 127, 128])
@pytest.mark.parametrize("name", ["signs", "normals"])
def test_elements_at_a_distance_are_uncorrelated(name: str, lag: int):
    """Within a word, from word to word, and from one Philox block (a neighbouring counter) to the next."""
    z = sample(name)
    found = float(np.dot(z[:-lag].astype(np.float64), z[lag:])) / (COUNT - lag)
    assert standard_errors(found, 0, 1) <= 5


@pytest.mark.parametrize("other", [21, 22, 20 + 2**32, 20 ^ 2**63], ids=hex)
@pytest.mark.parametrize("name", ["signs", "normals"])
def test_neighbouring_seeds_are_uncorrelated(name: str, other: int):
    count = 2_000_000
    found = float(np.dot(sample(name)[:count].astype(np.float64), sample(name, other, 0, count))) / count
    assert standard_errors(found, 0, 1, count) <= 5


@pytest.mark.parametrize("directions", [Rademacher(), Gaussian()], ids=repr)
def test_leaves_of_one_shape_have_unrelated_noise(directions: Rademacher | Gaussian):
    """In one objective, under one seed, at every pair of leaves."""
    model = nn.Sequential(*(nn.Linear(300, 300, bias=False) for _ in range(4)))
    objective = Objective(model, lambda model, batch: model(batch).mean())
    leaves = [leaf.double().flatten() for _, leaf in Seeded(objective, directions, (0,), (1.0,)).leaves()]
    correlation = torch.stack(leaves) @ torch.stack(leaves).T / 90_000
    away = correlation - torch.eye(4)
    assert away.triu(1).abs().max() * 300 <= 5


@pytest.mark.parametrize("name", ["signs", "normals"])
def test_the_directions_of_two_estimates_are_nearly_orthogonal(name: str):
    """Mean square cosine of 200 directions in 10,000 dimensions: 1/d, with no pair out of line."""
    stream = {"signs": philox.Signs(), "normals": philox.Normals()}[name]
    z = torch.stack([drawn(stream, seed, 0, 10_000) for seed in range(200)]).double()
    cosines = (z @ z.T / z.norm(dim=1).outer(z.norm(dim=1)))[tuple(torch.triu_indices(200, 200, 1))]
    assert float(cosines.square().mean() * 10_000) == pytest.approx(1.0, abs=5 * (2 / len(cosines)) ** 0.5)
    assert float(cosines.abs().max()) * 100 < 5.5  # the largest of 19,900 is about 4
