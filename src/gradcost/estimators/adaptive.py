"""Several candidate directions per group of parameters, of which one is selected by its slope."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradcost.core.errors import BadInput
from gradcost.core.fake import numbers
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
    """A rule that selects one of several directions by their slopes."""

    @abstractmethod
    def of(self, slopes: Sequence[float]) -> int:
        """Return the index of the selected direction.

        Args:
            slopes: the slopes of the candidates.
        """


@value
class Steepest(Choice):
    """Select the largest |slope|: the candidate most aligned with the gradient."""

    def of(self, slopes: Sequence[float]) -> int:
        return max(range(len(slopes)), key=lambda number: abs(slopes[number]))


@value
class Flattest(Choice):
    """Select the smallest |slope|: the candidate least aligned with the gradient; for comparison only.

    The public code of the paper that `Adaptive` cites selects the smallest slope, at its first step only. Here the
    selection is made at each estimate.
    """

    def of(self, slopes: Sequence[float]) -> int:
        return min(range(len(slopes)), key=lambda number: abs(slopes[number]))


@value
class Adaptive(Estimator):
    """g = sum over groups of parameters of s z, where z is selected from `candidates` directions of that group.

    A candidate is zero outside its group. The slope of each candidate is measured, and `choice` selects one.

    Law: with Gaussian directions and exact slopes E g = m grad, where m is the mean of the largest (Steepest) or the
    smallest (Flattest) of `candidates` chi-square variables with one degree of freedom; `selection_bias` computes
    it. One candidate is unbiased. Steepest with more scales the mean up, which the learning rate absorbs; Flattest
    scales it towards 0. (z is w grad/|grad| plus a part independent of w, and s is w |grad|, so the choice depends
    on w only.)

    Cost: `candidates` slopes per group and probe, each over the whole loss. With Jvp only the group's parameters have
    tangents. The gradient is seeded: 16 bytes per group and probe. `Estimate.slopes` holds the slopes of the selected
    directions, group by group. Several probes give the mean of as many selections.

    Args:
        estimator: a Probing with stateless directions and combine=Mean().
        candidates: the number of directions to select from.
        choice: which candidate is selected.
        by: how parameters are grouped.
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
            loss, gradient, kept = self._select(objective, group, batch, key, number)
            losses.append(loss)
            pieces.append(gradient)
            slopes += kept
        return Estimate(torch.stack(losses).mean(), Concatenated(objective, tuple(pieces)), torch.stack(slopes))

    def _groups(self, objective: Objective) -> list[Objective]:
        """The objective as a function of each group's parameters alone."""
        names: dict[int, list[str]] = {}
        for name, number in self.by.groups(objective).items():
            names.setdefault(number, []).append(name)
        return [objective.only(names[number]) for number in sorted(names)]

    def _select(
        self, objective: Objective, group: Objective, batch: Any, key: Key, number: int
    ) -> tuple[Tensor, Seeded, list[Tensor]]:
        """The loss, the gradient of one group's parameters, and the slopes that it contains."""
        probes, directions, tried = self.estimator.probes, self.estimator.directions, self.candidates
        assert not isinstance(directions, StatefulDirections)
        # One call for all candidates, so that they can share a forward pass; evaluations use the key of the estimate.
        seeds = directions.seeds(key.fold("group", number), probes * tried, group.dimension)
        within = confined(directions, group.leaves)
        loss, slopes = self.estimator.slope.measure(objective, batch, key, within, seeds)
        found = numbers(slopes)
        kept = [at + self.choice.of(found[at : at + tried]) for at in range(0, probes * tried, tried)]
        weights = tuple(found[k] / probes for k in kept)
        return loss, Seeded(group, directions, tuple(seeds[k] for k in kept), weights), [slopes[k] for k in kept]

    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        return replayed(self.estimate(objective, batch, key, state), use)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return self.estimator.objection(objective, batch)
