"""The error of a difference against its eps, what rounding leaves of a perturbation, and the eps that is chosen."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective
from gradcost.core.precision import (
    LEAST_SCALE,
    LOSSES_IN_FLOAT32,
    best_eps,
    best_forward_eps,
    coarsest,
    loss_roundoff,
    scale_of,
    spacing,
    unit_roundoff,
)
from gradcost.directions import Coordinates, Gaussian, Rademacher
from gradcost.estimators.presets import backprop, forward_gradient, mezo, spsa
from gradcost.estimators.probing import Probing
from gradcost.slopes import forward_mode
from gradcost.slopes.rounding_check import loss_noise, rounded_leaves
from gradcost.slopes.rules import RULES
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp, Slope, shifted
from gradcost.tasks.architectures import Gpt
from gradcost.theory.differences import central_error, forward_error, survives
from tables import OBJECTIVES, cross_entropy

KEY = Key(45)
TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
EPS = [10 ** (-8 + number / 4) for number in range(33)]  # 1e-8 to 1


# ---- one number


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("number", [1.0, 1.999, 2.0, -3.0, 0.02, 1e-4, 777.0])
def test_the_spacing_is_the_distance_to_the_next_number(number: float, dtype: torch.dtype):
    here = torch.tensor(number, dtype=dtype).abs()
    above = torch.nextafter(here, torch.tensor(math.inf, dtype=dtype))
    assert spacing(float(here), dtype) == float(above.double() - here.double())
    assert unit_roundoff(dtype) == spacing(1.0, dtype) / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight", [1.0, 1.3, 0.02, 0.25, -1.0])
@pytest.mark.parametrize("eps", [1e-4, 1e-3, 4e-3, 0.05])
def test_what_rounding_leaves_of_a_perturbation_is_what_it_leaves(eps: float, weight: float, dtype: torch.dtype):
    base = torch.tensor(weight, dtype=dtype).double()
    with seeded_generators(KEY):
        meant = eps * torch.randn(400_000, dtype=torch.float64)
    left = (base + meant).to(dtype).double() - base
    found = survives(eps, float(base), dtype)
    if eps < abs(weight) / 3:  # within one spacing
        cosine = float(meant @ left / (meant.norm() * left.norm()).clamp_min(1e-300))
        assert found.cosine == pytest.approx(cosine, abs=0.01)
        assert found.ratio == pytest.approx(float(meant @ left / (meant @ meant)), abs=0.01)
        assert found.lost == pytest.approx(float((left == 0).double().mean()), abs=0.005)
    assert 0 <= found.cosine <= 1


def test_the_figures_of_the_known_trap():
    """At eps = 1e-3 a bfloat16 weight of 1 loses 97% of the perturbation (cosine 0.37), a float16 one 28%."""
    bfloat16, float16 = survives(1e-3, 1.0, torch.bfloat16), survives(1e-3, 1.0, torch.float16)
    assert (round(bfloat16.lost, 2), round(bfloat16.cosine, 2)) == (0.97, 0.37)
    assert round(float16.lost, 2) == 0.28


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_sizes_that_are_none_are_refused(bad: float):
    with pytest.raises(ValueError, match="finite and above 0"):
        best_eps(torch.float32, bad)
    with pytest.raises(ValueError, match="finite and above 0"):
        best_forward_eps(torch.float32, loss=bad)
    for refused in (
        lambda: central_error(bad, torch.float32, 1, 1),
        lambda: survives(bad, 1.0, torch.float16),
        lambda: CentralDifference(bad),
    ):
        with pytest.raises(ValueError, match="must be above 0"):
            refused()


# ---- the V of the error


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_best_eps_is_at_the_foot_of_the_v(dtype: torch.dtype):
    for loss, derivative in ((1.0, 1.0), (3.0, 0.2), (0.1, 50.0)):
        best = best_eps(dtype, 1.0, loss, derivative)
        assert central_error(best, dtype, loss, derivative) <= min(
            central_error(best * factor, dtype, loss, derivative) for factor in (0.99, 1.01)
        )
        best = best_forward_eps(dtype, 1.0, loss, derivative)
        assert forward_error(best, dtype, loss, derivative) <= min(
            forward_error(best * factor, dtype, loss, derivative) for factor in (0.99, 1.01)
        )
        assert best_eps(dtype, 0.3) == pytest.approx(0.3 * best_eps(dtype))


Measured = tuple[Callable[[float], float], float, float, float]  # eps -> RMS error; |f|, |f''|, |f'''|


def one_dimension() -> Measured:
    """exp(sin x) + 1, rounded once to float32, about 64 points, against its derivatives."""
    x = torch.linspace(0.1, 3.0, 64, dtype=torch.float64)

    def f(t: Tensor) -> Tensor:
        return (torch.exp(torch.sin(t)) + 1).float().double()

    def error(eps: float) -> float:
        return rms((f(x + eps) - f(x - eps)) / (2 * eps) - slope)

    sine, cosine, size = x.sin(), x.cos(), torch.exp(x.sin())
    slope = cosine * size
    second = (cosine**2 - sine) * size
    third = (cosine**3 - 3 * sine * cosine - cosine) * size
    return error, rms(f(x)), rms(second), rms(third)


def network(kind: type[CentralDifference] | type[ForwardDifference]) -> Measured:
    """The slope of an MLP's float32 loss along 24 directions, against the loss in float64."""
    with seeded_generators(KEY):
        model = nn.Sequential(nn.Linear(20, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 10))
        x, y = torch.randn(64, 20), torch.randint(10, (64,))
    objective, exact = Objective(model, cross_entropy), Objective(copy.deepcopy(model).double(), cross_entropy)
    batch, seeds, h = (x.double(), y), range(24), 2e-3

    def at(step: float) -> Tensor:
        return torch.stack([shifted(exact, batch, KEY, Gaussian(), seed, step) for seed in seeds])

    here, one, other, two, another = at(0.0), at(h), at(-h), at(2 * h), at(-2 * h)
    slope = (8 * (one - other) - (two - another)) / (12 * h)
    second, third = (one - 2 * here + other) / h**2, (two - 2 * one + 2 * other - another) / (2 * h**3)

    def error(eps: float) -> float:
        return rms(kind(eps).measure(objective, (x, y), KEY, Gaussian(), seeds)[1] - slope)

    return error, rms(here), rms(second), rms(third)


