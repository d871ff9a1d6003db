"""How steep the loss is along a direction: a Jacobian-vector product, or a difference of losses."""

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
from gradcost.slopes.substitution import ruled, substituted


class Slope(ABC):
    """Measures s_k = d/dt loss(theta + t z_k) at t = 0 for each direction of an estimate."""

    exact: ClassVar[bool]  # whether the slope is free of a bias in eps

    @abstractmethod
    def measure(
        self, objective: Objective, batch: Any, key: Key, directions: Directions, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """The loss (a scalar) and the slopes (float64, one a seed). Weights and all else stay as they are."""

    @abstractmethod
    def objection(self, objective: Objective, batch: Any) -> str | None:
        """Why this slope cannot be measured here and what to use instead, or None."""


@value
class CentralDifference(Slope):
    """s = (loss(theta + eps z) - loss(theta - eps z)) / (2 eps). Two forwards a probe; bias O(eps^2).

    Both ends are computed at perturbed weights made out of place, one module at a time, under one dropout
    mask and one set of buffers. The loss that is reported is the mean of all ends: it is off loss(theta) by
    eps^2/2 z'Hz only, and costs nothing. Where the loss has a kink the difference sees the real function.

    eps=None chooses eps at each estimate (`step`): w (3 u)^(1/3), where w is the size of the weights (`scale_of`) and
    u the round-off of a loss computed in their type, or in autocast's where that is coarser (`best_eps`). In units of
    w that is 0.0056 for float32, 0.025 for float16 and 0.036 for bfloat16, more than the distance between neighbours
    of the bulk of the weights; those of a size far above w (LayerNorm's ones) should be float32.

    Losses of torch.nn.functional that are given half precision are computed in float32. A Note says when the
    perturbation rounds away in half-precision weights, and when the loss is too coarse for the difference.

    Source: Spall 1992, equation 2.2. Raises: ValueError when eps is not above 0.
    """

    eps: float | None = None
    exact = False

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def step(self, objective: Objective) -> float:
        """eps, as it is given or as it is chosen at the present weights."""
        return best_eps(coarsest(objective), scale_of(objective)) if self.eps is None else self.eps

    def measure(
        self, objective: Objective, batch: Any, key: Key, directions: Directions, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        eps = self.step(objective)
        ends = [shifted(objective, batch, key, directions, seed, step) for seed in seeds for step in (eps, -eps)]
        rounding_check.look(objective, self, eps, directions, seeds[0], ends)
        losses = torch.stack([end.double() for end in ends])
        return losses.mean(), (losses[::2] - losses[1::2]) / (2 * eps)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return _opaque(objective)


@value
class ForwardDifference(Slope):
    """s = (loss(theta + eps z) - loss(theta)) / eps. One forward a probe and one for all; bias O(eps).

    eps=None chooses eps at each estimate (`step`): 8 w u^(1/2) (`best_forward_eps`), with w and u as in
    `CentralDifference`, and what is said there of the loss and of the Notes holds here. In units of w that is 0.0020
    for float32, 0.019 for float16 and 0.031 for bfloat16.

    Source: Spall 1997 (one-sided SPSA). Raises: ValueError when eps is not above 0.
    """

    eps: float | None = None
    exact = False

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def step(self, objective: Objective) -> float:
        """eps, as it is given or as it is chosen at the present weights."""
        return best_forward_eps(coarsest(objective), scale_of(objective)) if self.eps is None else self.eps

    def measure(
        self, objective: Objective, batch: Any, key: Key, directions: Directions, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        eps = self.step(objective)
        with ruled(LOSSES_IN_FLOAT32):
            here = objective.evaluate(batch, key)
        ends = [shifted(objective, batch, key, directions, seed, eps) for seed in seeds]
        rounding_check.look(objective, self, eps, directions, seeds[0], [one for end in ends for one in (end, here)])
        here = here.double()
        return here, (torch.stack([end.double() for end in ends]) - here) / eps

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return _opaque(objective)


def _check_eps(eps: float | None) -> None:
    if eps is not None and not 0 < eps < math.inf:
        raise BadInput(f"eps is the length of a step along a direction and must be above 0, not {eps!r}.")


def shifted(objective: Objective, batch: Any, key: Key, directions: Directions, seed: int, step: float) -> Tensor:
    """loss(theta + step z), in the loss's own type."""

    def make(leaf: Leaf) -> Tensor:
        return directions.add(leaf.parameter.detach(), leaf, [seed], [step])

    with substituted(objective, make, LOSSES_IN_FLOAT32):
        return objective.evaluate(batch, key)


@value
class Jvp(Slope):
    """s = grad . z, exactly, by forward-mode differentiation beside the evaluation; no graph is kept.

    `together` directions share one forward (their tangents are alive at once): in forward matmuls a probe
    costs 3L - 1 for L linear layers alone, and n of them together 1 per layer and 2 per layer and probe,
    less the first layer's. A frozen weight has no tangent and costs no matmul for one, nor does a linear layer's
    along directions of low rank (`LowRank`), but two thin ones.

    Attention runs on the math kernel meanwhile (the fused ones have no forward rule), and a Note says so.
    A loss that comes out without a tangent is an error, not a slope of 0.

    Source: Baydin et al. 2022, section 3. Raises: ValueError when together < 1.
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
        for at in range(0, len(seeds), self.together):
            loss, some = forward_mode.differentiate(objective, batch, key, directions, seeds[at : at + self.together])
            slopes.append(some.double())
        assert loss is not None
        return loss.double(), torch.cat(slopes)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        def attempt() -> object:
            return self.measure(objective, batch, Key(0), Rademacher(), range(min(self.together, 2)))

        return _opaque(objective) or forward_mode.failure(objective.model, attempt)


def _opaque(objective: Objective) -> str | None:
    """A module whose forward does not look its parameters up, so that they cannot be substituted."""
    for name, module in objective.model.named_modules():
        compiled = type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        if compiled or isinstance(module, torch.jit.ScriptModule):
            return (
                f"`{name or type(module).__name__}` is compiled, and compiled code does not see substituted "
                "weights. Pass the module that was compiled (module._orig_mod), or use backprop()."
            )
    return None
