"""Theory compared with runs: moments, cosines, steps, bounds and costs."""

from __future__ import annotations

import itertools
import math
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

import gradcost
from counting import Flops
from gradcost.checkpointing.policies import Blocks, Segments, Selective
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import Coordinates, Directions, Gaussian, Rademacher, Sphere
from gradcost.directions.orthogonal import Orthogonal
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.combine import Combine, Mean, Normalized, Projection, Sign
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.instruments.memory import MemoryTracker
from gradcost.planning.within import Within
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp
from gradcost.theory.convergence import gradient_bound
from gradcost.theory.cosines import cosine_along_coordinates, expected_cosine
from gradcost.theory.costs import activations, adapter_forwards, forwards, matmuls
from gradcost.theory.moments import second_moment
from gradcost.theory.quadratic import expected_losses, steps_to_reach
from gradcost.theory.slowdown import effective_slowdown, probes_to_match, slowdown, stable_step
from sampling import assert_mean
from tables import ESTIMATORS
from vectors import estimated

KEY = Key(70)
D = 40
DIRECTIONS: dict[str, Directions] = {
    "gaussian": Gaussian(),
    "rademacher": Rademacher(),
    "sphere": Sphere(),
    "coordinates": Coordinates(),
    "orthogonal": Orthogonal(),
}
COMBINES: dict[str, Combine] = {
    "mean": Mean(),
    "projection": Projection(),
    "sign": Sign(),
    "normalized": Normalized(),
}


