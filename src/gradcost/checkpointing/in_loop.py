"""Recompute activations in any training loop that calls `loss.backward()`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from traceback import walk_stack
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from gradcost.checkpointing.policies import Saving
from gradcost.checkpointing.replay import Replay
from gradcost.core.complex_numbers import as_real
from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.evaluation.first_use import findings
from gradcost.core.notes import warn_once
from gradcost.core.objective import Objective
from gradcost.core.pytree import tensors


@contextmanager
def checkpoint(
    model: nn.Module, saving: Saving, *, loss: Callable[[Any], Tensor] | None = None
) -> Iterator[AppliedPolicy]:
    """Recompute activations in the backward passes of a training loop, as `saving` selects.

        with gradcost.checkpoint(model, Within(8 << 30)):
            for batch in loader:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    Law: gradients, random numbers and buffers are those of the loop without `checkpoint`, bit for bit.

    - The loop stays as it is: autocast, GradScaler, gradient accumulation and DistributedDataParallel work.
    - The first forward pass of each shape of input takes longer. It checks which blocks give the same when they run
      again, and `Within` computes its schedule.
    - `Within(bytes)` counts the weights, the gradients of all trainable parameters, the activations and the loss.
      Add the state of the optimizer as `Within(bytes, beside)`.

    Args:
        model: the module that the loop calls. Wrap it in DistributedDataParallel before or after.
        saving: the checkpointing policy.
        loss: returns a scalar from the model's output. Only `Within` uses it, to count the memory of the loop's loss.
            None: the output's `loss`, or the mean square of the output.
    Yields:
        The `AppliedPolicy`.
    Raises:
        BadInput: the model is no module or has a policy already, or `saving` is no policy.
        Unsupported, DoesNotFit: the model's first forward pass raises it if `saving` cannot be used.
    """
    applied = apply(model, saving, loss=loss)
    try:
        yield applied
    finally:
        applied.remove()


def apply(model: nn.Module, saving: Saving, *, loss: Callable[[Any], Tensor] | None = None) -> AppliedPolicy:
    """Do what `checkpoint` does, without a `with` statement: call `remove()` of the result to end it.

    Args:
        model: the module that the loop calls.
        saving: the checkpointing policy.
        loss: returns a scalar from the model's output; see `checkpoint`.
    Returns:
        The policy in effect.
    Raises:
        BadInput: the model is no module or has a policy already, or `saving` is no policy.
    """
    if not isinstance(model, nn.Module):
        raise BadInput(f"checkpoint needs a torch.nn.Module, not {type(model).__name__}.")
    if not isinstance(saving, Saving):
        raise BadInput(f"checkpoint needs a policy such as gradcost.checkpointing.Blocks(), not {saving!r}.")
    if any(isinstance(getattr(hook, "__self__", None), AppliedPolicy) for hook in model._forward_pre_hooks.values()):
        raise BadInput(f"this {type(model).__name__} has a checkpointing policy already: remove() that one first.")
    return AppliedPolicy(model, saving, _LossOfOutput(loss))


class AppliedPolicy:
    """A checkpointing policy in effect for a model: two forward hooks.

    Args:
        model: the module.
        saving: the policy.
        loss: returns the loss of (model, (args, kwargs)).
    """

    def __init__(self, model: nn.Module, saving: Saving, loss: _LossOfOutput) -> None:
        self._loss, self._objective = loss, Objective(model, loss)
        if self._objective.structure.sharded is not None:
            raise BadInput(
                f"{self._objective.structure.sharded}, and checkpoint serves whole parameters. Use "
                "torch.utils.checkpoint in the model."
            )
        gradients = sum(leaf.parameter.nbytes for leaf in self._objective.leaves)
        self._saving = saving.beside_gradients(gradients)
        # One per running call of the model, outermost first. The frame is that of the call.
        self._calls: list[tuple[FrameType, ExitStack]] = []
        self._is_checked = False
        self._hooks = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def __repr__(self) -> str:
        return f"{type(self._objective.model).__name__} with {self._saving}"

    def remove(self) -> None:
        """End the policy. Losses whose forward pass is over can still be differentiated."""
        for hook in self._hooks:
            hook.remove()
        self._end_interrupted_calls()

    def _end_interrupted_calls(self) -> None:
        """Undo the calls that Ctrl-C ended: torch runs no forward hook after an exception that is no Exception."""
        while self._calls and not _is_running(self._calls[-1][0]):
            self._leave()

    def _enter(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self._end_interrupted_calls()
        self._calls.append((sys._getframe(1), ExitStack()))
        if len(self._calls) > 1 or not torch.is_grad_enabled():  # checks and forecasts call the model too
            return
        self._renew_if_changed()
        self._set_aside_own_checkpointing()
        batch = args, kwargs
        context = self._saving.applied(self._objective, batch)
        if not self._is_checked:
            objection = self._saving.objection(self._objective, batch)
            if objection is not None:
                raise Unsupported(objection)
            self._is_checked = True
        for replay in findings(model, self._loss).values():
            if isinstance(replay, Replay):  # the loop may draw, or change weights, before the backward pass
                replay.draws_python = replay.draws_numpy = replay.is_in_loop = True
        self._calls[0][1].enter_context(context)

    def _leave(self, *_: Any) -> None:
        self._calls.pop()[1].close()

    def _set_aside_own_checkpointing(self) -> None:
        """Switch the checkpointing of a transformers model off until the forward pass ends."""
        own = [module for module in self._objective.modules if vars(module).get("gradient_checkpointing") is True]
        for module in own:
            module.gradient_checkpointing = False  # type: ignore[assignment]
            self._calls[0][1].callback(setattr, module, "gradient_checkpointing", True)
        if own:
            model = self._objective.model
            warn_once(
                model,
                "own checkpointing",
                f"gradient checkpointing is on in this {type(model).__name__}; {self._saving} replaces it here.",
            )

    def _renew_if_changed(self) -> None:
        objective = self._objective
        assert objective.structure is not None
        try:
            objective.structure.check(objective.leaves)
        except BadInput:  # a parameter was frozen or a module replaced since
            self._objective = Objective(objective.model, self._loss)


def _is_running(call: FrameType) -> bool:
    tops = sys._current_frames()  # one per thread
    try:
        return any(frame is call for top in tops.values() for frame, _ in walk_stack(top))
    finally:
        tops.clear()  # the frame of this call is in it: a cycle, which would keep the tensors of all its callers


class _LossOfOutput:
    """The loss as a function of (model, (args, kwargs)). loss: a function of the output, or None."""

    def __init__(self, loss: Callable[[Any], Tensor] | None) -> None:
        self.loss = loss

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        args, kwargs = batch
        output = model(*args, **kwargs)
        if self.loss is not None:
            return self.loss(output)
        given = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if isinstance(given, Tensor):
            return given
        parts = [part for part in tensors(output) if part.grad_fn is not None]
        return sum((as_real(part).float().square().mean() for part in parts), torch.zeros(()))
