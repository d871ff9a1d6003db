"""The estimates of a training loop of another package: a key for each micro-batch, and the estimator's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.finite import NotFinite
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import Gaussian
from gradcost.estimators.backward import deferred_hooks
from gradcost.estimators.estimator import Estimate, Estimator, require_estimator
from gradcost.estimators.gradient import Seeded
from gradcost.training.train_state import skipped


class MicroBatches:
    """Estimate micro-batch after micro-batch of a training.

    Law: the key of micro-batch m of step t is `Key(seed).fold("step", t).fold("micro-batch", m)`. So a resumed run
    continues with the same keys.

    Args:
        estimator: how each gradient is obtained.
        loss: returns the loss of the model on a batch, a scalar.
        seed: the seed of the keys.
    """

    def __init__(self, estimator: Estimator, loss: Callable[[nn.Module, Any], Tensor], seed: int) -> None:
        require_estimator(estimator)
        self.estimator, self.loss, self.seed = estimator, loss, seed
        self.begin()

    def begin(self) -> None:
        """Forget the state, the objective and the micro-batch: another training begins."""
        self.state: Any = None
        self.objective: Objective | None = None
        self.place = (-1, 0)  # the step and the micro-batch of the last estimate

    def estimate(self, model: nn.Module, batch: Any, step: int) -> Estimate:
        """Estimate the gradient of the next micro-batch, and advance the model's state.

        The objective is made at the first micro-batch. It is made again when parameters were frozen or unfrozen, or
        modules replaced, since.

        Args:
            model: the model in training.
            batch: any pytree.
            step: the number of optimizer steps before this micro-batch.
        Returns:
            The estimate, for `surrogate.as_written`. If the loss or a slope is not finite, a `Note` is issued, the
            gradient is 0 (a Seeded without probes), and nothing else changes.
        Raises:
            Unsupported: the estimator cannot be used here, or it has a state and the run was resumed or the
                trainable parameters have changed.
        """
        self.place = (step, self.place[1] + 1 if self.place[0] == step else 0)
        key = Key(self.seed).fold("step", step).fold("micro-batch", self.place[1])
        objective = self._objective(model, batch, step)
        try:
            with deferred_hooks():
                estimate = self.estimator.estimate(objective, batch, key, self.state)
        except NotFinite as error:
            return Estimate(skipped(objective, error), Seeded(objective, Gaussian(), (), ()), state=self.state)
        self.state = estimate.state
        objective.advance(batch, key)
        return estimate

    def _objective(self, model: nn.Module, batch: Any, step: int) -> Objective:
        present = self.objective
        change = None if present is None else _change(present, model)
        if present is not None and change is None:
            return present
        if self.state is not None:
            raise Unsupported(
                f"{change} The state of {self.estimator} belongs to the earlier trainable parameters. Freeze and "
                "unfreeze before the training begins, or take an estimator without a state, such as mezo()."
            )
        objective = Objective(model, self.loss)
        if (objection := self.estimator.objection(objective, batch)) is not None:
            raise Unsupported(objection)
        if present is None and step > 0 and self.estimator.init(objective) is not None:
            raise Unsupported(
                f"{self.estimator} has a state, which the checkpoints of this trainer do not contain: a resumed run "
                "would differ. Train without resuming, or with gradcost.train(resume=...)."
            )
        self.objective = objective
        return objective


def _change(objective: Objective, model: nn.Module) -> str | None:
    """Return what has changed in the model since the objective was made, a sentence; None if nothing has."""
    if objective.model is not model:
        return "The trainer has replaced the model during the training."
    try:
        objective.structure.check(objective.leaves)
    except BadInput as error:
        return f"{str(error).split(' after the Objective was made')[0]} during the training."
    return None


def norm_message(limit: str, instead: str, estimator: Estimator) -> str:
    """Return why a limit on the norm of the estimate, or on its elements, is refused.

    Args:
        limit: the argument that sets the limit, with its value.
        instead: what to do instead, as an imperative.
        estimator: the estimator.
    """
    return (
        f"{limit} would shorten almost every estimate of {estimator}: with d parameters and n probes it "
        f"is about sqrt(d/n) times as long as the gradient. {instead}. To limit slopes, use "
        "gradcost.Clipped(estimator, slope)."
    )


FP16 = (
    "scales the loss after the estimate, so the estimator's own passes in float16 are not protected from underflow. "
    "Use bfloat16, or no mixed precision."
)


def processes_message(count: int, kind: str) -> str:
    """Return why several processes are refused.

    Args:
        count: the number of processes.
        kind: the strategy or type of distribution.
    """
    return (
        f"the trainer runs {count} processes or GPUs ({kind}), and their estimates would not be averaged. Run one "
        "process, or use gradcost.train with an estimator of gradcost.training.distributed."
    )