class Weights(nn.Module):
    def __init__(self, at: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(at.clone())


def pulled(model: nn.Module, batch: Tensor) -> Tensor:
    """A loss whose gradient is the batch."""
    return (model.x * batch).sum()  # type: ignore[operator]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


# ---- moments and cosines


STATED = [
    pytest.param(way, combine, probes, marks=[pytest.mark.slow] * (probes == 7 and way != "gaussian"))
    for way, combine, probes in itertools.product(DIRECTIONS, COMBINES, [1, 7, 60])
    if (way, combine) != ("orthogonal", "sign")
]


@pytest.mark.parametrize(("way", "combine", "probes"), STATED)
def test_an_estimate_is_as_long_and_points_where_theory_says(way: str, combine: str, probes: int):
    """Compared with the library's estimator for random gradients, also with more probes than weights."""
    objective = Objective(Weights(torch.zeros(D, dtype=torch.float64)), pulled)
    estimator = Probing(Jvp(together=probes), DIRECTIONS[way], probes, COMBINES[combine])
    gradients = normal(120, D)
    estimates = [estimated(estimator, objective, grad, KEY.fold("at", at)) for at, grad in enumerate(gradients)]
    stated = expected_cosine(estimator, D)
    assert stated is not None
    cosines = torch.tensor([cosine(g, grad) for g, grad in zip(estimates, gradients, strict=True)])
    error = float(cosines.std()) / len(cosines) ** 0.5
    # Sphere and Rademacher: to a relative 1/d for n > 1. Sign of Coordinates: n > d is computed as n = d.
    assert abs(float(cosines.mean()) - stated) <= 5 * error + stated / D
    moment = second_moment(estimator, D)
    if COMBINES[combine] in (Sign(), Normalized()):
        assert moment is None
    else:
        squares = [
            float(g.square().sum() / grad.square().sum()) for g, grad in zip(estimates, gradients, strict=True)
        ]
        assert moment is not None
        assert abs(sum(squares) / len(squares) - moment) <= 5 * float(torch.tensor(squares).std()) / 10.9 + 1e-9


@pytest.mark.parametrize(("d", "probes"), [(2, 1), (5, 3), (30, 1), (30, 16), (8, 20)])
def test_the_beta_law_is_exact(d: int, probes: int):
    """The mean and projection of Gaussian directions; the law holds for any fixed gradient, here on one weight."""
    z = normal(20_000, probes, d, seed=d + probes)
    mean = torch.einsum("rnd,rn->rd", z, z[:, :, 0])
    assert_mean(mean[:, 0] / mean.norm(dim=1), _stated(Mean(), d, probes))
    if probes < d:
        basis = torch.linalg.qr(z[:4000].mT)[0]
        assert_mean(basis[:, 0].norm(dim=1), _stated(Projection(), d, probes))
    turned = normal(20_000, d, seed=1)
    grad = turned / turned.norm(dim=1, keepdim=True)
    signs = torch.einsum("rnd,rn->rd", z, torch.einsum("rnd,rd->rn", z, grad)).sign()
    assert_mean((signs * grad).sum(1) / d**0.5, _stated(Sign(), d, probes))


def _stated(combine: Combine, d: int, probes: int) -> float:
    stated = expected_cosine(Probing(Jvp(), Gaussian(), probes, combine), d)
    assert stated is not None
    return stated


@pytest.mark.parametrize("d", [1000, 4810, 10**9, 10**12])
def test_cosines_near_their_limits(d: int):
    """One direction: sqrt(2/(pi d)); many: sqrt(n/(n + d)); signs: sqrt(2/pi) times that."""
    assert _stated(Mean(), d, 1) == pytest.approx(math.sqrt(2 / (math.pi * d)), rel=1e-3)
    assert _stated(Mean(), d, d) == pytest.approx(math.sqrt(0.5), rel=1e-3)
    assert _stated(Projection(), d, d // 2) == pytest.approx(math.sqrt(0.5), rel=1e-3)
    assert _stated(Sign(), d, 16) == pytest.approx(math.sqrt(2 / math.pi) * _stated(Mean(), d, 16), rel=1e-3)


@pytest.mark.parametrize("probes", [1, 199, 200, 201])
def test_the_series_for_large_factorials_meets_the_small_ones(probes: int):
    """On both sides of x = 100: R(x) R(x + 1/2) = x."""
    from gradcost.theory.cosines import _half_step

    x = probes / 2
    assert _half_step(x) * _half_step(x + 0.5) == pytest.approx(x, rel=1e-11)
    assert _half_step(x + 1) / _half_step(x) == pytest.approx((x + 0.5) / x, rel=1e-11)


def test_one_weight_has_cosine_1_with_any_direction():
    for combine in COMBINES.values():
        assert _stated(combine, 1, 1) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("probes", [1, 4, 12])
@pytest.mark.parametrize("power", [0, 1, 5])
def test_coordinates_depend_on_the_gradient(power: int, probes: int):
    gradient = normal(200) ** power
    shuffled = torch.rand(4000, 200, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :probes]
    cosines = gradient[shuffled].norm(dim=1) / gradient.norm()
    stated = cosine_along_coordinates(gradient, probes)
    error = float(cosines.std()) / len(cosines) ** 0.5
    # Sampling with replacement: of 12 from 200 a pair is equal with a chance of 12 * 11/400.
    assert abs(float(cosines.mean()) - stated) <= 5 * error + 1e-5 + stated * (probes - 1) / 400
    assert stated <= math.sqrt(probes / 200) * (1 + 1e-6)
    if probes == 1:
        assert stated == pytest.approx(float(gradient.abs().sum() / (200 * gradient.norm())), rel=1e-6)


def test_coordinates_of_one_weight_and_refusals():
    one = torch.zeros(50)
    one[3] = -2.0
    assert cosine_along_coordinates(one, 1) == pytest.approx(1 / 50, rel=1e-6)
    assert cosine_along_coordinates(torch.tensor([1.0, 0.0, 0.0, 0.0]), 3) == 0.75
    assert cosine_along_coordinates(torch.tensor([1.0, 0.5, 0.2, 0.1]), 4) == 1.0
    with pytest.raises(ValueError, match="no direction"):
        cosine_along_coordinates(torch.zeros(5), 1)
    with pytest.raises(ValueError, match="probes must be 1 to 5, the entries of the gradient, not 6"):
        cosine_along_coordinates(torch.ones(5), 6)
    with pytest.raises(ValueError, match="trainable weights, must be 1 or more, not 0"):
        expected_cosine(gradcost.mezo(), 0)


def test_wrappers_and_what_is_not_known():
    inner = Probing(Jvp(), Gaussian(), 3)
    assert expected_cosine(Clipped(Accumulated(inner, 2)), 9) == expected_cosine(inner, 9)
    assert expected_cosine(gradcost.backprop(), 9) == 1
    assert second_moment(Probing(Jvp(), Sphere(), 3, Projection()), 12) == 4
    assert expected_cosine(Probing(Jvp(), Orthogonal(), 3, Sign()), 12) is None
    assert second_moment(Probing(Jvp(), Coordinates(), 15, Projection()), 12) == 1


# ---- steps


def test_slowdown_and_step():
    assert slowdown(4810, 16) == 1 + 4811 / 16
    assert slowdown(4810, 16, Rademacher()) == 1 + 4809 / 16
    assert slowdown(4810, 10, combine=Projection()) == 481
    assert slowdown(4810, 10, combine=Sign()) is None
    assert stable_step(gradcost.backprop(), 4.0, 10) == 0.25
    assert stable_step(gradcost.forward_gradient(2), 4.0, 9) == 1 / (4 * 6)
    assert stable_step(Probing(Jvp(), combine=Sign()), 4.0, 9) is None
    assert effective_slowdown(1000.0, 1.0, 10) == slowdown(1000, 10)
    for refused in (lambda: stable_step(gradcost.mezo(), 0.0, 3), lambda: effective_slowdown(-1.0, 1.0, 1)):
        with pytest.raises(ValueError, match="smoothness"):
            refused()


@pytest.mark.parametrize("combine", [Mean(), Projection(), Sign()], ids=repr)
@pytest.mark.parametrize("wanted", [0.01, 0.3, 0.75])
def test_probes_to_match_are_the_fewest(wanted: float, combine: Combine):
    probes = probes_to_match(wanted, 4810, combine=combine)
    assert _stated(combine, 4810, probes) >= wanted
    assert probes == 1 or _stated(combine, 4810, probes - 1) < wanted


def test_no_number_of_probes_gives_signs_a_cosine_of_ninety_percent():
    for call in (lambda: probes_to_match(0.9, 4810, combine=Sign()), lambda: probes_to_match(1.0, 4810)):
        with pytest.raises(ValueError, match="no number of probes"):
            call()
    assert probes_to_match(1.0, 100, combine=Projection()) == 100
    with pytest.raises(ValueError, match=r"above 0 and at most 1, not 1\.5"):
        probes_to_match(1.5, 10)


@pytest.mark.parametrize("probes", [1, 3])
def test_the_expected_loss_on_a_quadratic_is_exact(probes: int):
    """Compared with the library's estimator: ten steps on three eigenvalues."""
    curvature, lr = torch.tensor([4.0, 1.0, 0.1], dtype=torch.float64), 0.06
    start = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    stated = list(islice(expected_losses(curvature.tolist(), start.tolist(), lr, probes), 11))
    model = Weights(start)
    objective = Objective(model, lambda model, batch: (curvature * model.x.square()).sum() / 2)  # type: ignore[operator]
    losses = torch.empty(70, 11, dtype=torch.float64)
    for run in range(len(losses)):
        model.x.data.copy_(start)
        for step in range(11):
            losses[run, step] = objective.evaluate(None, KEY)
            estimate = estimated(Probing(Jvp(probes), Gaussian(), probes), objective, None, KEY.fold(f"r{run}", step))
            model.x.data.sub_(lr * estimate)
    for step in (1, 2, 5, 10):
        assert_mean(losses[:, step], stated[step])


def test_gradient_descent_on_a_quadratic():
    losses = list(islice(expected_losses([2.0, 1.0], [1.0, 1.0], 0.25), 4))
    assert losses == pytest.approx([(2 * 0.5 ** (2 * t) + 0.75 ** (2 * t)) / 2 for t in range(4)], rel=1e-12)
    assert steps_to_reach(iter([8.0, 4.0, 1.0]), 0.25) == 2
    assert steps_to_reach(iter([8.0, 4.0, 1.0]), 0.01) is None
    assert steps_to_reach(expected_losses([1.0], [1.0], 3.0), 0.5) is None
    with pytest.raises(ValueError, match="between 0 and 1"):
        steps_to_reach(iter([1.0]), 1.0)
    with pytest.raises(ValueError, match="as long as start"):
        expected_losses([1.0], [1.0, 2.0], 0.1)
    with pytest.raises(ValueError, match="probes 1 or more"):
        expected_losses([1.0], [1.0], 0.1, 0)


def test_the_effective_slowdown_is_the_ratio_of_stability_limits():
    """The largest stable learning rates on a quadratic of 300 weights: gradient descent and ten directions."""
    curvature = [100 ** (-i / 299) for i in range(300)]

    def limit(probes: int | None) -> float:
        low, high = 1e-4, 4.0
        while high / low > 1.002:
            middle = math.sqrt(low * high)
            # Stable: the loss after 4000 steps is below the first.
            first, *_, last = islice(expected_losses(curvature, [1.0] * 300, middle, probes), 4000)
            low, high = (middle, high) if last < first else (low, middle)
        return low

    ratio = limit(None) / limit(10)
    assert ratio == pytest.approx(effective_slowdown(sum(curvature), 1.0, 10), rel=0.2)
    of_all = slowdown(300, 10)
    assert of_all is not None
    assert of_all > 3 * ratio


# ---- bounds


def valleys(model: nn.Module, batch: object) -> Tensor:
    """sum x^2/(1 + x^2): 2-smooth, bounded below by 0 and concave beyond |x| = 1/sqrt(3)."""
    squares = model.x.square()  # type: ignore[operator]
    return (squares / (1 + squares)).sum()


BOUNDED = {
    "backprop": gradcost.backprop(),
    "forward gradient": gradcost.forward_gradient(4),
    "projection": Probing(Jvp(), Rademacher(), 4, Projection()),
    "two-sided": Probing(CentralDifference(1e-3), Gaussian(), 4),
    "one-sided": Probing(ForwardDifference(1e-3), Sphere(), 4),
}


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("name", BOUNDED)
def test_a_run_respects_the_bound(name: str, noise: float):
    """Each batch adds a linear term to the loss, with a gradient of +-`noise` in each of 12 weights."""
    d, smoothness, steps, estimator = 12, 2.0, 40, BOUNDED[name]
    start = torch.linspace(-2, 2, d, dtype=torch.float64)
    moment = second_moment(estimator, d)
    assert moment is not None
    lr = (0.2 if name in ("two-sided", "one-sided") else 1.0) / (smoothness * moment)
    model = Weights(start)
    objective = Objective(model, lambda model, batch: valleys(model, batch) + pulled(model, batch))
    squares = torch.empty(4, steps, dtype=torch.float64)
    for run in range(len(squares)):
        model.x.data.copy_(start)
        for step in range(steps):
            x = model.x.detach()
            squares[run, step] = (2 * x / (1 + x.square()).square()).square().sum()
            pull = noise * normal(d, seed=1000 * run + step).sign()
            model.x.data.sub_(lr * estimated(estimator, objective, pull, KEY.fold(f"run{run}", step)))
    bound = gradient_bound(
        estimator,
        d,
        smoothness=smoothness,
        gap=float((start**2 / (1 + start**2)).sum()),
        lr=lr,
        steps=steps,
        batch_variance=d * noise**2,
    )
    least = float(squares.mean(0).min())
    assert least <= bound
    # The bound is informative: it is not far above the first squared gradient.
    assert noise > 0 or bound < 60 * float(squares[0, 0])


def test_bounds_at_the_best_step_and_beyond():
    shared = {"smoothness": 2.0, "gap": 3.0, "steps": 10}
    exact = gradient_bound(gradcost.forward_gradient(2), 9, lr=1 / (2 * 6), batch_variance=0.7, **shared)  # type: ignore[arg-type]
    assert exact == pytest.approx(2 * 2 * 6 * 3 / 10 + 0.7)
    fine, coarse = (
        gradient_bound(gradcost.mezo(eps, 2), 9, lr=1 / (8 * 6), **shared)  # type: ignore[arg-type]
        for eps in (1e-6, 1e-2)
    )
    assert fine == pytest.approx(4 * 8 * 6 * 3 / 10, rel=1e-4)
    assert coarse > fine
    with pytest.raises(ValueError, match=r"needs one below 0\.167"):
        gradient_bound(gradcost.forward_gradient(2), 9, lr=0.17, **shared)  # type: ignore[arg-type]
    for estimator, sentence in (
        (Probing(Jvp(), combine=Sign()), "no second moment is known"),
        (Clipped(gradcost.mezo(1e-3)), "bias of Clipped"),
        (Probing(CentralDifference(None)), "give eps a number"),
        (Probing(CentralDifference(1e-3), probes=2, combine=Projection()), "use Mean"),
    ):
        with pytest.raises(ValueError, match=sentence):
            gradient_bound(estimator, 9, lr=1e-3, **shared)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps 1 or more"):
        gradient_bound(gradcost.mezo(), 9, lr=1e-3, smoothness=1.0, gap=1.0, steps=0)


# ---- costs

WIDTH, BATCH = 8, 512


def chain(layers: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))


def problem(layers: int) -> tuple[Objective, Tensor]:
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(0))
    return Objective(chain(layers), lambda model, batch: model(batch).square().mean()), x


