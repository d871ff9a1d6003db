"""Training steps, and the state between them."""

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
    """An objective in training, with the state of its optimizer and estimator.

    Args:
        objective: the model and loss to train. Steps change its parameters in place.
        estimator: how each gradient is obtained.
        optimizer: how parameters move. None: a step estimates the gradient, discards it leaf by leaf and changes no
            parameter.
    """

    def __init__(self, objective: Objective, estimator: Estimator, optimizer: Optimizer | None) -> None:
        self.objective, self.estimator = objective, estimator
        self.leafwise = None if optimizer is None else Leafwise(optimizer, objective)
        self.state: State | None = estimator.init(objective)
        self.taken = 0  # number of steps taken

    def step(self, batch: Any, key: Key) -> Estimate:
        """Take one step: estimate the gradient and move each parameter.

        Each parameter's gradient is used and dropped before the next one is made. Running statistics (BatchNorm in
        training) advance by one forward pass first, because an estimate changes none.

        Args:
            batch: any pytree; passed to the loss as it is.
            key: the source of this step's randomness.
        Returns:
            The estimate, with its gradient as `Streamed`.
        """
        if self.objective.has_running_statistics():
            self.objective.advance(batch, key)
        use = _drop if self.leafwise is None else self.leafwise.use
        estimate = self.estimator.stream(self.objective, batch, key, use, self.state)
        self.state = estimate.state
        if self.leafwise is not None:
            self.leafwise.advance()
        self.taken += 1
        return estimate

    def state_dict(self) -> dict[str, Any]:
        """Return the state between steps, without the weights: a tree of tensors and numbers."""
        optimizer = None if self.leafwise is None else self.leafwise.state_dict()
        return {"taken": self.taken, "optimizer": optimizer, "estimator": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned for the same objective, estimator and optimizer.

        Args:
            state: the tree that `state_dict` returned.
        """
        self.taken, self.state = state["taken"], state["estimator"]
        if self.leafwise is not None:
            self.leafwise.load_state_dict(state["optimizer"])

    def held_tensors(self) -> Iterator[Tensor]:
        """Yield the tensors of the optimizer's and the estimator's state, which occupy memory between steps."""
        optimizers = [] if self.leafwise is None else [part.state_dict() for part in self.leafwise.parts.values()]
        yield from tensors((self.state, optimizers))


def _drop(name: str, gradient: Tensor) -> None:
    pass
