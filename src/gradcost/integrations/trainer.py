"""Train with any estimator in the `Trainer` of transformers: one changed line, through its hook `training_step`.

This module needs the extra `gradcost[transformers]`. Tested with the `Trainer` of transformers 5.23.
"""

from __future__ import annotations

import copy
import weakref
from collections import UserDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from gradcost.core.errors import BadInput, Unsupported
from gradcost.estimators.estimator import Estimator, require_estimator
from gradcost.estimators.surrogate import as_written
from gradcost.integrations.micro_batches import FP16, MicroBatches, norm_message, processes_message
from gradcost.training.seeded_sgd import SeededSGD

TrainerClass = TypeVar("TrainerClass", bound=type)


def with_estimator(trainer: TrainerClass, estimator: Estimator) -> TrainerClass:
    """Return a subclass of a `Trainer` class whose training steps use an estimator instead of `loss.backward()`.

    - The loss is `Trainer.compute_loss`, with label smoothing, `compute_loss_func` and `num_items_in_batch`.
    - The optimizer, schedule, accumulation, logging, evaluation and checkpoints are those of the Trainer.
    - The key of a step follows from `args.seed`, the number of the step and the micro-batch. A resumed run continues
      with the same keys.
    - With `optimizers=(SeededSGD(model.parameters(), lr), None)` no dense gradient is held. Otherwise the estimate is
      written into `.grad`, which takes the memory of one gradient (two with accumulation).
    - With an exact estimator, a parameter that no batch of the step uses has no `.grad`, so the optimizer skips it.
    - `grad_norm` in the Trainer's log is the norm of `.grad`, so with SeededSGD it is 0.
    - `total_flos` is 0, because the Trainer's formula assumes backpropagation.

    Args:
        trainer: `transformers.Trainer` or a subclass. A `training_step` of the subclass stays; it must call
            `super().training_step(...)`, which makes the estimate.
        estimator: how each gradient is obtained, such as `mezo()`.
    Returns:
        The subclass. Its constructor raises Unsupported for arguments with which training would silently be wrong:

        - `max_grad_norm` above 0, unless the estimator is exact. The estimate of one probe is about sqrt(d) times as
          long as the gradient of d parameters, so the default 1.0 would shorten every step to norm 1. Set 0, or
          clip slopes with `Clipped`;
        - `fp16`: the loss scaler would not reach the estimator's own passes. Set `bf16`;
        - `activation_checkpointing` (`gradient_checkpointing` before 5.23), unless the estimator is exact;
        - several processes or GPUs, DeepSpeed and FSDP: the estimates of the processes would not be averaged.

        A step raises it if a `training_step` of the class does not call that of the Trainer.
    Raises:
        BadInput: `trainer` is not a Trainer class, or `estimator` is no estimator.
    Source: the hook `training_step` of transformers' Trainer, "Subclass and override to inject custom behavior".
    """

    require_estimator(estimator)
    base: Any = _first_trainer(trainer)

    class Estimated(base):  # type: ignore[misc, valid-type]
        def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            return self._steps.step(model, inputs, num_items_in_batch)

    # Between the Trainer and its subclasses, whose `super().training_step(...)` makes the estimate.
    bases: Any = (Estimated,) if trainer is base else (trainer, Estimated)
    is_own = trainer.training_step is not base.training_step
    step = trainer.training_step if is_own else Estimated.training_step

    class Estimating(*bases):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            refuse(self, estimator)
            self._steps = _Steps(self, estimator)

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            before = self._steps.count
            loss = step(self, *args, **kwargs)
            if self._steps.count == before:
                raise Unsupported(
                    f"{trainer.__name__}.training_step does not call super().training_step(...), which makes the "
                    "estimate: call it there, and change the loss in compute_loss."
                )
            return loss

        def floating_point_ops(self, inputs: Any) -> int:
            return 0

    Estimating.__name__ = Estimating.__qualname__ = f"{trainer.__name__}WithEstimator"
    return Estimating  # type: ignore[return-value]


def _first_trainer(trainer: Any) -> type:
    """Return the class that first defined `training_step`: the Trainer of transformers."""
    defined = [kind for kind in getattr(trainer, "__mro__", ()) if "training_step" in vars(kind)]
    if not defined:
        given = trainer.__name__ if isinstance(trainer, type) else f"an object of type {type(trainer).__name__}"
        raise BadInput(
            f"with_estimator takes a Trainer class, such as transformers.Trainer, not {given}. It returns a class: "
            "with_estimator(Trainer, mezo())(model=..., args=...)."
        )
    return defined[-1]


