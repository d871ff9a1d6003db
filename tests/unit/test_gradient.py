"""Gradients: what is replayed, written, counted in bytes, sent and made again."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import Gaussian, Rademacher
from gradcost.estimators.gradient import Dense, Gradient, Seeded
from gradcost.estimators.presets import backprop, mezo
from gradcost.estimators.surrogate import as_loss
from snapshot import bits
from tables import DIRECTIONS, ESTIMATORS, OBJECTIVES

KEY = Key(40)


def gradient_of(estimator: str, objective: str, dtype: torch.dtype = torch.float32) -> tuple[Objective, Gradient]:
    made, batch = OBJECTIVES[objective].make(dtype)
    found = ESTIMATORS[estimator].estimator.estimate(made, batch, KEY).gradient
    assert found is not None
    return made, found


def test_frozen_parameters_get_no_grad():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False))
    objective = Objective(model, lambda model, batch: model(batch).square().mean())
    for estimator in (backprop(), mezo()):
        gradient = estimator.estimate(objective, torch.ones(4, 3), KEY).gradient
        gradient.write()
        assert [parameter.grad is None for parameter in model.parameters()] == [False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_seeded_gradient_keeps_16_bytes_a_probe_and_a_dense_one_its_tensors(dtype: torch.dtype):
    for name in ("tiny", "transformer"):
        _, seeded = gradient_of("gaussian-central", name, dtype)
        assert seeded.nbytes == 2 * 16
        assert isinstance(seeded, Seeded)
        assert len(seeded.to_bytes()) == seeded.nbytes
        made, dense = gradient_of("backprop", name, dtype)
        assert dense.nbytes == made.dimension * dtype.itemsize


@pytest.mark.parametrize("estimator", ["backprop", "gaussian-central"])
def test_the_caller_owns_a_replayed_leaf(estimator: str):
    _, gradient = gradient_of(estimator, "mlp")
    before = [bits(leaf) for _, leaf in gradient.leaves()]
    for _, leaf in gradient.leaves():
        leaf.zero_()
    assert [bits(leaf) for _, leaf in gradient.leaves()] == before


def test_a_replay_does_not_depend_on_the_weights():
    """A seeded gradient is of its seeds alone: it is the same after the step that it made."""
    made, gradient = gradient_of("gaussian-jvp", "mlp")
    before = [bits(leaf) for _, leaf in gradient.leaves()]
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.fill_(torch.inf)
    assert [bits(leaf) for _, leaf in gradient.leaves()] == before


@pytest.mark.parametrize(
    ("estimator", "objective"), [("gaussian-central", "mlp"), ("backprop", "mlp"), ("spsa", "transformer")]
)
def test_the_norm_is_over_all_leaves(estimator: str, objective: str):
    _, gradient = gradient_of(estimator, objective)
    expected = torch.cat([leaf.double().flatten() for _, leaf in gradient.leaves()]).norm()
    assert gradient.norm() == pytest.approx(float(expected), rel=1e-12)


# ---- write


WRITTEN = ("backprop", "gaussian-central", "spsa", "sign-central", "mixed-backprop-central")


@pytest.mark.parametrize("estimator", [name for name in WRITTEN if name in ESTIMATORS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulating_has_the_bits_of_backward(estimator: str, dtype: torch.dtype):
    """Law: write(accumulate=True, scale=s) adds s * gradient to `.grad`, as `(s * loss).backward()` does."""
    row = ESTIMATORS[estimator].estimator
    made, batch = OBJECTIVES["transformer"].make(dtype)
    other, _ = OBJECTIVES["transformer"].make(dtype)
    for number, scale in enumerate((0.5, 0.25, 1.0)):
        key = KEY.fold("micro-batch", number)
        row.estimate(made, batch, key).gradient.write(accumulate=True, scale=scale)
        (scale * as_loss(row.estimate(other, batch, key))).backward()
    for leaf, expected in zip(made.leaves, other.leaves, strict=True):
        assert leaf.parameter.grad is not None
        assert bits(leaf.parameter.grad) == bits(expected.parameter.grad), leaf.name


@pytest.mark.parametrize("estimator", ["backprop", "gaussian-central"])
def test_micro_batches_by_hand_are_the_batch(estimator: str):
    """k calls with scale 1/k are `Accumulated`: no micro-batch is lost. A call without `accumulate` replaces."""
    row = ESTIMATORS[estimator].estimator
    made, batch = OBJECTIVES["mlp"].make(torch.float64)
    rows = len(batch[0]) // 2 * 2
    batch = batch[0][:rows], batch[1][:rows]
    for _ in range(2):
        made.model.zero_grad()
        for half in (slice(0, rows // 2), slice(rows // 2, rows)):
            piece = batch[0][half], batch[1][half]
            row.estimate(made, piece, KEY).gradient.write(accumulate=True, scale=0.5)
    whole = dict(row.estimate(made, batch, KEY).gradient.leaves())
    for leaf in made.leaves:
        assert leaf.parameter.grad is not None
        torch.testing.assert_close(leaf.parameter.grad, whole[leaf.name], rtol=1e-6, atol=1e-9)
    row.estimate(made, batch, KEY).gradient.write(scale=2.0)
    for leaf in made.leaves:
        assert leaf.parameter.grad is not None
        assert torch.equal(leaf.parameter.grad, 2.0 * whole[leaf.name])


def test_a_sparse_gradient_adds_to_a_dense_one_and_the_other_way_round():
    def objective(sparse: bool) -> Objective:
        model = nn.Embedding(6, 3, sparse=sparse)
        nn.init.ones_(model.weight)
        return Objective(model, lambda model, batch: model(batch).square().sum())

    batch = torch.tensor([0, 2, 2])
    for first, second in ((True, True), (True, False), (False, True)):
        written = objective(first)
        backprop().estimate(written, batch, KEY).gradient.write(accumulate=True)
        other = backprop().estimate(objective(second), batch, KEY).gradient
        assert isinstance(other, Dense)
        Dense(written, other.tensors).write(accumulate=True, scale=2.0)
        grad = written.leaves[0].parameter.grad
        assert isinstance(grad, Tensor)
        assert grad.is_sparse == (first and second)
        assert grad.to_dense()[:, 0].tolist() == [6.0, 0.0, 12.0, 0.0, 0.0, 0.0]


def test_a_factor_that_is_not_finite_is_refused():
    _, gradient = gradient_of("gaussian-central", "mlp")
    for scale in (float("nan"), float("inf")):
        with pytest.raises(BadInput, match="finite"):
            gradient.write(accumulate=True, scale=scale)


# ---- messages


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(3, 3))


def small() -> Objective:
    return Objective(Sparse(), lambda model, batch: torch.zeros(()))


@given(
    entries=st.lists(
        st.tuples(st.integers(0, 2**64 - 1), st.floats(allow_nan=False, allow_infinity=False)), min_size=0, max_size=6
    )
)
@example(entries=[(2**63 + 12345, 0.5), (1, -2.0), (2**64 - 1, 1e-300)])
def test_a_message_is_read_back_to_the_last_bit(entries: list[tuple[int, float]]):
    """Also seeds on both sides of 2^63 together, which numpy would make float64 of."""
    seeds, coefficients = tuple(seed for seed, _ in entries), tuple(number for _, number in entries)
    sent = Seeded(small(), Gaussian(), seeds, coefficients)
    message = sent.to_bytes()
    assert message == b"".join(struct.pack("<Qd", seed, number) for seed, number in entries)
    read = Seeded.from_bytes(message, small(), Gaussian())
    assert (read.seeds, read.coefficients) == (seeds, coefficients)
    assert {type(seed) for seed in read.seeds} <= {int}
    assert {type(number) for number in read.coefficients} <= {float}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_message_read_on_another_copy_of_the_model_is_the_same_gradient(name: str):
    made, gradient = gradient_of(f"{name}-central", "transformer")
    assert isinstance(gradient, Seeded)
    copy, _ = OBJECTIVES["transformer"].make()
    assert copy.model is not made.model
    read = Seeded.from_bytes(gradient.to_bytes(), copy, DIRECTIONS[name])
    assert [bits(leaf) for _, leaf in read.leaves()] == [bits(leaf) for _, leaf in gradient.leaves()]
    read.write()
    assert all(parameter.grad is not None for parameter in copy.model.parameters())


def test_a_message_of_half_an_entry_is_refused():
    with pytest.raises(ValueError):
        Seeded.from_bytes(b"\0" * 24, small(), Gaussian())


def test_scaling_scales_each_probe():
    gradient = Seeded(small(), Rademacher(), (1, 2), (0.5, -2.0))
    assert gradient.scaled([2.0, 0.25]).coefficients == (1.0, -0.5)
    assert gradient.scaled([2.0, 0.25]).seeds == gradient.seeds
    with pytest.raises(ValueError):
        gradient.scaled([1.0])


def test_a_seeded_gradient_is_the_sum_of_its_probes():
    objective = small()
    parts: list[list[Tensor]] = [
        [leaf for _, leaf in Seeded(objective, Gaussian(), (seed,), (scale,)).leaves()]
        for seed, scale in ((3, 0.5), (4, -2.0))
    ]
    whole = [leaf for _, leaf in Seeded(objective, Gaussian(), (3, 4), (0.5, -2.0)).leaves()]
    for one, other, both in zip(*parts, whole, strict=True):
        assert torch.equal(one + other, both)


def test_reprs_say_what_is_kept():
    objective = small()
    assert repr(Seeded(objective, Gaussian(), (1, 2), (0.0, 0.0))) == "Seeded(Gaussian(), 2 probes, 32 bytes)"
    dense = Dense(objective, {leaf.name: torch.zeros_like(leaf.parameter) for leaf in objective.leaves})
    assert repr(dense) == "Dense(2 parameters, 56 bytes)"
