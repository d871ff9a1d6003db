"""Directional derivatives of the loss: a Jacobian-vector product, or a finite difference."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.objective import Leaf, Objective
from gradcost.core.precision import LOSSES_IN_FLOAT32, best_eps, best_forward_eps, coarsest, scale_of
from gradcost.core.value import value
from gradcost.directions import Directions, Rademacher
from gradcost.slopes import forward_mode, rounding_check
from gradcost.slopes.substitution import substituted, with_rules


class Slope(ABC):
    """Measures the directional derivative s_k = d/dt loss(theta + t z_k) at t = 0, for each direction z_k.

    `exact` is True if the slope has no finite-difference error.
    """

    exact: ClassVar[bool]

    @abstractmethod
    def measure(
        self, objective: Objective, batch: Any, key: Key, directions: Directions, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and its slopes. Law: weights, buffers and generators are unchanged afterwards.

        Args:
            objective: the model and the loss.
            batch: any pytree; passed to the loss as it is.
            key: seeds the random layers, such as dropout.
            directions: the distribution of the directions.
            seeds: one seed per direction.
        Returns:
            The loss (a scalar) and the slopes (float64, shape (len(seeds),)).
        """

    @abstractmethod
    def objection(self, objective: Objective, batch: Any) -> str | None:
        """Return why this slope cannot be measured here and what to use instead, or None.

        Args:
            objective: the model and the loss.
            batch: any pytree; passed to the loss as it is.
        """


