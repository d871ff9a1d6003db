"""One training step after another, with what is kept between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.pytree import tensors
from gradcost.estimators.estimator import Estimate, Estimator, State
from gradcost.training.optimizers import Leafwise, Optimizer


class TrainState:
    """An objective in training: the optimizer's state and the estimator's.

    Without an optimizer a step is an estimate whose gradient is dropped leaf by leaf, and no weight moves.
    """

    def __init__(self, objective: Objective, estimator: Estimator, optimizer: Optimizer | None) -> None:
        self.objective, self.estimator = objective, estimator
        self.leafwise = None if optimizer is None else Leafwise(optimizer, objective)
        self.state: State | None = estimator.init(objective)
        self.taken = 0  # steps

    def step(self, batch: Any, key: Key) -> Estimate:
        """Each leaf's gradient is used and dropped before the next. Where a layer keeps running statistics
        (BatchNorm in training) they advance by one forward first: an estimate moves none."""
        if self.objective.has_running_statistics():
            self.objective.advance(batch, key)
        use = _drop if self.leafwise is None else self.leafwise.use
        found = self.estimator.stream(self.objective, batch, key, use, self.state)
        self.state = found.state
        if self.leafwise is not None:
            self.leafwise.advance()
        self.taken += 1
        return found

    def state_dict(self) -> dict[str, Any]:
        """What is kept between steps, beside the weights: a tree of tensors and numbers."""
        optimizer = None if self.leafwise is None else self.leafwise.state_dict()
        return {"taken": self.taken, "optimizer": optimizer, "estimator": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave for the same objective, estimator and optimizer."""
        self.taken, self.state = state["taken"], state["estimator"]
        if self.leafwise is not None:
            self.leafwise.load_state_dict(state["optimizer"])

    def kept(self) -> Iterator[Tensor]:
        """The tensors that stay between steps, beside the weights."""
        optimizers = [] if self.leafwise is None else [part.state_dict() for part in self.leafwise.parts.values()]
        yield from tensors((self.state, optimizers))


def _drop(name: str, gradient: Tensor) -> None:
    pass
