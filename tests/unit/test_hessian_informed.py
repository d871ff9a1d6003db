"""HessianInformed: a preconditioned gradient, and a preconditioner that follows the Hessian's diagonal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import Gaussian
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.hessian_informed import HessianInformed
from gradcost.estimators.presets import hizoo, mezo
from sampling import assert_mean
from snapshot import bits
from tables import OBJECTIVES
from vectors import direction, estimated, flat

KEY = Key(72)
State = dict[str, Tensor]


class Bowl(nn.Module):
    """sum_i h_i w_i^2 / 2, on which a central difference is exact at any eps."""

    def __init__(self, curvatures: Tensor) -> None:
        super().__init__()
        self.h, self.w = curvatures, nn.Parameter(torch.ones_like(curvatures))

    def forward(self) -> Tensor:
        return 0.5 * (self.h * self.w.square()).sum()


def bowl(*curvatures: float) -> tuple[Objective, Tensor]:
    h = torch.tensor(curvatures, dtype=torch.float64)
    return Objective(Bowl(h), lambda model, batch: model()), h


def held(inverse: Tensor) -> State:
    """A state in which Sigma^-1 has this diagonal."""
    return {"w": inverse.float()}


def test_the_first_estimate_is_mezos():
    objective, batch = OBJECTIVES["transformer"].make(torch.float64)
    found = hizoo(1e-3, 3).estimate(objective, batch, KEY)
    expected = mezo(1e-3, 3).estimate(objective, batch, KEY)
    assert torch.equal(found.slopes, expected.slopes)  # type: ignore[arg-type]
    assert torch.equal(flat(found.gradient), flat(expected.gradient))
    assert float(found.loss) == float(objective.evaluate(batch, KEY))
    assert found.gradient.nbytes == 48


@pytest.mark.parametrize("probes", [1, 3])
def test_the_mean_is_the_preconditioned_gradient(probes: int):
    objective, h = bowl(1.0, 5.0, 2.0)
    inverse = torch.tensor([4.0, 0.5, 1.0], dtype=torch.float64)
    estimator = HessianInformed(0.5, probes, 0.1)
    keys = [KEY.fold("draw", number) for number in range(1500)]
    drawn = [flat(estimator.estimate(objective, None, key, held(inverse)).gradient) for key in keys]
    assert_mean(torch.stack(drawn) - h / inverse, 0.0)


@pytest.mark.parametrize("probes", [1, 3])
def test_the_mean_of_the_update_is_the_stated_one(probes: int):
    """On a quadratic with a diagonal Hessian >= 0: (1 - a) S + a (h + tr(H / S) / 2 S), for S = Sigma^-1."""
    objective, h = bowl(1.0, 5.0, 2.0)
    inverse, share = torch.tensor([4.0, 0.5, 1.0], dtype=torch.float64), 0.3
    estimator = HessianInformed(0.5, probes, share)
    keys = [KEY.fold("draw", number) for number in range(1500)]
    states = [estimator.estimate(objective, None, key, held(inverse)).state for key in keys]
    drawn = torch.stack([state["w"].double() for state in states])  # type: ignore[index]
    averaged = h + 0.5 * (h / inverse).sum() * inverse
    assert_mean(drawn - ((1 - share) * inverse + share * averaged), 0.0)
    assert drawn.std() > 0.1


def test_what_is_averaged_in_is_the_curvature_along_the_direction_looked_along():
    """For one draw, computed here: |c| u^2 S with c = u' S^(-1/2) H S^(-1/2) u / 2, which may be negative."""
    objective, h = bowl(1.0, -5.0, 2.0)
    inverse, share = torch.tensor([4.0, 0.5, 1.0], dtype=torch.float64), 0.3
    signs = set()
    for number in range(12):
        found = HessianInformed(0.1, 1, share).estimate(objective, None, Key(number), held(inverse))
        assert isinstance(found.gradient, Seeded)
        u = direction(objective, Gaussian(), found.gradient.seeds[0])
        c = 0.5 * (h * u.square() / inverse).sum()
        signs.add(float(c) > 0)
        expected = (1 - share) * inverse + share * (c * u.square()).abs() * inverse
        assert (found.state["w"] - expected).abs().max() <= 1e-5 * expected.max()  # type: ignore[index]
        assert (flat(found.gradient) - (h @ (u / inverse.sqrt())) * u / inverse.sqrt()).abs().max() <= 1e-5
    assert signs == {True, False}