COSTED: list[Estimator] = [
    *(Reverse(), Reverse(Blocks()), Reverse(Segments(2)), Reverse(Segments(3))),
    *(Probing(Jvp()), Probing(Jvp(3), probes=5), Probing(Jvp(4), probes=4), Probing(CentralDifference(), probes=2)),
    *(Probing(ForwardDifference(), probes=3), Clipped(Probing(Jvp(), probes=2))),
]


@pytest.mark.parametrize("layers", [3, 8])
@pytest.mark.parametrize("estimator", COSTED, ids=repr)
def test_matmuls_and_activations_are_those_of_a_run(estimator: Estimator, layers: int):
    objective, x = problem(layers)
    with Flops() as flops:
        estimator.estimate(objective, x, KEY)
    assert flops.total / (2 * BATCH * WIDTH * WIDTH) == matmuls(estimator, layers)
    live = MemoryTracker(objective.model)
    live.register("inputs", x)
    with live.followed():
        estimator.stream(objective, x, KEY, lambda name, gradient: None)
    weights = 4 * WIDTH * WIDTH * layers
    held = (live.memory().peak - weights - x.nbytes) / x.nbytes
    stated = activations(estimator, layers)
    assert stated is not None
    assert stated <= held + 1e-9 < stated + 0.5  # the rest does not grow with the batch


