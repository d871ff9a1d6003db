"""What every way of getting a gradient offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.estimators.gradient import Gradient

State = Any
LeafConsumer = Callable[[str, Tensor], None]


@dataclass(frozen=True, eq=False)
class Estimate:
    """What an estimator found at the present weights.

    loss: a scalar tensor. gradient: `Streamed` when it was handed out leaf by leaf. slopes: float64, one a probe,
    as measured (before any clip); None for backprop. state: what a stateful estimator wants back at its next
    call. clipped: the share of slopes that a clip cut, in [0, 1].
    """

    loss: Tensor
    gradient: Gradient
    slopes: Tensor | None = None
    state: State | None = None
    clipped: float | None = None


class Estimator(ABC):
    """A way of getting a gradient: an immutable value, the same for every objective.

    Laws: the same key gives the same estimate, bit for bit; nothing of the model is disturbed.
    """

    @abstractmethod
    def init(self, objective: Objective) -> State | None:
        """What `estimate` wants as its first state; None for an estimator that remembers nothing."""

    @abstractmethod
    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        """The loss and the gradient at the present weights, with randomness from the key alone."""

    @abstractmethod
    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        """As `estimate`, but each leaf's gradient goes to `use(name, gradient)` as soon as it is known and is
        dropped after, so that all of them never exist at once. `use` may change that leaf's parameter."""

    @abstractmethod
    def objection(self, objective: Objective, batch: Any) -> str | None:
        """Why it cannot serve here, in a sentence, and what to use instead; None when it can."""
