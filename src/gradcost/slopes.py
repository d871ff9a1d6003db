"""How steep the loss is along a direction: a Jacobian-vector product, or a difference of losses."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradcost import dual
from gradcost.directions import Directions, Rademacher
from gradcost.key import Key
from gradcost.objective import Leaf, Objective
from gradcost.substitute import substituted
from gradcost.value import value


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

    Source: Spall 1992, equation 2.2. Raises: ValueError when eps is not above 0.
    """

    eps: float = 1e-3
    exact = False

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def measure(
        self, objective: Objective, batch: Any, key: Key, directions: Directions, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        ends = [
            [_shifted(objective, batch, key, directions, seed, step) for step in (self.eps, -self.eps)]
            for seed in seeds
        ]
        slopes = torch.stack([(plus - minus) / (2 * self.eps) for plus, minus in ends])
        return torch.stack([end for pair in ends for end in pair]).mean(), slopes

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return _opaque(objective)


@value
class ForwardDifference(Slope):
    """s = (loss(theta + eps z) - loss(theta)) / eps. One forward a probe and one for all; bias O(eps).

    Source: Spall 1997 (one-sided SPSA). Raises: ValueError when eps is not above 0.
    """

    eps: float = 1e-3
    exact = False

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def measure(
        self, objective: Objective, batch: Any, key: Key, directions: Directions, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        here = objective.evaluate(batch, key).double()
        ends = [_shifted(objective, batch, key, directions, seed, self.eps) for seed in seeds]
        return here, (torch.stack(ends) - here) / self.eps

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return _opaque(objective)


def _check_eps(eps: float) -> None:
    if not 0 < eps < math.inf:
        raise ValueError(f"eps is the length of a step along a direction and must be above 0, not {eps!r}.")


def _shifted(objective: Objective, batch: Any, key: Key, directions: Directions, seed: int, step: float) -> Tensor:
    """loss(theta + step z) in float64."""

    def make(leaf: Leaf) -> Tensor:
        return directions.add(leaf.parameter.detach(), leaf, [seed], [step])

    with substituted(objective, make):
        return objective.evaluate(batch, key).double()


@value
class Jvp(Slope):
    """s = grad . z, exactly, by forward-mode differentiation beside the evaluation; no graph is kept.

    `together` directions share one forward (their tangents are alive at once): in forward matmuls a probe
    costs 3L - 1 for L linear layers alone, and n of them together 1 per layer and 2 per layer and probe,
    less the first layer's. A frozen weight has no tangent and costs no matmul for one.

    Attention runs on the math kernel meanwhile (the fused ones have no forward rule), and a Note says so.
    A loss that comes out without a tangent is an error, not a slope of 0.

    Source: Baydin et al. 2022, section 3. Raises: ValueError when together < 1.
    """

    together: int = 1
    exact = True

    def __post_init__(self) -> None:
        if self.together < 1:
            raise ValueError(f"together is how many directions share a forward: 1 or more, not {self.together!r}.")

    def measure(
        self, objective: Objective, batch: Any, key: Key, directions: Directions, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        loss, slopes = None, []
        for at in range(0, len(seeds), self.together):
            loss, some = dual.differentiate(objective, batch, key, directions, seeds[at : at + self.together])
            slopes.append(some.double())
        assert loss is not None
        return loss.double(), torch.cat(slopes)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        def attempt() -> object:
            return self.measure(objective, batch, Key(0), Rademacher(), range(min(self.together, 2)))

        return _opaque(objective) or dual.failure(objective.model, attempt)


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
