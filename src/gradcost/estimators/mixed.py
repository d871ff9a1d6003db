"""Two estimators, each for its own leaves."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from gradcost.core.errors import Unsupported
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.value import value
from gradcost.estimators.estimator import Estimate, Estimator, LeafConsumer, State
from gradcost.estimators.gradient import Concatenated, Streamed
from gradcost.estimators.probing import replayed


class Halves(NamedTuple):
    """The states of the two estimators."""

    inside: State | None
    outside: State | None


@value
class Mixed(Estimator):
    """The leaves whose names match `named` get their gradient from `inside`, all the others from `outside`.

    `named` is a pattern of file names: `*` stands for any characters, dots too, `[ab]` for one of them, as in
    `head.*` or `blocks.1[01].*`. Each estimator sees a function of its own leaves, at the same weights, under the
    same key and so under one dropout mask. Unbiased where both are. With backprop `inside` the other parameters
    require no gradient meanwhile: nothing before the first leaf of its own is saved for its way back, so that the
    last layers' memory is all that backprop adds. Probes `outside` look along fewer directions than there were.

    The loss is that of `inside`, the slopes and clips are those of `outside`. The cost is that of both.

    Source: ElasticZO (Sugiura and Matsutani, arXiv 2501.04287): backprop for the last layers, differences before
    them. Raises: ValueError when no leaf or every leaf matches.
    """

    named: str
    inside: Estimator
    outside: Estimator

    def init(self, objective: Objective) -> Halves | None:
        inner, outer = self._cut(objective)
        return _halves(self.inside.init(inner), self.outside.init(outer))

    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        inner, outer = self._cut(objective)
        before = state or Halves(None, None)
        low = self.outside.estimate(outer, batch, key, before.outside)
        high = self.inside.estimate(inner, batch, key, before.inside)
        gradient = Concatenated(objective, (high.gradient, low.gradient))
        return Estimate(high.loss, gradient, low.slopes, _halves(high.state, low.state), low.clipped)

    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        inner, outer = self._cut(objective)
        before = state or Halves(None, None)
        # The evaluations of both come first: what uses a leaf may change it.
        low = self.outside.estimate(outer, batch, key, before.outside)
        high = self.inside.stream(inner, batch, key, use, before.inside)
        spent = Streamed(objective, _message(high) + low.gradient.nbytes)
        replayed(low, use)
        return Estimate(high.loss, spent, low.slopes, _halves(high.state, low.state), low.clipped)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        sentence = self._uncut(objective)
        if sentence is not None:
            return sentence
        inner, outer = self._cut(objective)
        return self.inside.objection(inner, batch) or self.outside.objection(outer, batch)

    def _cut(self, objective: Objective) -> tuple[Objective, Objective]:
        """The objective as a function of the leaves that match, and of those that do not."""
        sentence = self._uncut(objective)
        if sentence is not None:
            raise Unsupported(sentence)
        matching = self._matching(objective)
        return objective.only(matching), objective.only({leaf.name for leaf in objective.leaves} - matching)

    def _matching(self, objective: Objective) -> set[str]:
        return {leaf.name for leaf in objective.leaves if fnmatchcase(leaf.name, self.named)}

    def _uncut(self, objective: Objective) -> str | None:
        names = [leaf.name for leaf in objective.leaves]
        matching = len(self._matching(objective))
        if 0 < matching < len(names):
            return None
        which, alone = ("every leaf", self.inside) if matching else ("no leaf", self.outside)
        shown = ", ".join(names if len(names) <= 12 else [*names[:6], "...", *names[-6:]])
        return (
            f"{which} matches {self.named!r}, so there are not two groups: use {alone} alone, or a pattern of some "
            f"of the leaves {shown}."
        )


def _halves(inside: State | None, outside: State | None) -> Halves | None:
    return None if inside is None and outside is None else Halves(inside, outside)


def _message(spent: Estimate) -> int:
    return spent.gradient.message if isinstance(spent.gradient, Streamed) else spent.gradient.nbytes
