"""Law 13. At the snapshot, on any batch and under any key, the variance-reduced gradient is the full gradient there,
bit for bit; the snapshot shares no storage with the live weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import backprop
from gradcost.estimators.reverse import Reverse
from gradcost.estimators.variance_reduced import Snapshot, VarianceReduced, full_gradient
from snapshot import bits, differences, snapshot
from tables import ESTIMATORS, OBJECTIVES, REPRESENTATIVE, Problem
from vectors import estimated, flat

KEY = Key(13)
EACH = pytest.mark.parametrize("name", ["gaussian-jvp", "checkpointed", *REPRESENTATIVE])


def problem(name: str) -> Problem:
    """Return a model with dropout, tied weights and blocks; one with few leaves for a row that probes each leaf."""
    return OBJECTIVES["mlp" if name.startswith("adaptive") else "transformer"]


def snapshot_in(state: Any) -> Snapshot:
    assert isinstance(state, Snapshot)
    return state


def made() -> tuple[Objective, Any]:
    """Return data of 7 examples in batches of 3, 3 and 1, in float64, and the second of these as the batch."""
    objective, batch = OBJECTIVES["transformer"].make(torch.float64)
    parts = [tuple(part[at : at + 3] for part in batch) for at in (0, 3, 6)]
    return replace(objective, data=lambda: parts), parts[1]


def moved(objective: Objective, size: float = 1e-2) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for leaf in objective.leaves:
            noise = torch.randn(leaf.parameter.shape, generator=generator, dtype=leaf.parameter.dtype)
            leaf.parameter.add_(size * noise)


def snapshot_of(estimator: VarianceReduced, objective: Objective, batch: Any) -> tuple[Tensor, Snapshot]:
    found = estimator.estimate(objective, batch, KEY)
    assert isinstance(found.state, Snapshot)
    return flat(found.gradient), found.state


@EACH
def test_at_the_snapshot_the_gradient_is_the_full_one_bit_for_bit(name: str):
    objective, batch = problem(name).make()
    estimator = VarianceReduced(ESTIMATORS[name].estimator, 10)
    state = estimator.init(objective)
    for number in range(3):  # on the snapshot's batch, then on others: the weights are still those of the snapshot
        other = tuple(part.flip(0)[number:] for part in batch)
        found = estimator.estimate(objective, other, KEY.fold("step", number), state)
        state = snapshot_in(found.state)
        for leaf, (_, gradient) in zip(objective.leaves, found.gradient.leaves(), strict=True):
            assert bits(gradient) == bits(state.gradient[leaf.name])
    assert any(tensor.abs().max() > 0 for tensor in state.gradient.values())


@EACH
def test_away_from_it_both_points_are_probed_along_the_same_directions(name: str):
    """The gradient is the inner estimate here, less the one at the snapshot with the same key, plus mu."""
    objective, batch = problem(name).make(torch.float64)
    inner = ESTIMATORS[name].estimator
    estimator = VarianceReduced(inner, 10)
    full, state = snapshot_of(estimator, objective, batch)
    key = KEY.fold("step", 1)
    there = flat(inner.estimate(objective, batch, key, state.inner).gradient)
    moved(objective)
    here = flat(inner.estimate(objective, batch, key, state.inner).gradient)
    before = snapshot(objective.model)
    found = flat(estimator.estimate(objective, batch, key, state).gradient)
    assert differences(before, snapshot(objective.model)) == []
    if ESTIMATORS[name].unbiased:  # clipped slopes and signs may be equal at both points
        assert (here - there).norm() > 0
    assert (found - (here - there + full)).abs().max() <= 1e-12 * (here.abs().max() + full.abs().max())


@pytest.mark.parametrize("anchor", [None, backprop(), ESTIMATORS["gaussian-jvp3"].estimator], ids=repr)
def test_the_full_gradient_is_the_mean_over_the_data_weighted_by_examples(anchor: Estimator | None):
    """Batches of 3, 3 and 1: each of the 7 examples has the same weight, and each batch has other directions."""
    objective, batch = made()
    inner = ESTIMATORS["rademacher-jvp"].estimator
    full, _ = snapshot_of(VarianceReduced(inner, 10, anchor), objective, batch)
    assert objective.data is not None
    each = [
        estimated(anchor or inner, objective, part, KEY.fold("anchor", number))
        for number, part in enumerate(objective.data())
    ]
    expected = (3 * each[0] + 3 * each[1] + each[2]) / 7
    assert (full - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_in_half_precision_the_mean_of_many_batches_does_not_stop_changing():
    """The last of 2,000 batches moves the mean by 1/2000 of a difference, less than bfloat16 resolves."""
    objective, batch = OBJECTIVES["mlp"].make(torch.bfloat16)
    whole = [batch] * 400 + [tuple(part.flip(0)[:7] for part in batch)] * 1600
    shifted = [(x + (number >= 400), y) for number, (x, y) in enumerate(whole)]
    found = full_gradient(Reverse(), replace(objective, data=lambda: shifted), KEY)
    one, other = (dict(backprop().estimate(objective, shifted[at], KEY).gradient.leaves()) for at in (0, -1))
    for leaf in objective.leaves:
        assert found[leaf.name].dtype == torch.bfloat16
        expected = 0.2 * one[leaf.name].float() + 0.8 * other[leaf.name].float()
        size = max(one[leaf.name].abs().max(), other[leaf.name].abs().max())
        assert (found[leaf.name].float() - expected).abs().max() <= 2**-8 * size


@EACH
def test_the_snapshot_shares_no_storage_with_the_live_weights(name: str):
    objective, batch = problem(name).make()
    _, state = snapshot_of(VarianceReduced(ESTIMATORS[name].estimator), objective, batch)
    live = {leaf.parameter.untyped_storage().data_ptr() for leaf in objective.leaves}
    names = [leaf.name for leaf in objective.leaves]
    assert list(state.weights) == list(state.gradient) == names
    for tensor in (*state.weights.values(), *state.gradient.values()):
        assert tensor.untyped_storage().data_ptr() not in live
    held = {name: bits(tensor) for name, tensor in state.weights.items()}
    assert held == {leaf.name: bits(leaf.parameter) for leaf in objective.leaves}
    moved(objective)
    assert held == {name: bits(tensor) for name, tensor in state.weights.items()}
    assert held != {leaf.name: bits(leaf.parameter) for leaf in objective.leaves}


def test_a_new_snapshot_is_made_every_few_steps():
    objective, batch = made()
    estimator = VarianceReduced(ESTIMATORS["rademacher-jvp"].estimator, 3)
    state, seen = estimator.init(objective), []
    for number in range(7):
        found = estimator.estimate(objective, batch, KEY.fold("step", number), state)
        state = snapshot_in(found.state)
        seen.append(bits(state.weights["positions"]))
        at = all(torch.equal(state.weights[leaf.name], leaf.parameter) for leaf in objective.leaves)
        assert at == (number % 3 == 0)
        assert torch.equal(flat(found.gradient), torch.cat([t.flatten() for t in state.gradient.values()])) == at
        moved(objective)
    assert len(set(seen)) == 3


def test_the_estimate_is_a_function_of_its_state():
    """The same state gives the same estimate twice: an estimate changes nothing in it and stores nothing outside."""
    objective, batch = made()
    estimator = VarianceReduced(ESTIMATORS["gaussian-central"].estimator, 2)
    _, state = snapshot_of(estimator, objective, batch)
    moved(objective)
    held = [bits(tensor) for part in (state.weights, state.gradient) for tensor in part.values()]
    one, other = (estimator.estimate(objective, batch, KEY.fold("step", 1), state) for _ in range(2))
    assert torch.equal(flat(one.gradient), flat(other.gradient))
    used: list[Tensor] = []
    estimator.stream(objective, batch, KEY, lambda name, gradient: used.append(gradient.zero_()), one.state)
    assert held == [bits(tensor) for part in (state.weights, state.gradient) for tensor in part.values()]


@pytest.mark.parametrize("data", [None, list], ids=["no data", "no batch"])
def test_an_objective_without_data_is_refused(data: Any):
    objective, batch = OBJECTIVES["mlp"].make()
    without = replace(objective, data=data)
    estimator = VarianceReduced(Reverse())
    match = "variance reduction passes over all of the data, and this" if data is None else "yielded no batch, so"
    with pytest.raises(ValueError, match=match):
        estimator.estimate(without, batch, KEY)
    if data is None:
        assert match in str(estimator.objection(without, batch))
    assert estimator.objection(objective, batch) is None


def test_the_draws_of_the_data_depend_on_the_key_alone():
    objective, _ = made()
    x, y = made()[1]

    def data() -> Any:
        for _ in range(3):
            yield x, torch.where(torch.rand(()) < 0.5, y, y.flip(0))

    augmented = replace(objective, data=data)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(full_gradient(backprop(), augmented, KEY))
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
