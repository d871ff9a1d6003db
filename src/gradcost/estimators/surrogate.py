"""A loss whose backward pass writes an estimate: for training loops that call `loss.backward()`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gradcost.core.errors import Unsupported
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.estimators.backward import deferred_hooks
from gradcost.estimators.estimator import Estimate, Estimator, require_estimator, require_objective
from gradcost.estimators.gradient import Dense, Gradient, Seeded


def surrogate_loss(estimator: Estimator, objective: Objective, batch: Any, key: Key) -> Tensor:
    """Estimate the gradient, and return the loss with a backward pass that writes the estimate.

    `surrogate_loss(...)` replaces `loss(model, batch)` in a training loop. The rest of the loop stays: gradient
    accumulation, loss scaling, clipping, schedulers and optimizers.

    - Law: `(factor * loss).backward()` adds factor * estimate to `.grad` of each trainable parameter, as in torch.
      With an exact estimator, a parameter that the loss of the batch does not use gets no gradient, as in torch.
      Hooks of parameters (`Tensor.register_hook`) receive factor * estimate, once.
    - Memory: the backward pass holds one whole gradient. If `.grad` already has values, it holds a second one.
    - The estimate changes no buffer. For a model with such state, call `objective.advance(batch, key)` after this.

    Args:
        estimator: how the gradient is obtained: an estimator without a state.
        objective: the model and the loss.
        batch: any pytree; passed to the loss as it is.
        key: the only source of randomness. Use another key for each call: `key.fold("step", number)`.
    Returns:
        The loss at the present parameters, a scalar tensor.
    Raises:
        BadInput: the loss is not a differentiable scalar. NotFinite: the loss or a slope is not finite.
        Unsupported: the estimator cannot be used here, it has a state, or the model is a DistributedDataParallel.
    """
    require_estimator(estimator)
    require_objective(objective)
    _refuse_wrapped(objective)
    with deferred_hooks():
        estimate = estimator.estimate(objective, batch, key)
    if estimate.state is not None:
        raise Unsupported(
            f"{estimator} has a state, which the next estimate needs. Call `estimate = estimator.estimate(objective, "
            "batch, key, state)`, `state = estimate.state` and `loss = gradcost.estimators.as_loss(estimate)`."
        )
    return as_written(estimate)


def as_loss(estimate: Estimate) -> Tensor:
    """Return the loss of an estimate, with a backward pass that adds the estimate to `.grad`.

    `surrogate_loss` is `as_loss(estimator.estimate(objective, batch, key))`. Use `as_loss` if the estimator has a
    state: keep `estimate.state`, and pass it to the next estimate.

    Args:
        estimate: the result of `Estimator.estimate`, not of `stream`.
    Returns:
        A scalar tensor, equal to `estimate.loss`.
    Raises:
        Unsupported: the model is a DistributedDataParallel or a DataParallel, or a parameter has a hook that the
            estimate has called and that the backward pass would call again.
    """
    hooked = [leaf.name for leaf in estimate.gradient.objective.leaves if leaf.parameter._backward_hooks]
    if hooked and not isinstance(estimate.gradient, Seeded):
        raise Unsupported(
            f"`{hooked[0]}` has a hook, which the estimate may have called, and backward() would call it again. Call "
            "estimate.gradient.write() instead."
        )
    return as_written(estimate)


def as_written(estimate: Estimate) -> Tensor:
    """Return `as_loss` of an estimate that was made with `deferred_hooks`."""
    objective = estimate.gradient.objective
    _refuse_wrapped(objective)
    parameters = [leaf.parameter for leaf in objective.leaves]
    return _Written.apply(estimate.loss.detach(), estimate.gradient, *parameters)  # pyright: ignore


class _Written(Function):
    """The identity of the loss, with a given gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradient: Gradient, *parameters: Tensor) -> Tensor:
        ctx.gradient = gradient
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (factor,) = grad_outputs
        return (None, None, *(_scaled(part, factor) for part in _parts(ctx.gradient)))


def _scaled(part: Tensor | None, factor: Tensor) -> Tensor | None:
    return None if part is None else part.mul_(factor.to(part.device))


def _parts(gradient: Gradient) -> Iterator[Tensor | None]:
    """Yield the gradient of each parameter, which stays sparse where it is; None for a parameter without one."""
    if isinstance(gradient, Dense):
        tensors = (gradient.tensors.get(leaf.name) for leaf in gradient.objective.leaves)
        yield from (None if tensor is None else tensor.clone() for tensor in tensors)
    else:
        unused = gradient.unused
        yield from (None if name in unused else part for name, part in gradient.leaves())


def _refuse_wrapped(objective: Objective) -> None:
    """Raise if the model averages gradients in the backward pass of its own forward pass, which does not run here."""
    if objective.structure.sharded is not None:
        raise Unsupported(
            f"{objective.structure.sharded}, and only a backward pass of the model itself averages its gradients. "
            "Call backprop().estimate(...).gradient.write() instead."
        )
    for module in objective.modules:
        if isinstance(module, DistributedDataParallel | DataParallel):
            raise Unsupported(
                f"the model is a {type(module).__name__}, which averages the gradients of its own backward pass. An "
                "estimate would stay different in each process. Make the Objective of `model.module`, and average "
                ".grad after backward() with torch.distributed.all_reduce."
            )
