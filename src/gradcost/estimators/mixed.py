"""Combine two estimators, each for a part of the parameters."""

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

    Law: unbiased if both estimators are. Each estimates the gradient of its own parameters, with all others fixed.
    Both start from the same parameters and use the same key, and therefore the same dropout masks. The cost is the
    sum of both costs.

    If `inside` is backprop, the other parameters are frozen during backprop. It then saves no activations before the
    first matching parameter: if the last layers match, it adds only the memory of the last layers. `Estimate.loss`
    is that of `inside`; `Estimate.slopes` and `Estimate.clipped` are those of `outside`.

    Args:
        named: a shell-style pattern: `*` matches any characters, including dots; `[ab]` matches a or b. Examples:
            `head.*`, `blocks.1[01].*`.
        inside: the estimator for the matching parameters.
        outside: the estimator for all other parameters.
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
        states = state or Halves(None, None)
        rest = self.outside.estimate(outer, batch, key, states.outside)
        matched = self.inside.estimate(inner, batch, key, states.inside)
        gradient = Concatenated(objective, (matched.gradient, rest.gradient))
        return Estimate(matched.loss, gradient, rest.slopes, _halves(matched.state, rest.state), rest.clipped)

    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        inner, outer = self._split(objective)
        states = state or Halves(None, None)
        # `outside` first: `use` may change a parameter.
        rest = self.outside.estimate(outer, batch, key, states.outside)
        matched = self.inside.stream(inner, batch, key, use, states.inside)
        streamed = Streamed(objective, matched.gradient.message_nbytes + rest.gradient.message_nbytes)
        replayed(rest, use)
        return Estimate(matched.loss, streamed, rest.slopes, _halves(matched.state, rest.state), rest.clipped)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        if (reason := self._refusal(objective)) is not None:
            return reason
        inner, outer = self._split(objective)
        return self.inside.objection(inner, batch) or self.outside.objection(outer, batch)

    def _split(self, objective: Objective) -> tuple[Objective, Objective]:
        """Return the objective restricted to the matching parameters, and restricted to the others."""
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
