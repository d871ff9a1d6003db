"""Train with any estimator in Lightning: one line in `__init__`, one in `training_step`.

Automatic and manual optimization. This module imports no Lightning; it uses the Trainer of the module it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gradcost.core.arguments import require_model_and_loss
from gradcost.core.errors import BadInput, Unsupported
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.surrogate import as_written
from gradcost.integrations.micro_batches import FP16, MicroBatches, norm_message, processes_message

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _uncompiled(function: _Function) -> _Function:
    """Return the function, at which torch.compile of a LightningModule stops: an estimate changes state inside."""
    return torch.compiler.disable(function)  # type: ignore[return-value]


class EstimatedLoss:
    """The loss of a LightningModule, with a backward pass that writes an estimate of the gradient.

    - The module, `training_step` excepted, stays: optimizers, schedules, accumulation, logging, checkpoints.
    - The key of a step follows from `seed`, `trainer.global_step` and the micro-batch, so a resumed run continues
      with the same keys.
    - The backward pass holds one whole gradient (`surrogate_loss`).

    Args:
        estimator: how each gradient is obtained, such as `mezo()`.
        model: the module with the trained parameters: a part of the LightningModule, not itself.
        loss: returns the loss of the model on a batch, a scalar. A function, not a method of the LightningModule.
        seed: the seed of all randomness of the estimates.
    Raises:
        BadInput: `loss` is a method of a module: it reaches the Trainer, whose state an evaluation would change.
    """

    def __init__(
        self, estimator: Estimator, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], seed: int = 0
    ) -> None:
        if isinstance(getattr(loss, "__self__", None), nn.Module):
            raise BadInput(
                f"the loss is a method of a {type(loss.__self__).__name__}: "  # type: ignore[attr-defined]
                "give a function loss(model, batch)."
            )
        require_model_and_loss(model, loss)
        self.model = model
        self.estimates = MicroBatches(estimator, loss, seed)
        self._module: Any = None  # the LightningModule whose hooks call this object
        self._checked: Any = None  # the Trainer whose arguments were checked

    @_uncompiled
    def __call__(self, module: Any, batch: Any) -> Tensor:
        """Return the loss of a batch. Return it from `training_step`, or pass it to `manual_backward`.

        Outside training (validation, the sanity check, test) and under `torch.no_grad()`, it is loss(model, batch).

        Args:
            module: the LightningModule.
            batch: any pytree; passed to the loss as it is.
        Returns:
            A scalar tensor, equal to the loss.
        Raises:
            Unsupported: an argument of the Trainer would make training silently wrong: `gradient_clip_val` with an
                estimator that is not exact, `precision="16-mixed"`, or several processes. Also if the estimator
                cannot be used here, or has a state and the run was resumed. If the estimator is not exact,
                `clip_gradients` of the module raises it from now on.
        """
        trainer = module.trainer
        if not (trainer.training and torch.is_grad_enabled()):
            return self.estimates.loss(self.model, batch)
        if self._checked is not trainer:
            refuse(trainer, self.estimates.estimator)
            self._checked = trainer
        if self._module is not module:
            self._attach(module)
        return as_written(self.estimates.estimate(self.model, batch, trainer.global_step))

    def _attach(self, module: Any) -> None:
        """Begin anew whenever a Trainer begins to train the module, and refuse to clip estimates."""
        module.on_train_start = partial(_begin, module.on_train_start, self.estimates)
        if not self.estimates.estimator.exact:
            module.clip_gradients = partial(_clip, module.clip_gradients, self.estimates.estimator)
        self.estimates.begin()
        self._module = module


def _begin(on_train_start: Callable[[], None], estimates: MicroBatches) -> None:
    estimates.begin()
    on_train_start()


def _clip(clip: Callable[..., None], estimator: Estimator, optimizer: Any, *limits: Any, **named: Any) -> None:
    """Clip gradients as Lightning's `clip_gradients`, which automatic optimization also calls without a limit."""
    limit = limits[0] if limits else named.get("gradient_clip_val")
    if limit:
        raise Unsupported(
            norm_message(f"clip_gradients(gradient_clip_val={limit})", "Leave this call out", estimator)
        )
    clip(optimizer, *limits, **named)


def refuse(trainer: Any, estimator: Estimator) -> None:
    """Raise if arguments of a Trainer would make training with this estimator silently wrong.

    Args:
        trainer: a `lightning.Trainer`.
        estimator: the estimator.
    Raises:
        Unsupported: the message names the argument and what to set instead.
    """
    if trainer.gradient_clip_val and not estimator.exact:
        limit = f"gradient_clip_val={trainer.gradient_clip_val}"
        raise Unsupported(norm_message(limit, "Set gradient_clip_val=None", estimator))
    if str(trainer.precision) == "16-mixed":
        raise Unsupported(f'precision="16-mixed" {FP16}')
    if trainer.world_size > 1:
        raise Unsupported(processes_message(trainer.world_size, type(trainer.strategy).__name__))
