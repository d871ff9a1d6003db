"""Two estimators, each for its own parameters."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from gradcost.core.errors import Unsupported
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.value import value
from gradcost.estimators.estimator import Estimate, Estimator, Facts, LeafConsumer, State
from gradcost.estimators.gradient import Concatenated, Streamed
from gradcost.estimators.probing import replayed


class Halves(NamedTuple):
    """The states of the two estimators."""

    inside: State | None
    outside: State | None


@value
class Mixed(Estimator):
    """Parameters whose names match `named` get their gradient from `inside`, all others from `outside`.

    Law: unbiased if both estimators are. Each estimator sees a function of its own parameters, at the same point,
    with the same key and therefore the same dropout masks. The cost is the sum of both.

    With backprop `inside`, the other parameters are frozen meanwhile. Nothing before the first parameter of `inside`
    is saved, so backprop adds only the memory of the last layers. `Estimate.loss` is that of `inside`;
    `Estimate.slopes` and `clipped` are those of `outside`.

    Args:
        named: a shell-style pattern: `*` matches any characters, dots included, `[ab]` one of them. Examples:
            `head.*`, `blocks.1[01].*`.
        inside: the estimator of the matching parameters.
        outside: the estimator of the others.
    Raises:
        Unsupported: no parameter matches, or all do.
    Source: ElasticZO (Sugiura and Matsutani, arXiv 2501.04287): backprop for the last layers, finite differences
        before them.
    """

    named: str
    inside: Estimator
    outside: Estimator

    @property
    def facts(self) -> Facts:
        return Facts(
            exact=self.inside.exact and self.outside.exact, unbiased=self.inside.unbiased and self.outside.unbiased
        )

    def init(self, objective: Objective) -> Halves | None:
        inner, outer = self._split(objective)
        return _halves(self.inside.init(inner), self.outside.init(outer))

    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        inner, outer = self._split(objective)
        before = state or Halves(None, None)
        low = self.outside.estimate(outer, batch, key, before.outside)
        high = self.inside.estimate(inner, batch, key, before.inside)
        gradient = Concatenated(objective, (high.gradient, low.gradient))
        return Estimate(high.loss, gradient, low.slopes, _halves(high.state, low.state), low.clipped)

    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        inner, outer = self._split(objective)
        before = state or Halves(None, None)
        # Both are evaluated first: `use` may change a parameter.
        low = self.outside.estimate(outer, batch, key, before.outside)
        high = self.inside.stream(inner, batch, key, use, before.inside)
        streamed = Streamed(objective, high.gradient.message_nbytes + low.gradient.message_nbytes)
        replayed(low, use)
        return Estimate(high.loss, streamed, low.slopes, _halves(high.state, low.state), low.clipped)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        if (reason := self._refusal(objective)) is not None:
            return reason
        inner, outer = self._split(objective)
        return self.inside.objection(inner, batch) or self.outside.objection(outer, batch)

    def _split(self, objective: Objective) -> tuple[Objective, Objective]:
        """The objective as a function of the matching parameters, and of the others."""
        if (reason := self._refusal(objective)) is not None:
            raise Unsupported(reason)
        matching = self._matching(objective)
        return objective.only(matching), objective.only({leaf.name for leaf in objective.leaves} - matching)

    def _matching(self, objective: Objective) -> set[str]:
        return {leaf.name for leaf in objective.leaves if fnmatchcase(leaf.name, self.named)}

    def _refusal(self, objective: Objective) -> str | None:
        names = [leaf.name for leaf in objective.leaves]
        matching = len(self._matching(objective))
        if 0 < matching < len(names):
            return None
        which, alone = ("every parameter", self.inside) if matching else ("no parameter", self.outside)
        shown = ", ".join(names if len(names) <= 12 else [*names[:6], "...", *names[-6:]])
        return (
            f"{which} matches {self.named!r}, so there are not two groups: use {alone} alone, or a pattern that "
            f"matches some of the parameters {shown}."
        )


def _halves(inside: State | None, outside: State | None) -> Halves | None:
    return None if inside is None and outside is None else Halves(inside, outside)
