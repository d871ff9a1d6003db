"""What is true of a model and a batch whatever the estimator: the gradient, and how fine the loss is."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradcost.checks.forward_mode_support import blocked_modules, fuses_attention
from gradcost.core.errors import GradcostError
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import Rademacher
from gradcost.directions.direction import combination
from gradcost.estimators.gradient import Dense, Gradient
from gradcost.estimators.reverse import Reverse
from gradcost.slopes.forward_mode import Blocked
from gradcost.slopes.slope import CentralDifference

CLOSE = 0.05  # of |grad|: how near a slope by a difference of losses must come


class Reference:
    """The facts that every estimator is held against, each found when it is first asked for and then kept.

    Holds one whole gradient. A model with random layers is another function under another key: then `gradient`
    takes a backpropagation for each key.
    """

    def __init__(self, objective: Objective, batch: Any, key: Key) -> None:
        self.objective, self.batch, self.key = objective, batch, key

    @functools.cached_property
    def loss(self) -> float:
        """The loss here, under the key."""
        return float(self.objective.evaluate(self.batch, self.key))

    @functools.cached_property
    def floor(self) -> float:
        """How far two evaluations at one point under one key lie apart: 0 where the kernels are deterministic."""
        return abs(float(self.objective.evaluate(self.batch, self.key)) - self.loss)

    @functools.cached_property
    def resolution(self) -> float:
        """The distance from the loss to the next number of its type (one ulp)."""
        dtype = self.objective.evaluate(self.batch, self.key).dtype
        size = max(abs(self.loss), torch.finfo(dtype).tiny)
        return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(size))

    @functools.cached_property
    def random(self) -> float:
        """How far the loss under another key lies away: 0 where no layer draws."""
        return abs(float(self.objective.evaluate(self.batch, self.key.fold("another"))) - self.loss)

    @functools.cached_property
    def rounding(self) -> float:
        """The relative error that computing exactly, with these types, may make: the root of the coarsest epsilon."""
        types = {leaf.parameter.dtype for leaf in self.objective.leaves}
        return max(torch.finfo(dtype).eps for dtype in types) ** 0.5

    @functools.cached_property
    def refusal(self) -> str | None:
        """Why backpropagation gives no gradient here; None where it gives one."""
        try:
            norm = self.norm
        except (GradcostError, RuntimeError) as error:
            return str(error).split("\n")[0]
        if norm == 0 or not math.isfinite(norm):
            return f"the gradient's norm is {norm:g}, and nothing can be compared with it."
        return None

    @functools.cached_property
    def _first(self) -> Dense:
        return self._backprop(self.key)

    @functools.cached_property
    def norm(self) -> float:
        """|grad| under the key."""
        return self._first.norm()

    def gradient(self, key: Key) -> Mapping[str, Tensor]:
        """The gradient by backpropagation, leaf by leaf, of the function that the loss is under this key."""
        return (self._backprop(key) if self.random and key != self.key else self._first).tensors

    def _backprop(self, key: Key) -> Dense:
        found = Reverse().estimate(self.objective, self.batch, key).gradient
        assert isinstance(found, Dense)
        return found

    def along(self, seed: int) -> float:
        """<grad, z> for the Rademacher direction of this seed, in float64."""
        gradient = self.gradient(self.key)
        return sum(
            float(_dot(gradient[leaf.name], combination(Rademacher(), leaf, [seed], [1.0])))
            for leaf in self.objective.leaves
        )

    @functools.cached_property
    def mismatch(self) -> float:
        """How far <grad, z> lies from a difference of losses along z, in units of |grad|: where .data, .detach()
        or a straight-through estimator cut the path, the loss that backpropagation differentiates is another.

        The worst of three directions, each with the best of three steps: a smooth loss agrees at one of them.
        """
        best = self.rounding ** (2 / 3)  # the cube root of epsilon: where rounding and curvature are in balance
        worst = 0.0
        for seed in range(3):
            slopes = [
                CentralDifference(best * factor).measure(self.objective, self.batch, self.key, Rademacher(), [seed])
                for factor in (10.0, 1.0, 0.1)
            ]
            exact = self.along(seed)
            worst = max(worst, min(abs(float(slope) - exact) for _, slope in slopes) / self.norm)
        return worst

    @functools.cached_property
    def unmoved(self) -> tuple[str, ...]:
        """The leaves whose gradient is exactly 0."""
        gradient = self.gradient(self.key)
        return tuple(leaf.name for leaf in self.objective.leaves if not bool(gradient[leaf.name].any()))

    @functools.cached_property
    def blocked(self) -> tuple[Blocked, ...]:
        """The modules that cannot be differentiated forward."""
        return blocked_modules(self.objective, self.batch, self.key)

    @functools.cached_property
    def attention(self) -> bool:
        """Whether attention is switched to the math kernel while a Jvp slope is measured."""
        return fuses_attention(self.objective, self.batch, self.key)


def products(gradient: Gradient, other: Mapping[str, Tensor]) -> tuple[float, float, float]:
    """<g, h>, |g|^2 and |h|^2 in float64, with one leaf of g alive at a time."""
    sums = [0.0, 0.0, 0.0]
    for name, leaf in gradient.leaves():
        pairs = ((leaf, other[name]), (leaf, leaf), (other[name], other[name]))
        sums = [total + float(_dot(*pair)) for total, pair in zip(sums, pairs, strict=True)]
    return sums[0], sums[1], sums[2]


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return one.detach().double().flatten() @ other.detach().double().flatten()
