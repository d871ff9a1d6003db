"""Select one of several candidate directions for each group of parameters, by the slopes along them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradcost.core.errors import BadInput
from gradcost.core.fake import numbers
from gradcost.core.finite import require_finite
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.value import value
from gradcost.directions import StatefulDirections
from gradcost.directions.confined import confined
from gradcost.directions.groups import EachLeaf, Grouping
from gradcost.estimators.combine import Mean
from gradcost.estimators.estimator import Estimate, Estimator, Facts, LeafConsumer, State
from gradcost.estimators.gradient import Concatenated, Seeded
from gradcost.estimators.probing import Probing, replayed


class Choice(ABC):
    """A rule that selects one of several directions by the slopes along them."""

    @abstractmethod
    def of(self, slopes: Sequence[float]) -> int:
        """Return the index of the selected direction.

        Args:
            slopes: the slope along each candidate.
        """


@value
class Steepest(Choice):
    """Select the candidate with the largest |slope|: the one most aligned with the gradient."""

    def of(self, slopes: Sequence[float]) -> int:
        return max(range(len(slopes)), key=lambda number: abs(slopes[number]))


@value
class Flattest(Choice):
    """Select the candidate with the smallest |slope|: the one least aligned with the gradient. For comparison only.

    The public code of the paper that `Adaptive` cites selects the smallest slope, but only at the first training
    step. Here every estimate selects.
    """

    def of(self, slopes: Sequence[float]) -> int:
        return min(range(len(slopes)), key=lambda number: abs(slopes[number]))


@value
class Adaptive(Estimator):
    """g = sum over groups of parameters of s z: z is one of `candidates` directions, s the slope of the loss along z.

    A group's candidates are zero outside the group. The slopes along all candidates are measured, and `choice`
    selects z by them. With several probes, each group's gradient is the mean over as many selections.

    Law: with Gaussian directions and exact slopes E g = m grad, where m is the mean of the largest (Steepest) or the
    smallest (Flattest) of `candidates` chi-square variables with one degree of freedom. `selection_bias` computes m.
    One candidate has m = 1 and is unbiased. With more candidates, Steepest has m > 1, which a smaller learning rate
    compensates, and Flattest has m < 1. Proof: with grad the group's gradient and w standard normal,
    z = w grad/|grad| + a part independent of w, and s = w |grad|. The choice depends on w only.

    Cost: `candidates` slopes of the full loss per group and probe. With Jvp only the group's parameters have
    tangents. Memory: the gradient is seeded, 16 bytes per group and probe. `Estimate.slopes` holds the slopes along
    the selected directions, group by group.

    Args:
        estimator: a Probing with stateless directions and combine=Mean().
        candidates: the number of directions to select from.
        choice: the rule that selects a candidate.
        by: the rule that divides parameters into groups.
    Raises:
        BadInput: candidates < 1, the directions are stateful, or combine is not Mean().
    Source: what Panchal, Choudhary, Brun, Guan, "The Cost of Avoiding Backpropagation", arXiv 2506.21833 (2025) call
        adaptive perturbation sampling.
    """

    estimator: Probing
    candidates: int = 4
    choice: Choice = Steepest()
    by: Grouping = EachLeaf()

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise BadInput(
                f"candidates is the number of directions to select from, 1 or more, not {self.candidates!r}."
            )
        if not isinstance(self.estimator, Probing):
            raise BadInput(
                f"Adaptive selects among the directions of a Probing, and {self.estimator} has none: use "
                "forward_gradient() or mezo(), and wrap the result."
            )
        if isinstance(self.estimator.directions, StatefulDirections):
            raise BadInput(
                f"Adaptive draws candidates for each group, and {self.estimator.directions} depend on more than a "
                "seed: use Gaussian() or other stateless directions."
            )
        if self.estimator.combine != Mean():
            raise BadInput(
                f"Adaptive multiplies the selected directions by their slopes, so {self.estimator.combine} has no "
                "effect: leave the Probing's combine as Mean()."
            )

    @property
    def facts(self) -> Facts:
        return Facts(inner=self.estimator, unbiased=self.candidates == 1 and self.estimator.unbiased)

    def init(self, objective: Objective) -> None:
        return None

    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        losses, pieces, slopes = [], [], []
        for number, group in enumerate(self._groups(objective)):
            loss, gradient, selected = self._select(objective, group, batch, key, number)
            losses.append(loss)
            pieces.append(gradient)
            slopes += selected
        return Estimate(torch.stack(losses).mean(), Concatenated(objective, tuple(pieces)), torch.stack(slopes))

    def _groups(self, objective: Objective) -> list[Objective]:
        """Return one objective per group: the same loss as a function of the group's parameters only."""
        names: dict[int, list[str]] = {}
        for name, number in self.by.groups(objective).items():
            names.setdefault(number, []).append(name)
        return [objective.only(names[number]) for number in sorted(names)]

    def _select(
        self, objective: Objective, group: Objective, batch: Any, key: Key, number: int
    ) -> tuple[Tensor, Seeded, list[Tensor]]:
        """Return the loss, the gradient of one group, and the slopes along the selected directions."""
        probes, directions, n = self.estimator.probes, self.estimator.directions, self.candidates
        assert not isinstance(directions, StatefulDirections)
        # One call for all candidates lets them share a forward pass. All groups have the dropout masks of `key`.
        seeds = directions.seeds(key.fold("group", number), probes * n, group.dimension)
        in_group = confined(directions, group.leaves)
        loss, slopes = self.estimator.slope.measure(objective, batch, key, in_group, seeds)
        require_finite(loss, slopes)
        values = numbers(slopes)
        selected = [start + self.choice.of(values[start : start + n]) for start in range(0, probes * n, n)]
        coefficients = tuple(values[k] / probes for k in selected)
        gradient = Seeded(group, directions, tuple(seeds[k] for k in selected), coefficients)
        return loss, gradient, [slopes[k] for k in selected]

    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        return replayed(self.estimate(objective, batch, key, state), use)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return self.estimator.objection(objective, batch)