@value
class CentralDifference(Slope):
    """Two-sided finite difference: s = (loss(theta + eps z) - loss(theta - eps z)) / (2 eps).

    Cost: two forward passes per probe. Bias: O(eps^2).

    - Perturbed weights are computed out of place, one module at a time. Both evaluations use the same dropout masks
      and the same buffers.
    - The reported loss is the mean of all evaluated losses, so it needs no further forward pass. Per probe it differs
      from loss(theta) by about eps^2/2 z'Hz, with H the Hessian.
    - If the loss has a kink between the two points, s is the mean derivative between them.
    - Losses of torch.nn.functional convert half-precision inputs to float32.
    - A Note warns if half-precision weights lose the perturbation by rounding, or if the losses are too close.

    Law of eps=None: each estimate uses eps = w (3 u)^(1/3) (`best_eps`). w is the typical size of a weight
    (`scale_of`). u is the relative round-off of the loss (`loss_roundoff`) for the weights' dtype, or for autocast's
    if that is less precise. eps / w is 0.0056 in float32, 0.025 in float16 and 0.036 in bfloat16. For most weights,
    this eps exceeds the distance to the next number of the dtype. Keep weights far larger than w, such as LayerNorm's
    ones, in float32.

    Args:
        eps: finite-difference step, in units of the parameters. None chooses it.
    Raises:
        BadInput: eps is not above 0.
    Source: Spall 1992, equation 2.2.
    """

    eps: float | None = None
    exact = False

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def step(self, objective: Objective) -> float:
        """Return `eps`, or the eps chosen for the current weights if `eps` is None."""
        return best_eps(coarsest(objective), scale_of(objective)) if self.eps is None else self.eps

    def measure(
        self, objective: Objective, batch: Any, key: Key, directions: Directions, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        eps = self.step(objective)
        ends = [shifted(objective, batch, key, directions, seed, step) for seed in seeds for step in (eps, -eps)]
        rounding_check.warn_if_rounded(objective, self, eps, directions, seeds[0], ends)
        losses = torch.stack([end.double() for end in ends])
        return losses.mean(), (losses[::2] - losses[1::2]) / (2 * eps)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return _compiled_module(objective)


@value
class ForwardDifference(Slope):
    """One-sided finite difference: s = (loss(theta + eps z) - loss(theta)) / eps.

    Cost: one forward pass per probe, and one at theta for all probes. Bias: O(eps). Losses in float32 and Notes are
    as in `CentralDifference`.

    Law of eps=None: each estimate uses eps = 8 w u^(1/2) (`best_forward_eps`). w and u are as in `CentralDifference`.
    eps / w is 0.0020 in float32, 0.019 in float16 and 0.031 in bfloat16.

    Args:
        eps: finite-difference step, in units of the parameters. None chooses it.
    Raises:
        BadInput: eps is not above 0.
    Source: Spall 1997 (one-sided SPSA).
    """

    eps: float | None = None
    exact = False

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def step(self, objective: Objective) -> float:
        """Return `eps`, or the eps chosen for the current weights if `eps` is None."""
        return best_forward_eps(coarsest(objective), scale_of(objective)) if self.eps is None else self.eps

    def measure(
        self, objective: Objective, batch: Any, key: Key, directions: Directions, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        eps = self.step(objective)
        with with_rules(LOSSES_IN_FLOAT32):
            center = objective.evaluate(batch, key)
        ends = [shifted(objective, batch, key, directions, seed, eps) for seed in seeds]
        rounding_check.warn_if_rounded(
            objective, self, eps, directions, seeds[0], [loss for end in ends for loss in (end, center)]
        )
        center = center.double()
        return center, (torch.stack([end.double() for end in ends]) - center) / eps

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return _compiled_module(objective)


def _check_eps(eps: float | None) -> None:
    if eps is not None and not 0 < eps < math.inf:
        raise BadInput(f"eps is the length of a step along a direction and must be above 0, not {eps!r}.")


def shifted(objective: Objective, batch: Any, key: Key, directions: Directions, seed: int, step: float) -> Tensor:
    """Return loss(theta + step z), in the loss's own dtype."""

    def make(leaf: Leaf) -> Tensor:
        return directions.add(leaf.parameter.detach(), leaf, [seed], [step])

    with substituted(objective, make, LOSSES_IN_FLOAT32):
        return objective.evaluate(batch, key)


@value
class Jvp(Slope):
    """Exact slope s = grad . z by forward-mode differentiation (Jacobian-vector product), without an autograd graph.

    Cost for L linear layers, in matmuls of the size of the forward pass: L per forward pass, plus 2L - 1 per probe.
    With together=1 each probe costs 3L - 1. A frozen weight needs no matmul for a tangent. Along low-rank directions
    (`LowRank`) a linear layer needs two thin matmuls instead of the matmul with its weight's tangent.

    Attention runs on the math kernel, because the fused kernels have no forward-mode rule. A Note reports it once.

    Args:
        together: number of directions that share a forward pass. Their tangents are in memory at once.
    Raises:
        BadInput: together < 1.
        Unsupported: the loss has no tangent. `measure` raises it instead of returning a slope of 0.
    Source: Baydin et al. 2022, section 3.
    """

    together: int = 1
    exact = True

    def __post_init__(self) -> None:
        if self.together < 1:
            raise BadInput(f"together is how many directions share a forward: 1 or more, not {self.together!r}.")

    def measure(
        self, objective: Objective, batch: Any, key: Key, directions: Directions, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        loss, slopes = None, []
        for start in range(0, len(seeds), self.together):
            group = seeds[start : start + self.together]
            loss, group_slopes = forward_mode.differentiate(objective, batch, key, directions, group)
            slopes.append(group_slopes.double())
        assert loss is not None
        return loss.double(), torch.cat(slopes)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        def attempt() -> object:
            return self.measure(objective, batch, Key(0), Rademacher(), range(min(self.together, 2)))

        return _compiled_module(objective) or forward_mode.failure_message(objective.model, attempt)


def _compiled_module(objective: Objective) -> str | None:
    """Return why a compiled module is unsupported (its code does not read substituted weights), or None."""
    for name, module in objective.model.named_modules():
        compiled = type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        if compiled or isinstance(module, torch.jit.ScriptModule):
            return (
                f"`{name or type(module).__name__}` is compiled, and compiled code does not see substituted "
                "weights. Pass the module that was compiled (module._orig_mod), or use backprop()."
            )
    return None