def rms(numbers: Tensor) -> float:
    return float(numbers.double().square().mean().sqrt())


def assert_a_v(measured: Callable[[float], float], best: float, predicted: float) -> None:
    errors = {eps: measured(eps) for eps in EPS}
    least = min(errors, key=lambda eps: errors[eps])
    assert best / 3 < least < 3 * best
    assert errors[least] < 3 * predicted
    assert predicted < 3 * measured(best)
    assert measured(best) < 3 * errors[least]
    assert errors[EPS[0]] > 30 * errors[least]  # a V: both of its arms are high
    assert errors[EPS[-1]] > 30 * errors[least]


def test_a_function_of_one_number_has_its_least_error_at_the_best_eps():
    error, loss, _, third = one_dimension()
    best = best_eps(torch.float32, 1.0, loss, third)
    assert_a_v(error, best, central_error(best, torch.float32, loss, third))


def test_the_slope_of_a_network_has_its_least_error_at_the_best_eps():
    error, loss, _, third = network(CentralDifference)
    best = best_eps(torch.float32, 1.0, loss, third)
    assert_a_v(error, best, central_error(best, torch.float32, loss, third))
    error, loss, second, _ = network(ForwardDifference)
    best = best_forward_eps(torch.float32, 1.0, loss, second)
    assert_a_v(error, best, forward_error(best, torch.float32, loss, second))


# ---- the eps that is chosen


def gpt(dtype: torch.dtype) -> tuple[Objective, Any]:
    """LayerNorm's weights are 1 and all others about 0.02, as before a training."""
    with seeded_generators(KEY):
        model, words = Gpt(layers=3, width=64, heads=4).build((16,), 40), torch.randint(40, (8, 17))
    return Objective(model.to(dtype), cross_entropy), (words[:, :-1], words[:, 1:])


