"""Traps that forward mode and zero-order differences share: noise, clipping, weight decay, steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradcost.core.key import Key
from gradcost.core.objective import Leaf, Objective
from gradcost.directions import Gaussian, Rademacher
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.presets import backprop, checkpointed, forward_gradient, mezo
from gradcost.estimators.probing import Probing
from gradcost.noise import add as noise
from gradcost.noise import philox
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp
from gradcost.training.loop import train
from gradcost.training.optimizers import SGD, AdamW, Optimizer
from snapshot import bits
from tables import DIRECTIONS, OBJECTIVES, WHOLE
from vectors import estimated, flat, true_gradient

KEY = Key(400)

# ---- clipping


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_one_direction_is_so_long_that_clipping_its_norm_would_cut_every_step(name: str):
    """The norm of one probe's gradient is about sqrt(d) times the slope: `clip_grad_norm_(1)` fires at every step and
    makes normalised SGD of it. A cap of 1 on the slope cuts what is rare."""
    objective, batch = OBJECTIVES[name].make(torch.float64)
    grad = true_gradient(objective, batch, KEY)
    cap = 3.5 * float(grad.norm())
    rates, norms = [], []
    for number in range(40):
        found = Clipped(Probing(Jvp(), Rademacher()), cap).estimate(objective, batch, KEY.fold("step", number))
        assert found.slopes is not None
        assert found.clipped is not None
        rates.append(found.clipped)
        norms.append(found.gradient.norm() / abs(float(found.slopes[0])))
    assert norms == pytest.approx([objective.dimension**0.5] * 40, rel=1e-6)
    assert sum(rates) <= 1
    sizes = [
        estimated(Probing(Jvp(), Rademacher()), objective, batch, Key(k)).norm() / grad.norm() for k in range(40)
    ]
    assert sum(size > 1 for size in sizes) >= 36


@pytest.mark.parametrize("cap", [0.1, 0.3, 2.0])
@pytest.mark.parametrize("slope", [Jvp(), Jvp(together=3), CentralDifference(), ForwardDifference()], ids=repr)
def test_a_clip_cuts_slopes_to_the_cap_and_reports_the_raw_ones_and_the_share_cut(slope: Any, cap: float):
    objective, batch = OBJECTIVES["mlp"].make(torch.float64)
    inner = Probing(slope, Gaussian(), 8)
    plain, found = (e.estimate(objective, batch, KEY) for e in (inner, Clipped(inner, cap)))
    assert plain.slopes is not None
    assert found.slopes is not None
    assert torch.equal(found.slopes, plain.slopes)
    assert plain.clipped is None
    assert found.clipped == float((plain.slopes.abs() > cap).double().mean())
    assert torch.equal(found.loss, plain.loss)
    assert isinstance(found.gradient, Seeded)
    assert isinstance(plain.gradient, Seeded)
    assert found.gradient.seeds == plain.gradient.seeds
    expected = plain.slopes.clamp(-cap, cap) / 8
    assert found.gradient.coefficients == pytest.approx(expected.tolist(), rel=1e-14)


def test_the_caps_above_do_different_things():
    """So that the test above is of most slopes cut, of half of them, and of none."""
    objective, batch = OBJECTIVES["mlp"].make(torch.float64)
    found = [Clipped(Probing(Jvp(), Gaussian(), 8), cap).estimate(objective, batch, KEY) for cap in (0.1, 0.3, 2.0)]
    rates = [estimate.clipped for estimate in found]
    assert rates == [0.75, 0.5, 0.0]


def test_a_clip_above_every_slope_changes_no_bit():
    objective, batch = OBJECTIVES["mlp"].make()
    for inner in (forward_gradient(4), mezo(), Accumulated(forward_gradient(2), 2)):
        plain, found = (e.estimate(objective, batch, KEY) for e in (inner, Clipped(inner, 1e6)))
        assert found.clipped == 0.0
        for (_, one), (_, other) in zip(plain.gradient.leaves(), found.gradient.leaves(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("inner", [backprop(), checkpointed(), Accumulated(backprop(), 2)], ids=repr)
def test_backprop_has_no_slope_to_clip_and_the_message_names_an_alternative(inner: Estimator):
    objective, batch = OBJECTIVES["mlp"].make()
    with pytest.raises(ValueError, match="measures no slopes to clip: clip the norm of its gradient instead"):
        Clipped(inner).estimate(objective, batch, KEY)
    if not isinstance(inner, Accumulated):
        assert "measures no slopes to clip" in str(Clipped(inner).objection(objective, batch))


# ---- noise


@pytest.mark.parametrize("name", [name for name in DIRECTIONS if name not in WHOLE])
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 60), start=st.integers(0, 10_000))
def test_noise_for_a_tensor_is_the_noise_for_its_rows(name: str, rows: int, columns: int, start: int):
    """`torch.randn` is not: randn(64) is other numbers than 8 times randn(8), and CPU and CUDA differ. mezo 0.0.1
    drew large tensors row by row in one of its two places."""
    dimension = start + rows * columns + 5
    weight = nn.Parameter(torch.zeros(rows, columns))
    seeds = DIRECTIONS[name].seeds(KEY, 2, dimension)

    def made(first: int, base: Tensor) -> Tensor:
        return DIRECTIONS[name].add(base, Leaf("weight", weight, first, dimension), seeds, [0.5, -2.0])

    whole = made(start, torch.zeros(rows, columns))
    by_rows = torch.stack([made(start + row * columns, torch.zeros(columns)) for row in range(rows)])
    assert torch.equal(whole, by_rows)


@given(
    counter=st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4),
    key=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
)
def test_the_generator_is_that_of_unsigned_words(counter: list[int], key: tuple[int, int]):
    """A hash on signed integers needs logical shifts: an arithmetic >> smears the sign bit and ruins the statistics.
    Here against Python's whole numbers, which have no sign bit to smear."""
    found = philox.philox_rounds([torch.tensor([word]) for word in counter], key)
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    assert [int(word) for word in found] == [c0, c1, c2, c3]


