"""Complex parameters, and default devices and dtypes other than the CPU and float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradcost import CentralDifference, ForwardDifference, Jvp, Key, Objective, Probing, backprop
from gradcost.core.complex_numbers import as_real
from gradcost.core.precision import scale_of
from gradcost.directions import Coordinates, Gaussian, Rademacher, Sphere
from gradcost.directions.guided import Guided
from gradcost.directions.layerwise import Layerwise
from gradcost.directions.low_rank import LazyLowRank, LowRank
from gradcost.directions.masks import Fixed, Largest, Masked, Random, Smallest
from gradcost.directions.orthogonal import Orthogonal
from gradcost.directions.sphere import _norm as norm_of_sphere
from gradcost.estimators.combine import Projection, Sign
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.hessian_informed import HessianInformed
from gradcost.noise import Normals, add_noise

KEY = Key(5)
DIRECTIONS = [
    Gaussian(),
    Rademacher(),
    Sphere(),
    Orthogonal(),
    Coordinates(),
    LowRank(2),
    LazyLowRank(1),
    Layerwise(),
    Guided(),
    Masked(Smallest(0.5)),
    Masked(Largest(0.5)),
    Masked(Fixed(0.5)),
    Masked(Random(0.5)),
]


def numbers(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Spectral(nn.Module):
    """A real layer, a complex matrix, and a complex vector."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4).double()
        self.weight = nn.Parameter(0.3 * numbers(4, 3, dtype=torch.complex128))
        self.shift = nn.Parameter(0.3 * numbers(3, seed=3, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x).to(torch.complex128) @ self.weight + self.shift).abs()