@pytest.mark.filterwarnings("ignore::gradcost.core.notes.Note")
@pytest.mark.parametrize(
    ("kind", "dtype", "error"),
    [
        (CentralDifference, torch.float32, 0.002),
        (CentralDifference, torch.float16, 0.03),
        (CentralDifference, torch.bfloat16, 0.1),
        (ForwardDifference, torch.float32, 0.01),
        (ForwardDifference, torch.float16, 0.1),
        (ForwardDifference, torch.bfloat16, 0.25),
    ],
)
def test_the_chosen_eps_keeps_the_perturbation_and_measures_the_slope(
    kind: type[CentralDifference] | type[ForwardDifference], dtype: torch.dtype, error: float
):
    """On a transformer whose weights are of two sizes, against the function of the same weights in float64. The share
    of the slope that is error: 0.06% in float32, 1% in float16 and 5% in bfloat16 (0.5%, 6% and 16% one-sided)."""
    objective, batch = gpt(dtype)
    exact = Objective(copy.deepcopy(objective.model).double(), cross_entropy)
    seeds = range(16)
    _, slopes = CentralDifference(1e-5).measure(exact, batch, KEY, Gaussian(), seeds)
    _, found = kind().measure(objective, batch, KEY, Gaussian(), seeds)
    assert rms(found - slopes) < error * rms(slopes)
    cosine, leaves = rounded_leaves(objective, Gaussian(), 0, kind().step(objective))
    assert cosine > 0.99
    bulk = [one for one in leaves if "weight" in one.leaf.name and "norm" not in one.leaf.name]
    assert all(one.cosine > 0.95 for one in bulk)


def test_the_scale_is_that_of_the_bulk_of_the_weights():
    objective, _ = gpt(torch.float32)
    assert 0.01 < scale_of(objective) < 0.03
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert scale_of(gpt(dtype)[0]) == pytest.approx(scale_of(objective), rel=1e-3)
    model = nn.Linear(6, 4)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    assert scale_of(Objective(model, cross_entropy)) == LEAST_SCALE
    nn.init.constant_(model.weight, -3.0)
    assert scale_of(Objective(model, cross_entropy)) == pytest.approx(3.0 * 24 / 28)


def test_the_scale_of_a_large_half_precision_leaf_is_found_in_pieces():
    model = nn.Linear(1500, 1500, bias=False, dtype=torch.float16)
    nn.init.constant_(model.weight, 100.0)  # the norm, 150,000, is beyond float16
    assert scale_of(Objective(model, cross_entropy)) == pytest.approx(100.0, rel=0.002)  # summed in float32


def test_the_chosen_eps_is_that_of_the_coarsest_type_in_sight():
    objective, _ = gpt(torch.float32)
    scale = scale_of(objective)
    assert CentralDifference().step(objective) == best_eps(torch.float32, scale)
    assert ForwardDifference().step(objective) == best_forward_eps(torch.float32, scale)
    assert CentralDifference(0.5).step(objective) == 0.5
    with torch.autocast("cpu", torch.bfloat16):
        assert coarsest(objective) == torch.bfloat16
        assert CentralDifference().step(objective) == best_eps(torch.bfloat16, scale)
    objective.model.blocks.bfloat16()  # type: ignore[operator,union-attr]
    assert coarsest(objective) == torch.bfloat16
    assert [loss_roundoff(dtype) for dtype in TYPES] == [2**-53, 2**-24, 2**-17.5, 2**-16]


def test_the_presets_keep_the_eps_of_their_papers_and_take_none():
    assert spsa() == spsa(1e-3)
    assert repr(mezo(None).slope) == "CentralDifference(eps=None)"
    assert (CentralDifference(), ForwardDifference()) == (CentralDifference(None), ForwardDifference(None))


# ---- the loss in float32


def outputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    with seeded_generators(KEY):
        return torch.randn(6, 5).to(dtype), torch.rand(6, 5).to(dtype)


LOSSES: dict[Any, Callable[..., Tensor]] = {
    F.cross_entropy: lambda scores, y: F.cross_entropy(scores, y.argmax(1)),
    F.nll_loss: lambda scores, y: F.nll_loss(F.log_softmax(scores, 1), y.argmax(1)),
    F.mse_loss: lambda scores, y: F.mse_loss(scores, y),
    F.l1_loss: lambda scores, y: F.l1_loss(scores, target=y),
    F.smooth_l1_loss: lambda scores, y: F.smooth_l1_loss(scores, y, beta=0.5),
    F.kl_div: lambda scores, y: F.kl_div(F.log_softmax(scores, 1), y, reduction="batchmean"),
    F.binary_cross_entropy: lambda scores, y: F.binary_cross_entropy(scores.sigmoid(), y),
    F.binary_cross_entropy_with_logits: lambda scores, y: F.binary_cross_entropy_with_logits(scores, y),
}


