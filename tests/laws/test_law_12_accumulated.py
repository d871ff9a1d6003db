"""Law 12. Micro-batches give the estimate of the batch: the mean, weighted by size, along the same directions."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from gradcost import SGD, Objective, backprop, forecast, mezo, train, zo_svrg
from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.structure import micro_batches
from tables import ESTIMATORS, OBJECTIVES, grid
from vectors import flat

KEY = Key(12)
ALONE = [name for name, problem in OBJECTIVES.items() if not (problem.draws or problem.mixes)]


ROWS = {name: row for name, row in ESTIMATORS.items() if "accumulated" not in name}  # 7 examples make 7 parts at most


def step(value: Any) -> float | None:
    """Return the eps of the finite differences at any depth of an estimator; None without any."""
    if isinstance(getattr(value, "eps", None), float):
        return value.eps
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    parts = [getattr(value, part.name) for part in fields]
    return next((eps for eps in map(step, parts) if eps is not None), None)


@pytest.mark.parametrize("parts", [3, 7], ids="in {} parts".format)
@grid(lambda name, objective: name in ROWS and objective in ALONE, without="direct")
def test_parts_of_any_size_give_the_estimate_of_the_whole(estimator: str, objective: str, parts: int):
    """A batch of 7 in 3 parts, of unequal sizes, and in 7, of one example each."""
    made, batch = OBJECTIVES[objective].make(torch.float64)
    inner = ROWS[estimator].estimator
    whole = inner.estimate(made, batch, KEY)
    found = Accumulated(inner, parts).estimate(made, batch, KEY)
    assert float(found.loss) == pytest.approx(float(whole.loss), rel=1e-12)
    expected, got, eps = flat(whole.gradient), flat(found.gradient), step(inner)
    # Ends that differ by a few roundings of a loss of about 1 give slopes that differ by those over eps.
    rounding = 0.0 if eps is None else 16 * 2.2e-16 / eps
    assert (got - expected).abs().max() <= (1e-12 + rounding) * expected.abs().max()
    assert found.clipped == whole.clipped


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row.blocks])
def test_accumulating_twice_is_accumulating_the_product(name: str):
    made, batch = OBJECTIVES["mlp"].make(torch.float64)
    estimator = ESTIMATORS[name].estimator
    once = Accumulated(estimator, 6).estimate(made, batch, KEY)
    twice = Accumulated(Accumulated(estimator, 3), 2).estimate(made, batch, KEY)
    assert torch.equal(flat(once.gradient), flat(twice.gradient))


@pytest.mark.parametrize("estimator", [backprop(), mezo(), Accumulated(backprop(), 2), zo_svrg(every=2)], ids=repr)
def test_the_last_smaller_batch_of_an_epoch_has_fewer_parts(estimator: Estimator):
    """A training of 21 examples in batches of 4 ended at the sixth step."""
    x = torch.randn(21, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ends = []
    for method in (estimator, Accumulated(estimator, 4 // micro_batches(estimator))):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3, dtype=torch.float64)
        batches = list(x.split(4))
        made = Objective(model, lambda model, batch: model(batch).square().mean(), data=lambda b=batches: b)
        assert len(list(train(made, batches, method, SGD(1e-3), KEY))) == 6
        ends.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-8)


def test_a_first_batch_with_fewer_examples_than_parts_is_refused():
    batch = torch.ones(3, 5)
    made = Objective(torch.nn.Linear(5, 3), lambda model, batch: model(batch).square().mean())
    for ask in (lambda e: e.objection(made, batch), lambda e: forecast(e, made, batch)):
        for estimator in (Accumulated(backprop(), 4), Accumulated(Accumulated(mezo(), 2), 2)):
            with pytest.raises(BadInput, match="cannot be cut into 4 micro-batches"):
                ask(estimator)


def test_a_frozen_list_of_leaves_stays_the_same_in_parts():
    """The leaves are those of the moment when the objective is made, also for micro-batches that are cut later."""
    made, _ = OBJECTIVES["mlp"].make()
    made.leaves[0].parameter.requires_grad_(False)
    assert made.in_micro_batches(3).leaves == made.leaves
    assert made.in_micro_batches(3).dimension == made.dimension
