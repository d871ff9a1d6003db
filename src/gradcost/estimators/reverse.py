"""Backpropagation, with a choice of which activations are saved for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from gradcost.checkpointing.policies import Everything, Saving
from gradcost.core.batching.loss_weights import with_settled_weights
from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.finite import require_finite
from gradcost.core.interrupts import undoing
from gradcost.core.key import Key
from gradcost.core.objective import Leaf, Objective
from gradcost.core.value import value
from gradcost.estimators.backward import BackwardPasses, hooks_message
from gradcost.estimators.estimator import Estimate, Estimator, Facts, LeafConsumer, State, use_none
from gradcost.estimators.gradient import Dense, Streamed


@value
class Reverse(Estimator):
    """The gradient by reverse-mode automatic differentiation: backpropagation.

    Law: every `saving` gives the same gradient, bit for bit. L linear layers cost L + (2L - 1) forward matmuls, plus
    those that `saving` recomputes.

    A parameter that the loss of no micro-batch uses has no gradient, as in torch: `Gradient.unused`.

    In a DistributedDataParallel or after `fully_shard` the gradient is the mean of the processes' gradients, and the
    loss is that of this process's batch. If the loss of one process is not finite, all of them raise NotFinite.
    Sharded parameters are served with `Everything()` only.

    Args:
        saving: which activations are saved for the backward pass, and which are recomputed.
    Source: Linnainmaa 1970; Rumelhart, Hinton, Williams 1986.
    """

    saving: Saving = Everything()

    @property
    def facts(self) -> Facts:
        return Facts(exact=True, unbiased=True)

    def init(self, objective: Objective) -> None:
        return None

    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        tensors: dict[str, Tensor] = {}
        loss = self._backward(objective, batch, key, tensors.__setitem__, lambda leaf: None)
        return Estimate(loss, Dense(objective, tensors))

    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        message = sum(leaf.parameter.nbytes for leaf in objective.leaves)

        def skip(leaf: Leaf) -> None:
            nonlocal message
            message -= leaf.parameter.nbytes
            use_none(use, leaf)

        loss = self._backward(objective, batch, key, use, skip)
        return Estimate(loss, Streamed(objective, message))

    @with_settled_weights
    def _backward(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, skip: Callable[[Leaf], None]
    ) -> Tensor:
        """Return the loss, and pass the gradient of each parameter to `use`, or the parameter to `skip`."""
        if torch.is_inference_mode_enabled():
            raise Unsupported(
                "torch.inference_mode() is on around the estimate, and backprop cannot record a graph there. Use "
                "torch.no_grad() around the training loop instead."
            )
        if (reason := self._refusal(objective)) is not None:
            raise Unsupported(reason)
        objective.prepare(batch, key)  # before hooks and frozen parameters
        passes = BackwardPasses(objective, use, skip)
        total: Tensor | None = None
        # Close `losses`: after an exception its traceback would keep the generator, with copies of the buffers.
        with (
            undoing(passes.restore),
            torch.enable_grad(),
            self.saving.applied(objective, batch),
            closing(objective.losses(batch, key, passes.begin)) as losses,
        ):
            passes.prepare()
            for number, (weight, loss, rescale) in enumerate(losses):
                if loss.grad_fn is None:
                    raise BadInput(passes.no_graph())
                if objective.structure.sharded is not None and (rescale != 1.0 or weight == 0.0):
                    raise Unsupported(_unequal_parts(objective))
                if rescale != 1.0 and total is not None:
                    total = total * rescale
                    _rescale_gradients(passes.parameters.values(), rescale)
                weighted = None  # for a micro-batch without targets: its loss may be nan
                if weight != 0.0:
                    weighted = loss if objective.parts == 1 else weight * loss
                    total = weighted.detach() if total is None else total + weighted.detach()
                is_last = number == objective.parts - 1
                if is_last:
                    require_finite(loss if total is None else total, groups=objective.structure.groups)
                passes.run(weighted, is_last)
        assert total is not None
        return total

    def objection(self, objective: Objective, batch: Any) -> str | None:
        parameters = {leaf.name: leaf.parameter for leaf in objective.leaves}
        return hooks_message(parameters) or self._refusal(objective) or self.saving.objection(objective, batch)

    def _refusal(self, objective: Objective) -> str | None:
        if any(module.static_graph for module in objective.structure.parallel):
            return (
                "DistributedDataParallel(static_graph=True) counts on a backward pass after every forward pass, and "
                "an estimate also evaluates the loss without one. Use static_graph=False."
            )
        structure = objective.structure
        if structure.averages and not all(module.require_backward_grad_sync for module in structure.parallel):
            return (
                "no_sync() of DistributedDataParallel is on, so the gradient of this batch would stay that of this "
                "process. Leave it out: each estimate is averaged, and gradient.write(accumulate=True, scale=1 / k) "
                "adds up k of them."
            )
        if objective.structure.sharded is None or self.saving == Everything():
            return None
        return (
            f"{objective.structure.sharded}, and {self.saving} serves whole parameters. Use backprop(), with "
            "torch.utils.checkpoint in the model where memory is short."
        )


def _unequal_parts(objective: Objective) -> str:
    return (
        f"{objective.structure.sharded}, and the micro-batches of this process count different numbers of targets. "
        "The gradients of earlier ones would be divided again, and are averaged between the processes already. Use "
        "smaller batches without Accumulated."
    )


def _rescale_gradients(parameters: Iterable[Tensor], factor: float) -> None:
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
