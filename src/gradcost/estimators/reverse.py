"""Backpropagation, with a choice of which activations are saved for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor

from gradcost.checkpointing.policies import Everything, Saving
from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.value import value
from gradcost.estimators.estimator import Estimate, Estimator, Facts, LeafConsumer, State
from gradcost.estimators.gradient import Dense, Streamed


@value
class Reverse(Estimator):
    """The gradient by reverse-mode automatic differentiation: backpropagation.

    Law: every `saving` gives the same gradient, bit for bit. L linear layers cost L + (2L - 1) forward matmuls, plus
    those that `saving` recomputes.

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
        streamed = self.stream(objective, batch, key, tensors.__setitem__, state)
        return Estimate(streamed.loss, Dense(objective, tensors))

    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        parameters = [leaf.parameter for leaf in objective.leaves]
        total: Tensor | None = None
        # Close `losses`: after an exception its traceback would keep the generator, with copies of the buffers.
        with (
            _grads_restored(objective),
            _others_frozen(objective),
            torch.enable_grad(),
            self.saving.applied(objective, batch),
            closing(objective.losses(batch, key)) as losses,
        ):
            for number, (weight, loss) in enumerate(losses):
                if loss.grad_fn is None:
                    raise BadInput(
                        "the loss has no graph: it does not depend on the trainable parameters by a "
                        "differentiable path (.data, .detach(), .item() or no_grad inside the loss cut it)."
                    )
                weighted = loss if weight == 1.0 else weight * loss
                if number == objective.parts - 1:
                    with _gradients_passed_to(objective, use):
                        weighted.backward(inputs=parameters)
                else:
                    weighted.backward(inputs=parameters)
                total = weighted.detach() if total is None else total + weighted.detach()
        assert total is not None
        return Estimate(total, Streamed(objective, sum(parameter.nbytes for parameter in parameters)))

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return self.saving.objection(objective, batch)


@contextmanager
def _grads_restored(objective: Objective) -> Iterator[None]:
    """Set every `.grad` to None inside the context. Restore the previous `.grad` afterwards."""
    saved = [leaf.parameter.grad for leaf in objective.leaves]
    for leaf in objective.leaves:
        leaf.parameter.grad = None
    try:
        yield
    finally:
        for leaf, grad in zip(objective.leaves, saved, strict=True):
            leaf.parameter.grad = grad


@contextmanager
def _others_frozen(objective: Objective) -> Iterator[None]:
    """Inside the context, freeze the model's trainable parameters that are not in the objective.

    Otherwise the forward pass of a restricted objective (`Objective.only`) would save activations for all parameters.
    """
    leaves = {id(leaf.parameter) for leaf in objective.leaves}
    others = [p for p in objective.model.parameters() if p.requires_grad and id(p) not in leaves]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


@contextmanager
def _gradients_passed_to(objective: Objective, use: LeafConsumer) -> Iterator[None]:
    """Pass each gradient to `use` once autograd has completed it. At the end, pass zeros for unused parameters."""
    missing = {leaf.name: leaf.parameter for leaf in objective.leaves}

    def pass_on(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        del missing[name]
        use(name, gradient)

    handles = []
    for leaf in objective.leaves:

        def finished(parameter: Tensor, name: str = leaf.name) -> None:
            pass_on(name, parameter)

        handles.append(leaf.parameter.register_post_accumulate_grad_hook(finished))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for name, parameter in list(missing.items()):
        # An earlier micro-batch may have used a parameter that the last one did not.
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        with torch.no_grad():  # as in the hooks, where backward without create_graph disables gradients
            pass_on(name, parameter)
