"""Several directions a group of leaves are tried, and one of them is kept."""

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
from gradcost.estimators.estimator import Estimate, Estimator, LeafConsumer, State
from gradcost.estimators.gradient import Concatenated, Seeded
from gradcost.estimators.probing import Probing, replayed


class Choice(ABC):
    """A rule for which of several directions is kept, given their slopes."""

    @abstractmethod
    def of(self, slopes: Sequence[float]) -> int:
        """The number of the one that is kept."""


@value
class Steepest(Choice):
    """The direction with the largest |slope|: the candidate most aligned with the gradient."""

    def of(self, slopes: Sequence[float]) -> int:
        return max(range(len(slopes)), key=lambda number: abs(slopes[number]))


@value
class Flattest(Choice):
    """The direction with the smallest |slope|: the candidate least aligned with the gradient.

    It is there to be compared with. The public code of the paper that `Adaptive` cites keeps the smallest, and
    chooses at its first step only; here the choice is made at each estimate.
    """

    def of(self, slopes: Sequence[float]) -> int:
        return min(range(len(slopes)), key=lambda number: abs(slopes[number]))


@value
class Adaptive(Estimator):
    """g = sum over groups of leaves of s z: in each group `candidates` directions that are zero outside of it are
    looked along, and the one that `choice` takes weighs in with its slope.

    Law: with Gaussian directions and exact slopes E g = m grad, where m is the mean of the largest (Steepest) or
    the smallest (Flattest) of `candidates` chi-square variables of one degree of freedom: `selection_bias` gives
    it. So `candidates` = 1 is unbiased, and more of them with Steepest stretch the mean, which a learning rate
    absorbs; Flattest shrinks it towards 0. (z is w grad/|grad| and a rest that knows nothing of w, and s is
    w |grad|: the choice is of w alone.)

    Cost: `candidates` slopes a group and probe, each over the whole loss; with Jvp only the leaves of the group carry
    tangents. The gradient is seeded: 16 bytes a group and probe. `Estimate.slopes` holds those of the directions
    that were kept, group by group. Several `probes` of the estimator are the mean of as many such choices.

    Raises: ValueError when candidates < 1, or the estimator's directions depend on where the weights are, or its
    slopes are not combined by their mean.

    Source: what Panchal, Choudhary, Brun, Guan, "The Cost of Avoiding Backpropagation", arXiv 2506.21833 (2025)
    call adaptive perturbation sampling.
    """

    estimator: Probing
    candidates: int = 4
    choice: Choice = Steepest()
    by: Grouping = EachLeaf()

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise BadInput(f"a direction is kept of 1 candidate or more, not of {self.candidates!r}.")
        if not isinstance(self.estimator, Probing):
            raise BadInput(
                f"Adaptive chooses among the directions of a Probing, and {self.estimator} looks along none: give "
                "it forward_gradient() or mezo(), and wrap the result."
            )
        if isinstance(self.estimator.directions, StatefulDirections):
            raise BadInput(
                f"Adaptive draws its candidates anew in each group, and {self.estimator.directions} depend on more "
                "than a seed: use Gaussian() directions, or any others that are plain."
            )
        if self.estimator.combine != Mean():
            raise BadInput(
                f"Adaptive weighs the directions that it keeps by their slopes, so {self.estimator.combine} has no "
                "part in it: leave the Probing's combine as Mean()."
            )

    def init(self, objective: Objective) -> None:
        return None

    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        losses, pieces, slopes = [], [], []
        for number, group in enumerate(self._groups(objective)):
            loss, gradient, kept = self._chosen(objective, group, batch, key, number)
            losses.append(loss)
            pieces.append(gradient)
            slopes += kept
        return Estimate(torch.stack(losses).mean(), Concatenated(objective, tuple(pieces)), torch.stack(slopes))

    def _groups(self, objective: Objective) -> list[Objective]:
        """The objective as a function of each group's leaves alone."""
        names: dict[int, list[str]] = {}
        for name, number in self.by.groups(objective).items():
            names.setdefault(number, []).append(name)
        return [objective.only(names[number]) for number in sorted(names)]

    def _chosen(
        self, objective: Objective, group: Objective, batch: Any, key: Key, number: int
    ) -> tuple[Tensor, Seeded, list[Tensor]]:
        """The loss, the gradient in one group's leaves, and the slopes that are in it."""
        probes, directions, tried = self.estimator.probes, self.estimator.directions, self.candidates
        assert not isinstance(directions, StatefulDirections)
        # One call for all, so that candidates can share a forward; the key of the evaluations is the estimate's.
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
