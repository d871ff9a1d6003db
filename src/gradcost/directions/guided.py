"""Directions biased towards a guide, such as an earlier gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradcost.core.complex_numbers import as_real
from gradcost.core.errors import BadInput
from gradcost.core.fake import numbers
from gradcost.core.key import Key
from gradcost.core.objective import Leaf, Objective
from gradcost.core.value import value
from gradcost.directions.direction import Directions, StatefulDirections
from gradcost.directions.independent import Gaussian

Guide = Mapping[str, Tensor]


@value
class Guided(StatefulDirections):
    """z = sqrt(1 - share) u + sqrt(share d) r ghat: u from `directions`, ghat = guide / |guide|, r a random sign.

    The guide is the gradient of the last estimate. At the first estimate it is zero, and z = u. The guide is the
    state, a dict from leaf name to tensor. For another guide, such as an older exact gradient or a cheaper model's
    gradient, pass `state=Guided.towards(gradient.leaves())` to every estimate.

    Law: E[z] = 0 and E|z|^2 = d. If E[u u'] = I, then E[z z'] = (1 - share) I + share d ghat ghat'. So the estimate
    of a gradient grad is biased: its mean is (1 - share) grad + share d (ghat . grad) ghat. If the guide is the exact
    gradient of a linear loss, the mean squared cosine between that gradient and the estimate of one probe is about
    share + (1 - share) / d. For u alone it is 1 / d.

    Memory: d numbers for the guide, and 2 d during an update. A gradient references its guide.

    Args:
        directions: the distribution of u.
        share: fraction of E|z|^2 along the guide, above 0 and below 1.
    Raises:
        BadInput: the share is out of range, or the state lacks a leaf.
    Source: Maheswaranathan, Metz, Tucker, Choi, Sohl-Dickstein, "Guided evolutionary strategies", arXiv 1806.10230
    (2019), section 3: Sigma = alpha / n I + (1 - alpha) / k U U', here times n = d, with k = 1, U = ghat and
    alpha = 1 - share. A sign replaces their normal number, so that |z| varies less.
    """

    directions: Directions = Gaussian()
    share: float = 0.5
    unbiased = False

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise BadInput(
                f"share, the fraction of a direction's squared norm along the guide, must be above 0 and "
                f"below 1, not {self.share!r}. "
                "For 0 use the directions alone; with 1 every direction would be the guide."
            )

    @staticmethod
    def towards(gradient: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return the state whose guide is this gradient. The state references the gradient's tensors.

        Args:
            gradient: one (leaf name, tensor) per leaf, such as the result of `Gradient.leaves()`.
        """
        return dict(gradient)

    def init(self, objective: Objective) -> Guide:
        return {leaf.name: torch.zeros_like(leaf.parameter, requires_grad=False) for leaf in objective.leaves}

    def resolve(self, objective: Objective, key: Key, state: Guide) -> tuple[Directions, Guide]:
        missing = [leaf.name for leaf in objective.leaves if leaf.name not in state]
        if missing:
            raise BadInput(
                f"the guide has no tensor for {', '.join(missing)}: it needs one for each leaf of the objective. "
                "Make it by Guided.towards(gradient.leaves())."
            )
        norm = _norm(objective, state)
        if norm == 0:
            return self.directions, state
        return _WithGuide(self.directions, self.share, state, norm, key.fold("sign")), state

    def update(self, state: Guide, gradient: Iterator[tuple[str, Tensor]]) -> Guide:
        return self.towards(gradient)


def _norm(objective: Objective, guide: Guide) -> float:
    squares = [as_real(guide[leaf.name].detach()).double().square().sum() for leaf in objective.leaves]
    return math.sqrt(sum(numbers(torch.stack([square.cpu() for square in squares]))))


@dataclass(frozen=True, eq=False)
class _WithGuide(Directions):
    """The directions of one estimate, with its guide. `key` determines the random sign of each seed."""

    directions: Directions
    share: float
    guide: Guide = field(repr=False)
    norm: float
    key: Key
    unbiased = False

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return self.directions.seeds(key, probes, dimension)

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        signs = [1 - 2 * (self.key.fold("probe", seed).seed & 1) for seed in seeds]
        signed_sum = sum(sign * scale for sign, scale in zip(signs, scales, strict=True))
        guide = self.guide[leaf.name].detach()
        factor = signed_sum * math.sqrt(self.share * leaf.dimension) / self.norm
        result = base.add_(guide, alpha=factor) if in_place else torch.add(base.detach(), guide, alpha=factor)
        inner_scales = [scale * math.sqrt(1 - self.share) for scale in scales]
        return self.directions.add(result.contiguous(), leaf, seeds, inner_scales, in_place=True)