@pytest.mark.parametrize("slope", [CentralDifference(0.5), ForwardDifference(0.5), Jvp(), Jvp(2)], ids=repr)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda function: function.__name__)
def test_a_loss_of_half_precision_scores_is_computed_in_float32(loss: Any, slope: Slope):
    assert LOSSES.keys() == LOSSES_IN_FLOAT32.keys()
    scores, target = outputs(torch.bfloat16)
    with seeded_generators(KEY):  # at these weights and eps, rounding is far below the slope: no Note of it
        model = nn.Linear(5, 5).to(torch.bfloat16)
    seen: list[torch.dtype] = []

    def of(model: nn.Module, x: Tensor) -> Tensor:
        found = LOSSES[loss](model(x), target)
        seen.append(found.dtype)
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        objective = Objective(model, of)
        Probing(slope, Rademacher(), 2).estimate(objective, scores, KEY)  # the first use examines the loss
        seen.clear()
        Probing(slope, Rademacher(), 2).estimate(objective, scores, KEY)
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("slope", [CentralDifference(0.01), ForwardDifference(0.01), Jvp()], ids=repr)
def test_no_bit_changes_where_the_loss_is_in_float32(slope: Slope):
    objective, batch = OBJECTIVES["transformer"].make()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        found = Probing(slope).estimate(objective, batch, KEY).slopes
        rules = {function: rule for function, rule in RULES.items() if function not in LOSSES_IN_FLOAT32}
        patch.setattr("gradcost.slopes.slope.RULES", rules)
        patch.setattr(forward_mode, "RULES", rules)
        plain = Probing(slope).estimate(objective, batch, KEY).slopes
    assert found is not None
    assert plain is not None
    assert torch.equal(found, plain)


# ---- what is said


def notes(work: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return [str(one.message) for one in caught if issubclass(one.category, Note)]


def test_directions_that_move_a_few_weights_are_no_reason_for_a_note():
    objective, batch = OBJECTIVES["mlp"].make(torch.bfloat16)
    estimator = Probing(CentralDifference(0.05), Coordinates(), 3)
    assert notes(lambda: estimator.estimate(objective, batch, KEY)) == []


def test_a_float32_model_hears_nothing_and_costs_no_pass_over_its_weights(monkeypatch: pytest.MonkeyPatch):
    objective, batch = OBJECTIVES["mlp"].make()
    adds: list[str] = []
    add = Gaussian.add

    def counted(self: Gaussian, base: Tensor, leaf: Any, *args: Any, **kwargs: Any) -> Tensor:
        adds.append(leaf.name)
        return add(self, base, leaf, *args, **kwargs)

    monkeypatch.setattr(Gaussian, "add", counted)
    for slope, ends in ((CentralDifference(1e-3), 2), (ForwardDifference(), 1)):
        adds.clear()
        assert notes(lambda: [slope.measure(objective, batch, KEY, Gaussian(), [n]) for n in range(5)]) == []  # noqa: B023
        assert len(adds) == 5 * ends * len(objective.leaves)


def test_other_estimators_say_nothing_of_halves():
    for estimator in (backprop(), forward_gradient()):
        objective, batch = OBJECTIVES["mlp"].make(torch.bfloat16)
        assert notes(lambda: estimator.estimate(objective, batch, KEY)) == []  # noqa: B023


# ---- the rounding of operations


def test_the_noise_of_a_smooth_line_is_that_which_was_added():
    points = torch.linspace(0, 1, 2000, dtype=torch.float64)
    with seeded_generators(KEY):
        noise = 1e-4 * torch.randn(2000, dtype=torch.float64)
    assert loss_noise((points.square() + points + noise).tolist()) == pytest.approx(1e-4, rel=0.1)
    assert loss_noise((points.square() + points).tolist()) < 1e-12


def test_rounding_in_autocast_is_noted_with_both_figures_where_it_matters():
    objective, batch = OBJECTIVES["transformer"].make()
    slope = Probing(CentralDifference(1e-5), Rademacher())
    figures = r"operations in bfloat16 round the loss by about .* rounding is \d+% of the slope"
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(Note, match=figures):
        slope.estimate(objective, batch, KEY)


def test_adapters_get_a_larger_eps_than_the_whole_model():
    objective, _ = OBJECTIVES["transformer"].make()
    alone = objective.only([objective.leaves[0].name])
    share = alone.dimension / objective.dimension
    assert CentralDifference().step(alone) == pytest.approx(
        best_eps(torch.float32, scale_of(alone)) * share ** (-1 / 6)
    )
