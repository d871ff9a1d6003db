"""Zero-order differences along directions that are long where the loss is flat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradcost.core.errors import BadInput
from gradcost.core.fake import numbers
from gradcost.core.key import Key
from gradcost.core.objective import Leaf, Objective
from gradcost.core.precision import LOSSES_IN_FLOAT32
from gradcost.core.value import value
from gradcost.directions import Directions, Gaussian
from gradcost.estimators.estimator import Estimate, Estimator, LeafConsumer
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.probing import replayed
from gradcost.slopes.slope import CentralDifference
from gradcost.slopes.substitution import ruled

Curvature = Mapping[str, Tensor]  # the diagonal of Sigma^-1: one float32 tensor of each leaf's shape


@value
class HessianInformed(Estimator):
    """g = (1/n) sum_k s_k Sigma^{1/2} u_k, with u_k ~ N(0, I) and s_k a central difference along Sigma^{1/2} u_k; the
    diagonal Sigma^-1, ones at first, follows the size of the Hessian's diagonal (HiZOO).

    Law: E g = Sigma grad + O(eps^2), a preconditioned gradient; the first estimate, where Sigma = I, is MeZO's.
    With c_k = (l+ + l- - 2 l0) / (2 eps^2), each estimate moves Sigma^-1 by
    Sigma^-1 <- (1 - smoothing) Sigma^-1 + smoothing |(1/n) sum_k c_k u_k^2| Sigma^-1, so it stays above 0. Where the
    Hessian is H = diag(h) >= 0 and the loss quadratic, the mean of what is averaged in is h + tr(Sigma H) / 2
    Sigma^-1, not h: its fixed point is (1 + d/2) h, in proportion to h, on which alone the conditioning depends.

    Cost: 1 + 2n forwards; the same draws (dropout) at all of an estimate's points. The state is 4 bytes a weight. An
    estimate leaves the state that it was given as it is, so the old and the new one are alive until it is
    dropped. The gradient is 16 bytes a probe, and holds on to the state that it was found with. `Estimate.loss` is
    the loss at the weights themselves. A second difference is coarse: one unit in the last place of a float32 loss
    near 2 is 0.12 in c at eps = 1e-3.

    Source: Zhao, Dang, Ye, Dai, Qian, Tsang, "Second-order fine-tuning without pain for LLMs: a Hessian informed
    zeroth-order optimizer", arXiv 2402.15173 (2024), algorithm 1. Public code of it divides u by the square root
    of the new Sigma^-1 in the update, where the loss was looked at along the old one; here both are the old one.
    Raises: ValueError when eps is not above 0, probes < 1, or smoothing is not between 0 and 1.
    """

    eps: float = 1e-3
    probes: int = 1
    smoothing: float = 1e-6

    def __post_init__(self) -> None:
        CentralDifference(self.eps)  # which says what is wrong with eps
        if self.probes < 1:
            raise BadInput(f"probes is how many directions an estimate looks along: 1 or more, not {self.probes!r}.")
        if not 0 < self.smoothing < 1:
            raise BadInput(
                "smoothing is the share of a new curvature in the mean of all and lies between 0 and 1, not at "
                f"{self.smoothing!r}."
            )

    def init(self, objective: Objective) -> dict[str, Tensor]:
        return {
            leaf.name: torch.ones_like(
                leaf.parameter, dtype=torch.float32, requires_grad=False, memory_format=torch.contiguous_format
            )
            for leaf in objective.leaves
        }

    def estimate(self, objective: Objective, batch: Any, key: Key, state: Curvature | None = None) -> Estimate:
        state = self.init(objective) if state is None else state
        directions, slope = _Preconditioned(state), CentralDifference(self.eps)
        seeds = directions.seeds(key, self.probes, objective.dimension)
        with ruled(LOSSES_IN_FLOAT32):  # as the ends are
            here = objective.evaluate(batch, key).double()
        ends = [slope.measure(objective, batch, key, directions, [seed]) for seed in seeds]
        slopes = torch.cat([measured for _, measured in ends])
        # The mean of the two ends is the loss that a central difference reports.
        curvatures = torch.stack([mean - here for mean, _ in ends]) / self.eps**2
        gradient = Seeded(objective, directions, seeds, tuple(s / self.probes for s in numbers(slopes)))
        return Estimate(here, gradient, slopes, self._learned(objective, state, seeds, numbers(curvatures)))

    def _learned(
        self, objective: Objective, state: Curvature, seeds: Sequence[int], curvatures: Sequence[float]
    ) -> dict[str, Tensor]:
        """The state after curvatures c_k along these seeds' directions, made leaf by leaf."""
        new: dict[str, Tensor] = {}
        for leaf in objective.leaves:
            old, total = state[leaf.name], torch.zeros_like(state[leaf.name])
            for seed, curvature in zip(seeds, curvatures, strict=True):
                u = Gaussian().add(torch.zeros_like(old), leaf, [seed], [1.0], in_place=True)
                total.add_(u.square_(), alpha=curvature / self.probes)
                del u  # before the next one is made
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
    """z = Sigma^{1/2} u, u ~ N(0, I). Beside the leaf that it is added to, two of its size are alive meanwhile."""

    inverse: Curvature = field(repr=False)
    unbiased = False

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return Gaussian().seeds(key, probes, dimension)

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        # Half precision is computed in float32 and rounded once.
        precise = base.dtype if base.dtype == torch.float64 else torch.float32
        zero = torch.zeros_like(base, dtype=precise, memory_format=torch.contiguous_format)
        shift = Gaussian().add(zero, leaf, seeds, scales, in_place=True).div_(self.inverse[leaf.name].sqrt())
        moved = shift.add_(base)
        return base.copy_(moved) if in_place else moved.to(base.dtype)
