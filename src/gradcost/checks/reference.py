"""Facts about a model and a batch, the same for every estimator: the gradient, the precision of the loss."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradcost.checks.forward_mode_support import blocked_modules, uses_fused_attention
from gradcost.core.complex_numbers import as_real
from gradcost.core.errors import GradcostError, brief, first_line
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.precision import LOSSES_IN_FLOAT32, coarsest, loss_roundoff, spacing
from gradcost.directions import Rademacher
from gradcost.estimators.gradient import Dense, Gradient
from gradcost.estimators.reverse import Reverse
from gradcost.slopes.forward_mode import Blocked
from gradcost.slopes.substitution import with_rules

CLOSE = 0.05  # largest accepted error of a finite difference, in units of |grad|


class Mismatch(NamedTuple):
    """How much backpropagation and a finite difference of the loss disagree, in units of |grad|.

    Args:
        error: |<grad, z> - finite difference|.
        spread: the difference between finite differences at two eps: large if the loss is coarse or discontinuous.
    """

    error: float
    spread: float


class Reference:
    """Facts about a model and a batch, each computed on first use and cached.

    Checks of several estimators may share a Reference. It stores one whole gradient. With random layers the loss is
    a different function under each key, so `gradient` costs one backpropagation per key.

    Args:
        objective: the model and its loss. For an estimator that splits the batch into n micro-batches, pass
            `objective.in_micro_batches(n)`.
        batch: any pytree; passed to the loss as it is.
        key: the seed of the random layers.
    """

    def __init__(self, objective: Objective, batch: Any, key: Key) -> None:
        self.objective, self.batch, self.key = objective, batch, key

    @functools.cached_property
    def loss(self) -> float:
        """The loss under the key."""
        return float(self.objective.evaluate(self.batch, self.key))

    @functools.cached_property
    def noise(self) -> float:
        """The absolute difference of two losses at the same weights and key: 0 with deterministic kernels."""
        return abs(float(self.objective.evaluate(self.batch, self.key)) - self.loss)

    @functools.cached_property
    def resolution(self) -> float:
        """The distance from the loss to the next number of its dtype (one ulp)."""
        return spacing(self.loss, self.objective.evaluate(self.batch, self.key).dtype)

    @functools.cached_property
    def key_difference(self) -> float:
        """The absolute difference of the losses under two keys: 0 without random layers."""
        return abs(float(self.objective.evaluate(self.batch, self.key.fold("another"))) - self.loss)

    @functools.cached_property
    def tolerance(self) -> float:
        """The accepted relative rounding error of an exact method: sqrt of the epsilon of the coarsest dtype."""
        return torch.finfo(coarsest(self.objective)).eps ** 0.5

    @functools.cached_property
    def rounding(self) -> float:
        """The estimated rounding error of the loss in the least precise dtype of weights and autocast."""
        return loss_roundoff(coarsest(self.objective)) * abs(self.loss)

    @functools.cached_property
    def refusal(self) -> str | None:
        """Why there is no gradient to compare with; None if there is one."""
        try:
            norm = self.norm
        except GradcostError as error:
            return first_line(error)
        except Exception as error:
            return brief(error)
        if norm == 0 or not math.isfinite(norm):
            return f"the norm of the gradient is {norm:g}."
        return None

    @functools.cached_property
    def _gradient(self) -> Dense:
        return self._backprop(self.key)

    @functools.cached_property
    def norm(self) -> float:
        """|grad| under the key."""
        return self._gradient.norm()

    def gradient(self, key: Key) -> Mapping[str, Tensor]:
        """Return the gradient by backpropagation, by parameter name, of the loss under `key`."""
        return (self._backprop(key) if self.key_difference and key != self.key else self._gradient).tensors

    def _backprop(self, key: Key) -> Dense:
        gradient = Reverse().estimate(self.objective, self.batch, key).gradient
        assert isinstance(gradient, Dense)
        return gradient

    def slope(self, seed: int) -> float:
        """Return <grad, z> in float64, where z is the Rademacher direction of `seed`."""
        gradient = self.gradient(self.key)
        return sum(
            float(dot(gradient[leaf.name], Rademacher().draw(leaf, [seed], [1.0]))) for leaf in self.objective.leaves
        )

    @functools.cached_property
    def mismatch(self) -> Mismatch:
        """The error of <grad, z> against a finite difference of the loss.

        It is large where .data, .detach() or a straight-through estimator cut the path: backpropagation then
        differentiates a different function. The error is the smallest over three eps, then the largest over three
        directions. The parameters themselves move, without substitution, so the difference is right for every model.
        Memory: one copy of the weights.
        """
        balanced_eps = self.tolerance ** (2 / 3)  # (machine epsilon)^(1/3) balances rounding and curvature
        worst = Mismatch(0.0, 0.0)
        for seed in range(3):
            slopes = [self._difference(seed, balanced_eps * factor) / self.norm for factor in (10.0, 1.0, 0.1)]
            exact = self.slope(seed) / self.norm
            error = min(abs(slope - exact) for slope in slopes)
            spread = min(abs(slope - other) for slope, other in itertools.pairwise(slopes))
            worst = max(worst, Mismatch(error, spread))
        return worst

    def _difference(self, seed: int, eps: float) -> float:
        """Return the central difference along the Rademacher direction of `seed`, with weights that really move."""
        ends = []
        for step in (eps, -eps):
            leaves = self.objective.leaves
            moved = {leaf.name: Rademacher().add(leaf.parameter.detach(), leaf, [seed], [step]) for leaf in leaves}
            with self.objective.at_weights(moved), with_rules(LOSSES_IN_FLOAT32):
                ends.append(float(self.objective.evaluate(self.batch, self.key)))
        return (ends[0] - ends[1]) / (2 * eps)

    @functools.cached_property
    def zero_gradients(self) -> tuple[str, ...]:
        """The names of the parameters whose gradient is exactly 0."""
        gradient = self.gradient(self.key)
        return tuple(leaf.name for leaf in self.objective.leaves if not bool(_flat(gradient[leaf.name]).any()))

    @functools.cached_property
    def blocked(self) -> tuple[Blocked, ...]:
        """The modules that forward mode cannot differentiate."""
        return blocked_modules(self.objective, self.batch, self.key)

    @functools.cached_property
    def fused_attention(self) -> bool:
        """Whether the model uses fused attention, which has no forward-mode rule."""
        return uses_fused_attention(self.objective, self.batch, self.key)


def products(gradient: Gradient, other: Mapping[str, Tensor]) -> tuple[float, float, float]:
    """Return <g, h>, |g|^2 and |h|^2 in float64. g: `gradient`, read one tensor at a time; h: `other`."""
    sums = [0.0, 0.0, 0.0]
    for name, leaf in gradient.leaves():
        pairs = ((leaf, other[name]), (leaf, leaf), (other[name], other[name]))
        sums = [total + float(dot(*pair)) for total, pair in zip(sums, pairs, strict=True)]
    return sums[0], sums[1], sums[2]


def dot(one: Tensor, other: Tensor) -> Tensor:
    """Return the inner product of two tensors as real vectors, in float64."""
    return _flat(one) @ _flat(other)


def _flat(tensor: Tensor) -> Tensor:
    """Return the real numbers of a tensor as a float64 vector."""
    tensor = tensor.detach()
    return as_real(tensor.to_dense() if tensor.is_sparse else tensor).double().flatten()
