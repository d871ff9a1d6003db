"""Zero-order differences along directions scaled by an estimate of the curvature (HiZOO)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradcost.core.complex_numbers import as_real
from gradcost.core.errors import BadInput
from gradcost.core.evaluation.gradient_mode import with_known_use
from gradcost.core.fake import numbers
from gradcost.core.finite import require_finite
from gradcost.core.key import Key
from gradcost.core.objective import Leaf, Objective
from gradcost.core.precision import LOSSES_IN_FLOAT32
from gradcost.core.value import value
from gradcost.directions import Directions, Gaussian
from gradcost.estimators.estimator import Estimate, Estimator, Facts, LeafConsumer
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.probing import replayed
from gradcost.slopes.slope import CentralDifference
from gradcost.slopes.substitution import with_rules

Curvature = Mapping[str, Tensor]  # the diagonal of Sigma^-1: one float32 tensor per parameter, of its shape


@value
class HessianInformed(Estimator):
    """HiZOO: g = (1/n) sum_k s_k Sigma^{1/2} u_k, u_k ~ N(0, I), s_k a central difference along Sigma^{1/2} u_k.

    Sigma^-1 is diagonal. It starts as the identity and follows the size of the Hessian's diagonal.

    Law: E g = Sigma grad + O(eps^2), a preconditioned gradient. The first estimate, with Sigma = I, is MeZO's.
    Each estimate updates Sigma^-1 <- (1 - smoothing) Sigma^-1 + smoothing |(1/n) sum_k c_k u_k^2| Sigma^-1, which
    stays positive. c_k = (l+ + l- - 2 l0) / (2 eps^2), where l0 is the loss at the parameters and l+ and l- are the
    losses of the central difference. For a quadratic loss with Hessian diag(h) >= 0 the mean of the new term,
    |...| Sigma^-1, is h + tr(Sigma diag(h)) / 2 Sigma^-1, not h. The fixed point for d weights is
    Sigma^-1 = (1 + d/2) h. The factor 1 + d/2 does not change the conditioning.

    Cost: 1 + 2n forward passes, with the same dropout masks. `Estimate.loss` is the loss l0.
    Memory: the state Sigma^-1 takes 4 bytes per weight. An estimate returns a new state and leaves the old one
    unchanged, so both exist until the caller drops the old one. The gradient takes 16 bytes per probe and refers to
    the old state, with which its directions are regenerated.
    Precision: c_k is coarse. If a float32 loss near 2 changes in its last bit, c_k changes by 0.12 at eps = 1e-3.

    Args:
        eps: finite-difference step, in units of the parameters.
        probes: n, the number of directions per estimate.
        smoothing: the weight of the new term in the running mean Sigma^-1, between 0 and 1.
    Raises:
        BadInput: eps is not above 0, probes < 1, or smoothing is not between 0 and 1.
    Source: Zhao, Dang, Ye, Dai, Qian, Tsang, "Second-order fine-tuning without pain for LLMs: a Hessian informed
        zeroth-order optimizer", arXiv 2402.15173 (2024), algorithm 1. The public code measures the loss along
        u / sqrt(old Sigma^-1) but updates the weights along u / sqrt(new Sigma^-1). Here both use the old Sigma^-1.
    """

    eps: float = 1e-3
    probes: int = 1
    smoothing: float = 1e-6

    def __post_init__(self) -> None:
        CentralDifference(self.eps)  # validates eps
        if self.probes < 1:
            raise BadInput(f"probes is the number of directions per estimate, 1 or more, not {self.probes!r}.")
        if not 0 < self.smoothing < 1:
            raise BadInput(
                f"smoothing is the weight of new curvature in the mean, between 0 and 1, not {self.smoothing!r}."
            )

    @property
    def facts(self) -> Facts:
        return Facts(scales_with_slopes=True)

    def init(self, objective: Objective) -> dict[str, Tensor]:
        return {
            leaf.name: torch.ones_like(
                as_real(leaf.parameter.detach()), dtype=torch.float32, memory_format=torch.contiguous_format
            )
            for leaf in objective.leaves
        }

    @with_known_use
    def estimate(self, objective: Objective, batch: Any, key: Key, state: Curvature | None = None) -> Estimate:
        state = self.init(objective) if state is None else state
        directions, slope = _Preconditioned(state), CentralDifference(self.eps)
        seeds = directions.seeds(key, self.probes, objective.dimension)
        with with_rules(LOSSES_IN_FLOAT32):  # the rules of the finite differences
            loss = objective.evaluate(batch, key).double()
        differences = [slope.measure(objective, batch, key, directions, [seed]) for seed in seeds]
        slopes = torch.cat([measured for _, measured in differences])
        require_finite(loss, slopes)
        # The loss that a central difference returns is the mean (l+ + l-) / 2.
        curvatures = torch.stack([mean - loss for mean, _ in differences]) / self.eps**2
        gradient = Seeded(objective, directions, seeds, tuple(s / self.probes for s in numbers(slopes)))
        return Estimate(loss, gradient, slopes, self._updated(objective, state, seeds, numbers(curvatures)))

    def _updated(
        self, objective: Objective, state: Curvature, seeds: Sequence[int], curvatures: Sequence[float]
    ) -> dict[str, Tensor]:
        """Return the next state. curvatures: c_k for the direction of each seed."""
        new: dict[str, Tensor] = {}
        for leaf in objective.leaves:
            old, total = state[leaf.name], torch.zeros_like(state[leaf.name])
            for seed, curvature in zip(seeds, curvatures, strict=True):
                u = Gaussian().add(torch.zeros_like(old), leaf, [seed], [1.0], in_place=True)
                total.add_(u.square_(), alpha=curvature / self.probes)
                del u  # before the next one is allocated
            new[leaf.name] = total.abs_().mul_(self.smoothing).add_(1 - self.smoothing).mul_(old)
        return new

    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: Curvature | None = None
    ) -> Estimate:
        return replayed(self.estimate(objective, batch, key, state), use)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return CentralDifference(self.eps).objection(objective, batch)


@dataclass(frozen=True, eq=False)
class _Preconditioned(Directions):
    """z = Sigma^{1/2} u, u ~ N(0, I). `add` needs two temporary tensors of the parameter's size."""

    inverse_sigma: Curvature = field(repr=False)
    unbiased = False

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return Gaussian().seeds(key, probes, dimension)

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        # Compute in float32 for half-precision parameters, and round once at the end.
        weights = as_real(base.detach())
        precise = weights.dtype if weights.dtype == torch.float64 else torch.float32
        zero = torch.zeros_like(weights, dtype=precise, memory_format=torch.contiguous_format)
        shift = Gaussian().add(zero, leaf, seeds, scales, in_place=True).div_(self.inverse_sigma[leaf.name].sqrt())
        total = shift.add_(weights)
        if in_place:
            weights.copy_(total)
            return base
        return torch.view_as_complex(total.to(weights.dtype)) if base.is_complex() else total.to(weights.dtype)
