"""Take training steps, and save and restore the state between them."""

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
    """An objective in training, with its optimizer, its estimator and the state of both.

    Args:
        objective: the model and loss to train. Steps change its parameters in place.
        estimator: how each gradient is obtained.
        optimizer: how parameters move. None: each step estimates the gradient and discards it, and no parameter
            changes.
    """

    def __init__(self, objective: Objective, estimator: Estimator, optimizer: Optimizer | None) -> None:
        self.objective, self.estimator = objective, estimator
        self.leafwise = None if optimizer is None else Leafwise(optimizer, objective)
        self.state: State | None = estimator.init(objective)
        self.taken = 0  # steps so far

    def step(self, batch: Any, key: Key) -> Estimate:
        """Take one step: estimate the gradient and move each parameter.

        Each parameter moves and its gradient is freed before the next parameter's gradient is computed. Estimators
        leave running statistics (BatchNorm in training mode) unchanged, so one extra forward pass updates them first.

        Args:
            batch: any pytree; passed to the loss as it is.
            key: the source of this step's randomness.
        Returns:
            The estimate. Its gradient is a `Streamed`, without values, because the parameters have already moved.
        """
        if self.objective.has_running_statistics():
            self.objective.advance(batch, key)
        use = _discard if self.leafwise is None else self.leafwise.use
        estimate = self.estimator.stream(self.objective, batch, key, use, self.state)
        self.state = estimate.state
        if self.leafwise is not None:
            self.leafwise.advance()
        self.taken += 1
        return estimate

    def state_dict(self) -> dict[str, Any]:
        """Return the step count and the states of optimizer and estimator, as a tree of tensors and numbers."""
        optimizer = None if self.leafwise is None else self.leafwise.state_dict()
        return {"taken": self.taken, "optimizer": optimizer, "estimator": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned for the same objective, estimator and optimizer.

        Args:
            state: the tree from `state_dict`.
        """
        self.taken, self.state = state["taken"], state["estimator"]
        if self.leafwise is not None:
            self.leafwise.load_state_dict(state["optimizer"])

    def held_tensors(self) -> Iterator[Tensor]:
        """Yield the tensors that occupy memory between steps: the states of the optimizer and the estimator."""
        optimizers = [] if self.leafwise is None else [part.state_dict() for part in self.leafwise.parts.values()]
        yield from tensors((self.state, optimizers))


def _discard(name: str, gradient: Tensor) -> None:
    pass
