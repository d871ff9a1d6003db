"""Directions that lean towards a guide."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

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
    """z = sqrt(1 - share) u + sqrt(share d) r ghat: u of `directions`, ghat the guide over its norm, r a random sign.

    The state is the guide, a tensor for each leaf by name. It starts as zeros, and while it is zero z = u; left
    alone it is the last estimate's gradient. Any other, an older exact gradient or that of a cheaper model, is
    given as `estimate(..., state=Guided.towards(gradient.leaves()))`, at every estimate.

    Law: E[z] = 0 and E[z z'] = (1 - share) I + share d ghat ghat', where it is I of u; E|z|^2 = d. So it is
    biased: the part of the gradient along ghat is stretched by 1 - share + share d and the rest shrunk by
    1 - share. On a linear loss whose gradient is the guide, E[cos^2] is about share + (1 - share) / d, where u
    alone has 1 / d.

    It keeps d numbers (twice that while a new guide is made); its gradient holds the guide until it is dropped.

    Source: Maheswaranathan, Metz, Tucker, Choi, Sohl-Dickstein, "Guided evolutionary strategies",
    arXiv 1806.10230 (2019), section 3: Sigma = alpha / n I + (1 - alpha) / k U U', here times n = d, with k = 1,
    U = ghat and alpha = 1 - share; the sign in the place of their normal number makes |z| scatter less.
    Raises: ValueError when the share is not between 0 and 1, or the state lacks a leaf.
    """

    directions: Directions = Gaussian()
    share: float = 0.5
    unbiased = False

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise BadInput(
                f"the share of a direction's square that is along the guide is between 0 and 1, not {self.share!r}. "
                "At 0 take the directions alone; at 1 nothing but the guide would ever be looked along."
            )

    @staticmethod
    def towards(gradient: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The state that guides towards a gradient, given by its leaves, which it holds on to."""
        return dict(gradient)

    def init(self, objective: Objective) -> Guide:
        return {leaf.name: torch.zeros_like(leaf.parameter, requires_grad=False) for leaf in objective.leaves}

    def resolve(self, objective: Objective, key: Key, state: Guide) -> Directions:
        missing = [leaf.name for leaf in objective.leaves if leaf.name not in state]
        if missing:
            raise BadInput(
                f"the guide has no tensor for {', '.join(missing)}: it needs one for each leaf of the objective, as "
                "Guided.towards(gradient.leaves()) gives them."
            )
        norm = _norm(objective, state)
        return _Leaning(self.directions, self.share, state, norm, key.fold("sign")) if norm else self.directions

    def update(self, state: Guide, gradient: Iterator[tuple[str, Tensor]]) -> Guide:
        return self.towards(gradient)


def _norm(objective: Objective, guide: Guide) -> float:
    squares = [guide[leaf.name].detach().double().square().sum() for leaf in objective.leaves]
    return math.sqrt(sum(numbers(torch.stack([square.cpu() for square in squares]))))


@dataclass(frozen=True, eq=False)
class _Leaning(Directions):
    """The directions of one estimate, with its guide."""

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
        along = sum(sign * scale for sign, scale in zip(signs, scales, strict=True))
        guide = self.guide[leaf.name].detach()
        length = along * math.sqrt(self.share * leaf.dimension) / self.norm
        moved = base.add_(guide, alpha=length) if in_place else torch.add(base.detach(), guide, alpha=length)
        rest = [scale * math.sqrt(1 - self.share) for scale in scales]
        return self.directions.add(moved.contiguous(), leaf, seeds, rest, in_place=True)
