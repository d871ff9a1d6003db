"""Take training steps, and save and restore the state between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gradcost.core.errors import Unsupported
from gradcost.core.evaluation.next_state import NextState, moving, next_state
from gradcost.core.evaluation.one_at_a_time import one_at_a_time
from gradcost.core.finite import NotFinite
from gradcost.core.key import Key
from gradcost.core.notes import warn_once
from gradcost.core.objective import Objective
from gradcost.core.pytree import tensors
from gradcost.estimators.estimator import Estimate, Estimator, State
from gradcost.estimators.gradient import Streamed
from gradcost.estimators.probing import replayed
from gradcost.estimators.structure import micro_batches
from gradcost.training.leafwise import Leafwise
from gradcost.training.optimizers import Optimizer
from gradcost.training.step_log import LogWriter


class TrainState:
    """An objective in training, with its optimizer, its estimator and the state of both.

    Args:
        objective: the model and loss to train. Steps change its parameters in place.
        estimator: how each gradient is obtained.
        optimizer: how parameters move. None: each step estimates the gradient and discards it, and no parameter
            changes.
        parts: further parts of the training that must be equal when it resumes, such as its key.
    """

    def __init__(self, objective: Objective, estimator: Estimator, optimizer: Optimizer | None, **parts: Any) -> None:
        self.objective, self.estimator = objective, estimator
        # Reprs of what a resumed training must share; an object whose repr contains its address is left out.
        parts = {"estimator": estimator, "optimizer": optimizer, **parts}
        self.training = {name: repr(part) for name, part in parts.items() if " at 0x" not in repr(part)}
        self.leafwise = None if optimizer is None else Leafwise(optimizer, objective)
        self.state: State | None = estimator.init(objective)
        self._in_parts = objective.in_micro_batches(micro_batches(estimator))
        self.taken = 0  # steps so far
        self.log: LogWriter | None = None
        # A hash of each frozen parameter at the start (`checkpoint.frozen`): training checkpoints omit these values.
        self.frozen: dict[str, str] | None = None

    @one_at_a_time
    def step(self, batch: Any, key: Key) -> Estimate:
        """Take one step: estimate the gradient and move each parameter.

        - Each parameter moves and its gradient is freed before the next parameter's gradient is computed.
        - An estimate changes no buffer. If a forward pass of the model changes buffers or attributes, one extra
          forward pass at the weights before the step computes them. The first step detects whether it does,
          with one or two further forward passes on the first micro-batch.
        - If the loss or a slope is not finite, nothing changes but the number of steps, and a `Note` is issued.

        Args:
            batch: any pytree; passed to the loss as it is.
            key: the source of this step's randomness.
        Returns:
            The estimate. Its gradient is a `Streamed`, without values, because the parameters have already moved.
        """
        after = self._next_state(batch, key)
        use = _discard if self.leafwise is None else self.leafwise
        try:
            if self.log is not None:
                estimate = self._logged(batch, key, self.log, after)
            else:
                estimate = self.estimator.stream(self.objective, batch, key, use, self.state)
        except NotFinite as error:
            estimate = Estimate(skipped(self.objective, error), Streamed(self.objective, 0), state=self.state)
            if self.log is not None and self.leafwise is not None:
                self.log.append(self.taken, self.leafwise.present_rate, None)
        else:
            self.state = estimate.state
            if after is not None:
                after.install()
        if self.leafwise is not None:
            self.leafwise.advance()
        self.taken += 1
        if self.log is not None:
            self.log.moved(self.taken)
        return estimate

    def _logged(self, batch: Any, key: Key, log: LogWriter, after: NextState | None) -> Estimate:
        """Estimate, write the step to the log, then move the parameters."""
        assert self.leafwise is not None
        if after is not None:
            raise Unsupported(
                "a step log contains no buffers, and a forward pass of this model changes some (BatchNorm, moving "
                "averages). Use eval mode for these modules, or `resume` without a log."
            )
        estimate = self.estimator.estimate(self.objective, batch, key, self.state)
        log.append(self.taken, self.leafwise.present_rate, estimate.gradient)
        return replayed(estimate, self.leafwise)

    def _next_state(self, batch: Any, key: Key) -> NextState | None:
        """Return the buffers and attributes after this step; None if a forward pass changes none."""
        known = moving(self._in_parts, batch, key)
        return next_state(self.objective, batch, key, known) if known else None

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


def skipped(objective: Objective, error: NotFinite) -> Tensor:
    """Issue a Note that a batch gives no gradient, once per model, and return the number that is not finite.

    Args:
        objective: the objective in training.
        error: what the estimate of the batch raised.
    Returns:
        A scalar tensor on the device of the parameters.
    """
    name = not_finite(objective)
    cause = "" if name is None else f" `{name}` is not finite: an earlier step had a gradient that is not finite."
    warn_once(objective.model, "not finite", f"a step was skipped: {error}{cause}")
    return torch.tensor(error.number, device=objective.leaves[0].parameter.device)


def not_finite(objective: Objective) -> str | None:
    """Return the name of a parameter with a value that is not finite; None if there is none."""
    leaves = objective.leaves
    return next((leaf.name for leaf in leaves if not bool(leaf.parameter.isfinite().all())), None)


def _discard(name: str, gradient: Tensor) -> None:
    pass