def test_every_bit_of_the_noise_is_1_half_of_the_time():
    """As a smeared sign bit is not: the share of ones in each of the 128 bits of a block."""
    blocks = 40_000
    signs = noise.add_noise(philox.Signs(), [2**64 - 1], [1.0], 0, torch.zeros(128 * blocks)).reshape(blocks, 128)
    assert signs.mean(0).abs().max() * blocks**0.5 <= 5
    between = (signs.T @ signs / blocks).fill_diagonal_(0)
    assert between.abs().max() * blocks**0.5 <= 5.5  # the largest of 8,128 is about 4


def test_the_noise_of_a_seed_equals_constants():
    """Written down once, so that a run can be replayed by a later release and on another machine: the lowest bits of
    the published word 6627e8d5, and Box and Muller of the first four words."""
    signs = noise.add_noise(philox.Signs(), [0], [1.0], 0, torch.zeros(8)).tolist()
    normals = noise.add_noise(philox.Normals(), [0], [1.0], 0, torch.zeros(4)).tolist()
    assert signs == [-1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, -1.0]
    assert normals == [0.9911375641822815, -0.9246625900268555, -0.6176089644432068, -0.48206859827041626]


# ---- the step


class Level:
    """A task whose loss is level in every direction, so that weight decay alone moves the weights."""

    def objective(self, key: Key) -> Objective:
        objective, self.batch = OBJECTIVES["mlp"].make(torch.float64)
        return Objective(objective.model, lambda model, batch: 0.0 * objective.loss(model, batch))

    def batch_at(self, key: Key, step: int) -> Any:
        return self.batch


@pytest.mark.parametrize("optimizer", [SGD(0.1, weight_decay=0.05), AdamW(0.1, weight_decay=0.05)], ids=repr)
@pytest.mark.parametrize(
    "estimator", [backprop(), forward_gradient(1), forward_gradient(10), mezo(probes=7)], ids=repr
)
def test_weights_decay_once_a_step_whatever_the_number_of_probes(estimator: Estimator, optimizer: Optimizer):
    """Loops that apply the update of each direction by itself decay the weights once a direction."""
    before = [parameter.detach().clone() for parameter in Level().objective(KEY).model.parameters()]
    for step in train(Level(), estimator, optimizer, KEY, steps=3):
        shrunk = (1 - 0.1 * 0.05) ** (step.number + 1)
        for parameter, start in zip(step.objective.model.parameters(), before, strict=True):
            assert torch.allclose(parameter, start * shrunk, rtol=1e-12, atol=0)


@pytest.mark.parametrize("probes", [1, 4])
@pytest.mark.parametrize("slope", [Jvp(), CentralDifference()], ids=repr)
def test_a_step_of_many_probes_is_one_step_along_their_mean(slope: Jvp | CentralDifference, probes: int):
    """And not one step a probe, each from where the last one ended."""
    objective, batch = OBJECTIVES["mlp"].make(torch.float64)
    seeds = Gaussian().seeds(KEY, probes, objective.dimension)
    alone = []
    for seed in seeds:
        _, slopes = slope.measure(objective, batch, KEY, Gaussian(), [seed])
        alone.append(flat(Seeded(objective, Gaussian(), (seed,), (float(slopes[0]),))))
    mean = torch.stack(alone).mean(0)
    found = estimated(Probing(slope, Gaussian(), probes), objective, batch, KEY)
    assert (found - mean).abs().max() <= 1e-12 * mean.abs().max()


def test_an_unused_parameter_has_no_exact_gradient_as_in_torch():
    """With zeros, weight decay and momentum would move what a loop in torch leaves alone."""
    objective, batch = OBJECTIVES["direct"].make(torch.float64)
    unused: Any = objective.model.unused
    gradient = backprop().estimate(objective, batch, KEY).gradient
    gradient.write()
    assert unused.grad is None
    assert gradient.unused == {"unused"}
    forward_gradient(2).estimate(objective, batch, KEY).gradient.write()
    assert unused.grad is not None
    assert bool(unused.grad.any())  # a direction is everywhere, also where the loss is level


@pytest.mark.parametrize("estimator", [backprop(), forward_gradient(2), mezo()], ids=repr)
def test_a_refused_estimator_changes_no_weight(estimator: Estimator):
    class Cut:
        def objective(self, key: Key) -> Objective:
            self.model = nn.Linear(3, 3)
            self.before = bits(self.model.weight)
            return Objective(self.model, lambda model, batch: model(batch).square().mean())

        def batch_at(self, key: Key, step: int) -> Tensor:
            return torch.ones(2, 3)

    task = Cut()
    with pytest.raises(ValueError, match=r"^a batch of 2 cannot be cut into 5 micro-batches"):
        next(train(task, Accumulated(estimator, 5), SGD(0.1), KEY))
    assert bits(task.model.weight) == task.before
