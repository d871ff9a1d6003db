"""Train with any estimator in a loop with accelerate: `checked` before the loop, `surrogate_loss` in it.

This module imports no accelerate; it uses the Accelerator that it is given.
"""

from __future__ import annotations

from typing import Any, TypeVar

from gradcost.core.errors import Unsupported
from gradcost.estimators.estimator import Estimator, require_estimator
from gradcost.integrations.micro_batches import FP16, norm_message, processes_message

Accelerator = TypeVar("Accelerator")


def checked(accelerator: Accelerator, estimator: Estimator) -> Accelerator:
    """Return the Accelerator, after refusing what would make training with this estimator silently wrong.

    If the estimator is not exact, `clip_grad_norm_` and `clip_grad_value_` of this Accelerator raise Unsupported from
    now on.

    Args:
        accelerator: an `accelerate.Accelerator`.
        estimator: the estimator of the loop's `surrogate_loss`.
    Returns:
        The same object.
    Raises:
        Unsupported: `mixed_precision="fp16"`, or several processes.
    """
    require_estimator(estimator)
    settings: Any = accelerator
    if settings.mixed_precision == "fp16":
        raise Unsupported(f'mixed_precision="fp16" {FP16}')
    if settings.num_processes > 1:
        kind = getattr(settings.distributed_type, "value", settings.distributed_type)
        raise Unsupported(processes_message(settings.num_processes, str(kind)))
    if not estimator.exact:

        def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
            raise Unsupported(norm_message(f"clip_grad_norm_(max_norm={max_norm})", "Leave this call out", estimator))

        def clip_grad_value_(parameters: Any, clip_value: float) -> Any:
            raise Unsupported(
                norm_message(f"clip_grad_value_(clip_value={clip_value})", "Leave this call out", estimator)
            )

        settings.clip_grad_norm_, settings.clip_grad_value_ = clip_grad_norm_, clip_grad_value_
    return accelerator