def squares(model: Any, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


BATCH = numbers(6, 4), numbers(6, 3, seed=2)


def spectral() -> Objective:
    torch.manual_seed(0)
    return Objective(Spectral(), squares)


def product(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The inner product over real and imaginary parts."""
    return float(sum((as_real(one[name]) * as_real(other[name])).sum() for name in one))


def exact_gradient(objective: Objective) -> dict[str, Tensor]:
    parameters = [leaf.parameter for leaf in objective.leaves]
    gradients = torch.autograd.grad(squares(objective.model, BATCH), parameters)
    return {leaf.name: gradient for leaf, gradient in zip(objective.leaves, gradients, strict=True)}


def test_a_complex_element_counts_as_two_numbers():
    objective = spectral()
    assert objective.dimension == 20 + 2 * 12 + 2 * 3
    assert [leaf.start for leaf in objective.leaves] == [0, 24, 30, 46]
    assert scale_of(objective) == pytest.approx(
        sum(float(as_real(leaf.parameter.detach()).norm()) * as_real(leaf.parameter).numel() ** 0.5
            for leaf in objective.leaves) / objective.dimension
    )  # fmt: skip


@pytest.mark.parametrize("directions", DIRECTIONS, ids=repr)
@pytest.mark.parametrize(
    ("slope", "tolerance"),
    [(Jvp(), 1e-10), (Jvp(together=2), 1e-10), (CentralDifference(1e-5), 1e-6), (ForwardDifference(1e-7), 1e-4)],
    ids=repr,
)
def test_a_slope_along_complex_directions_is_that_of_torchs_gradient(slope: Any, tolerance: float, directions: Any):
    objective = spectral()
    estimator = Probing(slope, directions, 2)
    state = {name: g.detach() for name, g in exact_gradient(objective).items()} if directions == Guided() else None
    estimate = estimator.estimate(objective, BATCH, KEY, state)
    gradient = exact_gradient(objective)
    assert isinstance(estimate.gradient, Seeded)
    assert estimate.slopes is not None
    moved = 0
    for seed, slope_along in zip(estimate.gradient.seeds, estimate.slopes.tolist(), strict=True):
        z = dict(Seeded(objective, estimate.gradient.directions, (seed,), (1.0,)).leaves())
        assert slope_along == pytest.approx(product(z, gradient), rel=tolerance, abs=tolerance)
        moved += sum(int(z[name].imag.count_nonzero()) for name in ("weight", "shift"))
    assert moved > 0 or directions in (Coordinates(), Layerwise())


@pytest.mark.parametrize("directions", [Gaussian(), Rademacher(), Sphere(), LowRank(2)], ids=repr)
def test_complex_directions_have_unit_covariance_in_both_parts(directions: Any):
    objective = spectral()
    leaf = next(leaf for leaf in objective.leaves if leaf.name == "weight")
    draws = [directions.draw(leaf, [Key(seed).seed], [1.0]) for seed in range(4000)]
    rows = torch.stack([as_real(z).flatten() for z in draws])
    covariance = rows.T @ rows / len(rows)
    assert (covariance - torch.eye(24)).abs().max() < 0.2


def test_all_coordinates_and_a_projection_give_the_complex_gradient():
    objective = spectral()
    gradient = exact_gradient(objective)
    for directions, combine in ((Coordinates(), None), (Gaussian(), Projection())):
        arguments = () if combine is None else (combine,)
        estimator = Probing(Jvp(together=10), directions, objective.dimension, *arguments)
        for name, found in estimator.estimate(objective, BATCH, KEY).gradient.leaves():
            assert torch.allclose(found, gradient[name], rtol=1e-6, atol=1e-8)


def test_signs_and_norms_of_complex_gradients_are_of_both_parts():
    objective = spectral()
    signs = Probing(Jvp(), Gaussian(), 1, Sign()).estimate(objective, BATCH, KEY).gradient
    assert all(as_real(sign).abs().eq(1).all() for _, sign in signs.leaves())
    gradient = exact_gradient(objective)
    assert backprop().estimate(objective, BATCH, KEY).gradient.norm() == pytest.approx(
        product(gradient, gradient) ** 0.5
    )


def test_hessian_informed_moves_both_parts():
    objective = spectral()
    estimate = HessianInformed(1e-4).estimate(objective, BATCH, KEY)
    gradient = exact_gradient(objective)
    assert isinstance(estimate.gradient, Seeded)
    assert estimate.slopes is not None
    assert estimate.state is not None
    z = dict(Seeded(objective, estimate.gradient.directions, estimate.gradient.seeds, (1.0,)).leaves())
    assert float(estimate.slopes) == pytest.approx(product(z, gradient), rel=1e-4)
    assert estimate.state["weight"].shape == (4, 3, 2)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_noise_on_a_complex_tensor_is_that_on_its_real_view(dtype: torch.dtype):
    base = numbers(3, 5, dtype=dtype)
    expected = add_noise(Normals(), [1, 2], [0.5, -2.0], 7, as_real(base))
    assert torch.equal(as_real(add_noise(Normals(), [1, 2], [0.5, -2.0], 7, base)), expected)
    assert torch.equal(as_real(add_noise(Normals(), [1, 2], [0.5, -2.0], 7, base.mH.mH)), expected)
    moved = base.clone()
    assert add_noise(Normals(), [1, 2], [0.5, -2.0], 7, moved, in_place=True) is moved
    assert torch.equal(as_real(moved), expected)


# ---- defaults


@contextmanager
def default_of(default: str | torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        if isinstance(default, str):
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


@pytest.mark.parametrize("directions", DIRECTIONS, ids=repr)
@pytest.mark.parametrize("default", ["meta", torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_default_device_and_dtype_change_no_bit(default: Any, directions: Any):
    def estimates(model: nn.Module) -> list[Tensor]:
        found = []
        for slope in (CentralDifference(1e-3), Jvp(), Jvp(together=2)):
            norm_of_sphere.cache_clear()
            estimate = Probing(slope, directions, 2).estimate(Objective(model, squares), batch, KEY)
            found += [estimate.loss, estimate.slopes, *(gradient for _, gradient in estimate.gradient.leaves())]
        return found

    torch.manual_seed(0)
    model, batch = nn.Linear(4, 3), (numbers(6, 4).float(), numbers(6, 3).float())
    expected = estimates(model)
    with default_of(default):
        found = estimates(model)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
