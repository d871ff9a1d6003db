"""The tables of the laws: no row occurs twice, the representatives are representative, and stated facts hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from gradcost.core.key import Key
from gradcost.directions import StatefulDirections
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.gradient import Seeded
from gradcost.slopes.slope import Slope
from snapshot import bits
from tables import ESTIMATORS, OBJECTIVES, PRESETS, REPRESENTATIVE
from vectors import flat, true_gradient

KEY = Key(50)


def parts(value: Any) -> Iterator[Any]:
    """Yield a value and, at any depth, those in its fields."""
    yield value
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from parts(getattr(value, field.name))


def kinds(estimator: Estimator) -> set[type]:
    return {type(part) for part in parts(estimator) if isinstance(part, Estimator | Slope | StatefulDirections)}


def test_no_estimator_has_two_rows():
    assert len({row.estimator for row in ESTIMATORS.values()}) == len(ESTIMATORS)


def test_presets_are_rows():
    assert {name: ESTIMATORS[name].estimator for name in PRESETS} == PRESETS


def test_the_representatives_include_every_wrapper_slope_and_kind_of_stateful_directions():
    of_all = set().union(*(kinds(row.estimator) for row in ESTIMATORS.values()))
    assert set().union(*(kinds(ESTIMATORS[name].estimator) for name in REPRESENTATIVE)) == of_all


def test_an_estimator_states_that_it_is_unbiased_if_its_row_does():
    """Law 3 measures this of the rows."""
    stated = {name: row.estimator.unbiased for name, row in ESTIMATORS.items()}
    assert stated == {name: row.unbiased for name, row in ESTIMATORS.items()}


def test_an_estimator_states_that_it_is_exact_if_it_finds_the_gradient_of_the_batch():
    """The objective's data is another batch, so that a snapshot's full gradient is not the batch's."""
    objective, batch = OBJECTIVES["mlp"].make(torch.float64)
    objective = dataclasses.replace(objective, data=lambda: [tuple(part[:5] for part in batch)])
    grad = true_gradient(objective, batch, KEY)
    measured, stated = {}, {}
    for name, row in ESTIMATORS.items():
        found = flat(row.estimator.estimate(objective, batch, KEY).gradient)
        measured[name] = bool((found - grad).abs().max() <= 1e-12 * grad.abs().max())
        stated[name] = row.estimator.exact
    assert stated == measured
    assert set(stated.values()) == {True, False}


def test_coefficients_are_in_proportion_to_slopes_where_an_estimator_states_it():
    """With one factor for all keys."""
    objective, batch = OBJECTIVES["mlp"].make(torch.float64)
    names = [name for name, row in ESTIMATORS.items() if row.estimator.scales_with_slopes]
    assert names
    for name in names:
        ratios = []
        for number in range(2):
            found = ESTIMATORS[name].estimator.estimate(objective, batch, KEY.fold("step", number))
            assert isinstance(found.gradient, Seeded), name
            assert found.slopes is not None
            ratios.append(torch.tensor(found.gradient.coefficients, dtype=torch.float64) / found.slopes)
        assert torch.cat(ratios).std() <= 1e-12 * ratios[0].abs().max(), name


def test_a_replayable_gradient_has_the_same_bits_after_the_weights_have_moved():
    names = [name for name, row in ESTIMATORS.items() if row.estimator.replayable]
    assert names
    for name in names:
        objective, batch = OBJECTIVES["mlp"].make()
        gradient = ESTIMATORS[name].estimator.estimate(objective, batch, KEY).gradient
        assert isinstance(gradient, Seeded), name
        before = [bits(leaf) for _, leaf in gradient.leaves()]
        with torch.no_grad():
            for leaf in objective.leaves:
                leaf.parameter.mul_(1.5)
        again = Seeded(objective, gradient.directions, gradient.seeds, gradient.coefficients)
        assert [bits(leaf) for _, leaf in again.leaves()] == before, name
