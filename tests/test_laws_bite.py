"""The laws can fail: each of five published bugs is patched in, and the laws that must notice it are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor

from gradcost.core import isolation, objective
from gradcost.core.key import Key
from gradcost.core.objective import Leaf, Objective
from gradcost.directions import Directions, sphere
from gradcost.estimators.combine import Mean
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.variance_reduced import Snapshot, VarianceReduced, full_gradient
from gradcost.noise import add as noise
from gradcost.noise import philox
from gradcost.slopes import slope
from laws import test_law_03_scale as scale
from laws import test_law_04_variance as variance
from laws import test_law_07_same_function as same_function
from laws import test_law_13_variance_reduced as reduced

Plant = Callable[[pytest.MonkeyPatch], None]


def the_update_is_eps_times_z(patch: pytest.MonkeyPatch) -> None:
    """Code of "The cost of avoiding backpropagation": the slope times the perturbation, not times the direction."""
    right = Mean.gradient

    def wrong(
        self: Mean, objective: Objective, directions: Directions, seeds: Any, slopes: Sequence[float]
    ) -> Seeded:
        return right(self, objective, directions, seeds, [1e-3 * slope for slope in slopes])

    patch.setattr(Mean, "gradient", wrong)


def every_probe_looks_along_one_direction(patch: pytest.MonkeyPatch) -> None:
    """Spry's and FwdLLM's loop sets the seed inside it, so all n directions equal the first."""

    def repeated(key: Key, probes: int) -> tuple[int, ...]:
        return (key.fold("probe", 0).seed,) * probes

    patch.setattr("gradcost.directions.independent.independent", repeated)


def the_sphere_has_radius_one(patch: pytest.MonkeyPatch) -> None:
    """DeepZero's directions have length 1, and the factor d is missing."""

    def short(
        self: Any, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        lengths = [scale / sphere._norm(seed, leaf.dimension) for seed, scale in zip(seeds, scales, strict=True)]
        return noise.add_noise(philox.Normals(), seeds, lengths, leaf.start, base, in_place)

    patch.setattr(sphere.Sphere, "add", short)


def each_end_sees_another_mask(patch: pytest.MonkeyPatch) -> None:
    """Dropout draws a new mask at each evaluation, so both ends of a difference are two functions."""
    right, drawn = isolation.seeded_generators, iter(range(1 << 60))

    def fresh(key: Key, devices: Any = ()) -> Any:
        return right(key.fold("evaluation", next(drawn)), devices)

    patch.setattr(objective, "seeded_generators", fresh)
    # The checks at first use would refuse the loss before a law sees it.
    patch.setattr(Objective, "prepare", lambda self, batch, key: None)
    patch.setattr(slope, "check_reads", lambda objective, batch, key: None)


def the_snapshot_is_the_live_weights(patch: pytest.MonkeyPatch) -> None:
    """MeZO-SVRG's snapshot copies a list, but not the tensors in it."""

    def aliased(self: VarianceReduced, objective: Objective, key: Key, before: Snapshot) -> Snapshot:
        weights = {leaf.name: leaf.parameter.detach() for leaf in objective.leaves}
        return before._replace(weights=weights, gradient=full_gradient(self.estimator, objective, key))

    patch.setattr(VarianceReduced, "_new_snapshot", aliased)


NOTICED: dict[Plant, list[Callable[[], None]]] = {
    the_update_is_eps_times_z: [
        lambda: scale.test_the_mean_coefficient_is_one("rademacher", 1),
        lambda: scale.test_no_row_of_the_table_is_shrunk_or_stretched("gaussian-central"),
        lambda: variance.test_the_second_moment_is_the_stated_one("gaussian", 1),
    ],
    every_probe_looks_along_one_direction: [
        lambda: variance.test_the_second_moment_is_the_stated_one("gaussian", 10),
        lambda: variance.test_ten_probes_have_ten_directions("rademacher"),
    ],
    the_sphere_has_radius_one: [
        lambda: scale.test_the_mean_coefficient_is_one("sphere", 4),
        lambda: variance.test_the_second_moment_is_the_stated_one("sphere", 1),
    ],
    the_snapshot_is_the_live_weights: [
        lambda: reduced.test_the_snapshot_shares_no_storage_with_the_live_weights("gaussian-jvp"),
        lambda: reduced.test_away_from_it_both_points_are_probed_along_the_same_directions("gaussian-jvp"),
    ],
    each_end_sees_another_mask: [
        lambda: same_function.test_the_model_with_dropout_has_one_loss_for_all_estimators(),
        lambda: same_function.test_the_projected_gradient_with_dropout_is_bounded_as_the_step_shrinks(),
    ],
}


@pytest.mark.parametrize(
    ("plant", "law"),
    [(plant, law) for plant, laws in NOTICED.items() for law in laws],
    ids=[f"{plant.__name__}-{number}" for plant, laws in NOTICED.items() for number, _ in enumerate(laws)],
)
def test_the_law_notices(plant: Plant, law: Callable[[], None], monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch)  # without it the same call passes: it is one of the law's own tests
    with pytest.raises(AssertionError):
        law()