@pytest.mark.parametrize("name", [name for name, row in ESTIMATORS.items() if row.matmuls(4) is not None])
def test_matmuls_are_those_of_the_table_of_methods(name: str):
    """Without Projection, whose Gram matrix is not a matmul of a layer."""
    row = ESTIMATORS[name]
    stated = [matmuls(row.estimator, layers) for layers in (2, 5)]
    if None not in stated and not isinstance(getattr(row.estimator, "combine", None), Projection):
        assert stated == [row.matmuls(2), row.matmuls(5)]


def test_the_table_of_forwards():
    """The constants of the papers, for three probes, and the deep limit of `matmuls`."""
    three = [Probing(Jvp(), probes=3), Probing(Jvp(3), probes=3), gradcost.mezo(probes=3)]
    rows = [gradcost.backprop(), gradcost.checkpointed(), *three, Probing(ForwardDifference(), probes=3)]
    assert [forwards(row) for row in rows] == [3, 4, 9, 7, 6, 4]
    assert [adapter_forwards(row) for row in rows] == [2, 3, 6, 4, 6, 4]
    for row in (gradcost.backprop(), *three, Accumulated(three[0], 2), Reverse(Segments(20))):
        deep = matmuls(row, 100_000)
        assert deep is not None
        assert deep / 100_000 == pytest.approx(forwards(row), rel=1e-3)
    assert forwards(Reverse(Selective())) is None
    assert matmuls(Reverse(Within(1 << 20)), 3) is None
    assert matmuls(Accumulated(Reverse(Segments(2)), 2), 8) == matmuls(Reverse(Segments(2)), 8) == 29
    assert activations(Reverse(Within(1 << 20)), 3) is None
    for function in (matmuls, activations):
        with pytest.raises(ValueError, match="layers must be 1 or more, not 0"):
            function(gradcost.backprop(), 0)


@pytest.mark.parametrize("estimator", COSTED, ids=repr)
def test_adapter_forwards_are_those_of_a_frozen_base(estimator: Estimator):
    """Trained biases on a frozen chain: only activations through the layers need gradients, no weights do."""
    counts = []
    for layers in (6, 12):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(layers)))
        model.requires_grad_(False)
        for block in itertools.islice(model, 0, None):
            block[0].bias.requires_grad_(True)  # type: ignore[index, union-attr]
        objective = Objective(model, lambda model, batch: model(batch).square().mean())
        with Flops() as flops:
            estimator.estimate(objective, torch.randn(BATCH, WIDTH), KEY)
        counts.append(flops.total / (2 * BATCH * WIDTH * WIDTH))
    assert (counts[1] - counts[0]) / 6 == adapter_forwards(estimator)