def refuse(trainer: Any, estimator: Estimator) -> None:
    """Raise if arguments of a Trainer would make training with this estimator silently wrong.

    Args:
        trainer: a `transformers.Trainer`.
        estimator: the estimator.
    Raises:
        Unsupported: the message names the argument and what to set instead.
    """
    args = trainer.args
    if args.max_grad_norm and not estimator.exact:
        raise Unsupported(norm_message(f"max_grad_norm={args.max_grad_norm}", "Set max_grad_norm=0", estimator))
    if args.fp16:
        raise Unsupported(f"fp16=True {FP16}")
    checkpointed = [name for name in _CHECKPOINTING if getattr(args, name, None)]
    if checkpointed and not estimator.exact:
        raise Unsupported(
            f"{checkpointed[0]}=True saves memory in a backward pass of the whole model, which {estimator} "
            "does not run. Leave it out."
        )
    if getattr(args, "activation_offloading", False):
        raise Unsupported(
            "activation_offloading=True moves what a backward pass saves, around the whole estimate. Leave it out."
        )
    kind = str(getattr(trainer.accelerator.distributed_type, "value", trainer.accelerator.distributed_type))
    if trainer.accelerator.num_processes > 1 or args.n_gpu > 1 or kind not in ("NO", "no"):
        raise Unsupported(processes_message(max(trainer.accelerator.num_processes, args.n_gpu), kind))


_RECORDED = ("_metrics", "_stored_metrics", "_total_train_tokens")  # of TRL's trainers
_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # the name since 5.23, and before


class _Steps:
    """The training steps of one Trainer."""

    def __init__(self, trainer: Any, estimator: Estimator) -> None:
        self.trainer = trainer
        self.estimates = MicroBatches(estimator, _Loss(trainer), trainer.args.seed)
        self.count = 0  # of micro-batches
        self.training: Any = None  # the TrainerState; each training makes or loads another one

    def step(self, model: nn.Module, inputs: Any, items: Any) -> Tensor:
        trainer = self.trainer
        self.count += 1
        model.train()
        if callable(getattr(trainer.optimizer, "train", None)):
            trainer.optimizer.train()
        prepared = trainer._prepare_inputs(inputs)
        is_mapping = isinstance(prepared, Mapping)
        kind = type(prepared) if isinstance(prepared, UserDict) else dict if is_mapping else None  # BatchEncoding
        batch = {"inputs": dict(prepared) if is_mapping else prepared, "kind": kind, "num_items_in_batch": items}
        if self.training is not trainer.state:
            self.training = trainer.state
            self.estimates.begin()
        with _metrics_of_one_evaluation(trainer):
            estimate = self.estimates.estimate(model, batch, trainer.state.global_step)
        parts = 1 if self._is_scaled(items) else trainer.current_gradient_accumulation_steps
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        if isinstance(optimizer, SeededSGD):
            optimizer.add(estimate, 1 / parts)
        else:
            (as_written(estimate) / parts).backward()
        return estimate.loss.detach() / parts

    def _is_scaled(self, items: Any) -> bool:
        """Return whether the loss is already divided by what all micro-batches of the step contain."""
        trainer = self.trainer
        explicit = getattr(trainer, "loss_is_scaled_for_ga", None)
        if explicit is not None:
            return explicit
        return (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None


class _Loss:
    """`Trainer.compute_loss` as the loss of an objective. The weak reference hides the Trainer's other objects."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = weakref.ref(trainer)

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        trainer = self.trainer()
        assert trainer is not None
        kind, inputs = batch["kind"], batch["inputs"]
        with trainer.compute_loss_context_manager():
            inputs = inputs if kind is None else kind(inputs)
            return trainer.compute_loss(model, inputs, num_items_in_batch=batch["num_items_in_batch"])


@contextmanager
def _metrics_of_one_evaluation(trainer: Any) -> Iterator[None]:
    """Keep what compute_loss logs, and what TRL's records, such as token counts, of one evaluation per step."""
    names = [name for name in _RECORDED if hasattr(trainer, name)]
    compute_loss, log = trainer.compute_loss, trainer.log
    first: dict[str, Any] = {}
    has_first = False

    def recording(*args: Any, **kwargs: Any) -> Any:
        nonlocal has_first
        result = compute_loss(*args, **kwargs)
        if not has_first:
            first.update({name: copy.deepcopy(getattr(trainer, name)) for name in names})
        has_first = True
        return result

    def log_once(*args: Any, **kwargs: Any) -> None:
        if not has_first:
            log(*args, **kwargs)

    present = {name: vars(trainer)[name] for name in ("compute_loss", "log") if name in vars(trainer)}
    trainer.compute_loss, trainer.log = recording, log_once
    try:
        yield
    finally:
        del trainer.compute_loss, trainer.log
        vars(trainer).update(present | first)