def test_the_preconditioner_stays_above_0_and_the_state_that_was_given_stays_as_it_is():
    objective, batch = OBJECTIVES["mlp"].make()
    estimator = HessianInformed(1e-2, 2, 0.5)
    state: Any = estimator.init(objective)
    for number in range(30):
        before = {name: bits(tensor) for name, tensor in state.items()}
        found = estimator.estimate(objective, batch, KEY.fold("step", number), state)
        assert {name: bits(tensor) for name, tensor in state.items()} == before
        assert all(bool((tensor > 0).all()) for tensor in found.state.values())  # type: ignore[union-attr]
        assert all(tensor.dtype == torch.float32 for tensor in found.state.values())  # type: ignore[union-attr]
        state = found.state


def test_in_proportion_to_the_hessian_it_stays_on_average():
    """The fixed point of the mean update: (1 + d/2) h."""
    objective, h = bowl(1.0, 10.0, 3.0, 30.0)
    fixed = (1 + len(h) / 2) * h
    keys = [KEY.fold("draw", number) for number in range(1500)]
    estimator = HessianInformed(0.5, 1, 0.3)
    drawn = [estimator.estimate(objective, None, key, held(fixed)).state["w"].double() / fixed for key in keys]  # type: ignore[index]
    assert_mean(torch.stack(drawn), 1.0)


def steps(estimator: Estimator, state: State | None, lr: float, seed: int) -> int:
    """Steps of gradient descent until the loss of an ill-conditioned bowl is 10^-4 of the first; 2,000 at most."""
    objective, h = bowl(*torch.logspace(0, 2, 10).tolist())
    weights, key = objective.leaves[0].parameter, Key(seed)
    first = float(h.sum())
    for step in range(2000):
        found = estimator.estimate(objective, None, key.fold("step", step), state)
        state = found.state
        with torch.no_grad():
            weights.sub_(lr * flat(found.gradient))
        now = float((h * weights.detach().square()).sum())
        if not now < 1e6 * first:
            return 2000
        if now <= 1e-4 * first:
            return step + 1
    return 2000


def test_with_the_curvature_learned_an_ill_conditioned_bowl_takes_a_fifth_of_mezos_steps():
    """Condition 100, ten weights, each at the best of its rates. From Sigma = I it takes no fewer steps than MeZO
    here: it learns the curvatures meanwhile, at a rate that the first of them must survive."""
    _, h = bowl(*torch.logspace(0, 2, 10).tolist())
    plain = min(sum(steps(mezo(1e-3), None, lr, seed) for seed in range(3)) for lr in (8e-3, 4e-3, 2e-3))
    state = held((1 + len(h) / 2) * h)
    informed = min(
        sum(steps(HessianInformed(1e-3, 1, 1e-6), state, lr, seed) for seed in range(3)) for lr in (0.7, 0.5, 0.35)
    )
    assert 5 * informed < plain < 3 * 2000


def test_half_precision_weights_are_moved_by_float32_noise_rounded_once():
    objective, batch = OBJECTIVES["mlp"].make(torch.bfloat16)
    state = HessianInformed(1e-2, 1, 0.5).estimate(objective, batch, KEY).state
    found = HessianInformed(1e-2, 1, 0.5).estimate(objective, batch, KEY.fold("next"), state)
    assert all(leaf.dtype == torch.bfloat16 and bool(leaf.isfinite().all()) for _, leaf in found.gradient.leaves())


REFUSED: list[tuple[Any, str]] = [
    (lambda: HessianInformed(0.0), "must be above 0, not 0.0."),
    (lambda: HessianInformed(probes=0), "1 or more, not 0."),
    (lambda: HessianInformed(smoothing=1.0), "between 0 and 1, not 1.0."),
    (lambda: HessianInformed(smoothing=0.0), "between 0 and 1, not 0.0."),
]


@pytest.mark.parametrize(("make", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_what_cannot_be_is_refused_in_a_sentence(make: Any, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_the_same_state_and_key_give_the_same_estimate():
    objective, batch = OBJECTIVES["mlp"].make()
    one, other = (estimated(HessianInformed(1e-2, 2, 0.5), objective, batch, KEY) for _ in range(2))
    assert torch.equal(one, other)
