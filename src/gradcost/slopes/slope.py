"""Directional derivatives of the loss: a Jacobian-vector product, or a finite difference."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from gradcost.core.batching.loss_weights import with_settled_weights
from gradcost.core.errors import BadInput, GradcostError, Unsupported, first_line
from gradcost.core.evaluation.autograd_use import known_use
from gradcost.core.evaluation.compiled import compiled_message
from gradcost.core.evaluation.first_use import findings
from gradcost.core.evaluation.gradient_mode import in_constant_part, with_known_use
from gradcost.core.fake import repeated
from gradcost.core.interrupts import raise_interrupt
from gradcost.core.key import Key
from gradcost.core.notes import warn_once
from gradcost.core.objective import Leaf, Objective
from gradcost.core.precision import best_forward_eps, central_eps, coarsest, scale_of
from gradcost.core.value import value
from gradcost.directions import Directions, Rademacher, SparseDirections
from gradcost.slopes import forward_mode, rounding_check
from gradcost.slopes.held_constants import HeldConstants, held_constants
from gradcost.slopes.perturbed_products import PerturbedProducts, only_products_read, perturbs_products
from gradcost.slopes.read_check import check_reads, reads_message
from gradcost.slopes.rules import RULES
from gradcost.slopes.substitution import substituted, with_rules

Item = TypeVar("Item")
Result = TypeVar("Result")


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
    - Parts of the loss under `torch.no_grad()` keep their value at theta, as in backprop. If they read activations,
      one more forward pass records what they read. Two exceptions: a loss entirely under `torch.no_grad()` is
      differentiated as usual; `.detach()` of an activation is not held constant, although backprop does so, and a
      Note reports this.
    - Losses of torch.nn.functional convert half-precision inputs to float32.
    - A Note warns if half-precision weights lose the perturbation by rounding, if the two losses are too close, or if
      the rounding of half-precision operations exceeds a tenth of the slopes.

    Law of eps=None: each estimate uses eps = w (3 u)^(1/3) (`best_eps`), times (D/d)^(1/6) if only d of D weights
    train (`central_eps`). w is the typical size of a weight (`scale_of`). u is the relative round-off of the loss
    (`loss_roundoff`) for the weights' dtype, or for autocast's if that is less precise. With all weights trained,
    eps / w is 0.0056 in float32, 0.025 in float16 and 0.036 in bfloat16. Most weights are so small that adding eps
    changes them. A weight far larger than w, such as LayerNorm's ones, may round back to its old value: keep it in
    float32.

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
        return central_eps(objective) if self.eps is None else self.eps

    @with_known_use
    @with_settled_weights
    def measure(
        self, objective: Objective, batch: Any, key: Key, directions: Directions, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        check_reads(objective, batch, key)
        eps = self.step(objective)
        held = held_constants(objective, batch, key)

        def both(seed: int) -> list[Tensor]:
            return [shifted(objective, batch, key, directions, seed, step, held) for step in (eps, -eps)]

        ends = [end for pair in along_each(both, directions, seeds) for end in pair]
        loss_at = partial(shifted, objective, batch, key, directions, seeds[0], held=held)
        rounding_check.warn_if_rounded(objective, self, eps, directions, seeds[0], ends, loss_at)
        losses = torch.stack([end.double() for end in ends])
        return losses.mean(), (losses[::2] - losses[1::2]) / (2 * eps)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return reads_message(objective, batch)


@value
class ForwardDifference(Slope):
    """One-sided finite difference: s = (loss(theta + eps z) - loss(theta)) / eps.

    Cost: one forward pass per probe, and one at theta for all probes. Bias: O(eps). Constants, losses in float32 and
    Notes are as in `CentralDifference`.

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

    @with_known_use
    @with_settled_weights
    def measure(
        self, objective: Objective, batch: Any, key: Key, directions: Directions, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        check_reads(objective, batch, key)
        eps = self.step(objective)
        center = _center(objective, batch, key)
        held = held_constants(objective, batch, key)

        def end(seed: int) -> Tensor:
            return shifted(objective, batch, key, directions, seed, eps, held)

        ends = along_each(end, directions, seeds)
        pairs = [loss for end in ends for loss in (end, center)]
        loss_at = partial(shifted, objective, batch, key, directions, seeds[0], held=held)
        rounding_check.warn_if_rounded(objective, self, eps, directions, seeds[0], pairs, loss_at)
        center = center.double()
        return center, (torch.stack([end.double() for end in ends]) - center) / eps

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return reads_message(objective, batch)


def along_each(run: Callable[[Item], Result], directions: Directions, items: Sequence[Item]) -> list[Result]:
    """Return [run(item) for item in items]: `repeated`, if the directions have the same cost."""
    return list(map(run, items)) if isinstance(directions, SparseDirections) else repeated(run, items)


def _check_eps(eps: float | None) -> None:
    if eps is not None and not 0 < eps < math.inf:
        raise BadInput(f"eps is the length of a step along a direction and must be above 0, not {eps!r}.")


def shifted(
    objective: Objective,
    batch: Any,
    key: Key,
    directions: Directions,
    seed: int,
    step: float,
    held: HeldConstants | None = None,
) -> Tensor:
    """Return loss(theta + step z), in the loss's own dtype.

    held: inputs at theta of the loss's constant parts (`held_constants`); None: nothing is held.
    """
    use = known_use(objective)
    has_constants = use is not None and use.has_constants

    def make(leaf: Leaf) -> Tensor:
        if has_constants and in_constant_part():
            return leaf.parameter.detach()
        return directions.add(leaf.parameter.detach(), leaf, [seed], [step])

    skip_swap, of_leaves = None, None
    if perturbs_products(objective, directions):
        skip_swap, of_leaves = only_products_read, PerturbedProducts(objective, directions, seed, step).rules()
    with substituted(objective, make, RULES, skip_swap, of_leaves):
        if held is None:
            return objective.evaluate(batch, key)
        with held.applied():
            return objective.evaluate(batch, key)


def _center(objective: Objective, batch: Any, key: Key) -> Tensor:
    """Return loss(theta), computed as `shifted` does."""
    use = known_use(objective)
    # The shifted weights require no gradient, so torch may choose other kernels for them. Substitute here too, so
    # that both losses come from the same kernels.
    if use is not None and use.needs_gradients:
        with substituted(objective, lambda leaf: leaf.parameter.detach(), RULES):
            return objective.evaluate(batch, key)
    with with_rules(RULES):
        return objective.evaluate(batch, key)


@value
class Jvp(Slope):
    """Exact slope s = grad . z by forward-mode differentiation (Jacobian-vector product), without an autograd graph.

    Cost for L linear layers, in matmuls of the size of the forward pass: L per forward pass, plus 2L - 1 per probe.
    With together=1 each probe costs 3L - 1. A frozen weight needs no matmul for its tangent. Along low-rank
    directions (`LowRank`) a linear layer needs two thin matmuls instead of the matmul with its weight's tangent.

    Attention runs in blocks of queries, in memory linear in the length (`slopes.attention`); with dropout and under
    autocast on the math kernel, which a Note reports once.

    What the loss computes under `torch.no_grad()` is a constant, as for backprop. Some losses take one direction per
    forward pass, whatever `together` is: those that compute derivatives, have custom autograd functions, or use
    operations that `torch.func.vmap` does not serve. A Note names such an operation.

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
        try:
            return self._measure(objective, batch, key, directions, seeds)
        except NotImplementedError as error:  # an operator without a forward-mode rule
            raise Unsupported(self.objection(objective, batch) or str(error)) from error

    @with_known_use
    @with_settled_weights
    def _measure(
        self, objective: Objective, batch: Any, key: Key, directions: Directions, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        check_reads(objective, batch, key)
        loss: Tensor | None = None

        def along(group: Sequence[int]) -> Tensor:
            nonlocal loss
            loss, slopes = _differentiate(objective, batch, key, directions, group)
            return slopes.double()

        whole = len(seeds) // self.together
        groups = [seeds[self.together * k : self.together * (k + 1)] for k in range(whole)]
        slopes = along_each(along, directions, groups) if groups else []
        if rest := seeds[self.together * whole :]:
            slopes.append(along(rest))
        assert loss is not None
        return loss.double(), torch.cat(slopes)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        def attempt() -> object:
            return self._measure(objective, batch, Key(0), Rademacher(), range(min(self.together, 2)))

        return compiled_message(objective) or forward_mode.failure_message(objective.model, attempt)


def _differentiate(
    objective: Objective, batch: Any, key: Key, directions: Directions, seeds: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the loss and slopes in one forward pass; in one per direction if `torch.func.vmap` refuses the loss."""
    found, purpose = findings(objective.model, objective.loss), ("directions one by one", objective.model.training)
    if len(seeds) == 1 or purpose not in found:
        try:
            return forward_mode.differentiate(objective, batch, key, directions, seeds)
        except (GradcostError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, NotImplementedError, ValueError) as error:
            raise_interrupt(error)
            if len(seeds) == 1:
                raise
            reason = first_line(error)
    else:
        reason = None
    results = [forward_mode.differentiate(objective, batch, key, directions, [seed]) for seed in seeds]
    if reason is not None:
        found[purpose] = True
        warn_once(objective.model, purpose[0], f"directions do not share a forward pass here: {reason}.")
    return results[-1][0], torch.cat([slope for _, slope in results])
