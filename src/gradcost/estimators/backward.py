"""Run the backward passes of one estimate; pass each parameter's gradient to a function when it is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.evaluation.autograd_graph import graph_nodes
from gradcost.core.interrupts import is_own_hook
from gradcost.core.objective import Leaf, Objective

_AccumulateGrad: Any = torch._C._functions.AccumulateGrad  # pyright: ignore[reportAttributeAccessIssue]
_check_inputs = torch_checkpoint.check_backward_validity


_has_deferred_hooks = ContextVar("has_deferred_hooks", default=False)


@contextmanager
def deferred_hooks() -> Iterator[None]:
    """Return a context in which the backward passes of estimates do not call the hooks of parameters.

    For estimates that another backward pass writes: that pass calls the hooks (`Tensor.register_hook`), once.
    """
    token = _has_deferred_hooks.set(True)
    try:
        yield
    finally:
        _has_deferred_hooks.reset(token)


class BackwardPasses:
    """Run the backward passes of the micro-batches of one batch. Use it inside `undoing(passes.restore)`.

    - The previous `.grad` of all parameters, and of other tensors in the graph, is restored at the end.
    - The hooks of parameters are called, unless they are deferred (`deferred_hooks`).
    - Trainable parameters of the model that are not in the objective are frozen. Otherwise the forward pass of a
      restricted objective (`Objective.only`) would save activations for all parameters.

    Args:
        objective: the model and its leaves.
        use: called as `use(name, gradient)` for each leaf during or after the last backward pass, unless no backward
            pass has given it a gradient.
        skip: called as `skip(leaf)` for the leaves without a gradient, after the last backward pass.
    """

    def __init__(
        self, objective: Objective, use: Callable[[str, Tensor], None], skip: Callable[[Leaf], None]
    ) -> None:
        self.leaves = objective.leaves
        self.parameters = {leaf.name: leaf.parameter for leaf in objective.leaves}
        self.use, self.skip = use, skip
        # The modules that average between processes, once all gradients are complete.
        self.parallel = objective.structure.parallel if objective.structure.averages else ()
        self.parts = objective.parts
        self.trained = {id(parameter) for parameter in self.parameters.values()}
        parameters = objective.model.parameters()
        self.others = [p for p in parameters if p.requires_grad and id(p) not in self.trained]
        self.grads = [parameter.grad for parameter in self.parameters.values()]
        self.foreign: list[tuple[Tensor, Tensor | None]] = []  # other tensors of the graph, with their .grad
        self.missing: set[str] = set()  # leaves whose gradient is not passed on yet
        self.hooks: list[Callable[[Tensor], None]] = []
        self.deferred: list[tuple[dict[int, Any], dict[int, Any]]] = []  # hooks of a parameter, and a copy of them
        self.has_frozen_checkpoint = False  # whether a reentrant checkpoint ran with inputs that need no gradient
        self.depends_on_others = False  # whether a loss has other tensors than the leaves in its graph
        self.task: int | None = None  # id of the outer backward pass; None: no other pass runs inside it

    def prepare(self) -> None:
        """Set every `.grad` to None and freeze the other parameters. To be called before the forward pass.

        Raises:
            Unsupported: a parameter has a hook that may step an optimizer or change the gradient.
        """
        message = hooks_message(self.parameters)
        if message is not None:
            raise Unsupported(message)
        for parameter in self.parameters.values():
            parameter.grad = None
            if _has_deferred_hooks.get() and parameter._backward_hooks:
                self.deferred.append((parameter._backward_hooks, dict(parameter._backward_hooks)))
                parameter._backward_hooks.clear()
        for parameter in self.others:
            parameter.requires_grad_(False)
        torch_checkpoint.check_backward_validity = _refuse_frozen_inputs if self.others else self._note_frozen_inputs

    def begin(self, number: int) -> None:
        """Let the backward pass of the last micro-batch, and no other, average the gradients between processes.

        Before that, a micro-batch may have no backward pass, and the gradient of earlier ones may be divided again.

        Args:
            number: that of the micro-batch whose forward pass is next.
        """
        is_last = number == self.parts - 1
        for module in self.parallel:
            module.require_backward_grad_sync = is_last
            if not is_last:  # an earlier forward pass with a graph let the reducer wait for a backward pass
                module.reducer._reset_state()

    def _note_frozen_inputs(self, inputs: Iterable[Any]) -> None:
        inputs = list(inputs)
        self.has_frozen_checkpoint |= _are_frozen(inputs)
        _check_inputs(inputs)

    def restore(self) -> None:
        """Restore every `.grad`, requires_grad and hook. Calling it again does nothing."""
        for parameter, grad in zip(self.parameters.values(), self.grads, strict=True):
            parameter.grad = grad
        if self.hooks:
            self._remove_hooks()
        for hooks, known in self.deferred:
            hooks.update(known)
        torch_checkpoint.check_backward_validity = _check_inputs
        for module in self.parallel:
            module.require_backward_grad_sync = True
        for parameter in self.others:
            parameter.requires_grad_(True)
        self._restore_foreign()

    def no_graph(self) -> str:
        """Return why a loss has no graph, and what to do instead."""
        if self.has_frozen_checkpoint:
            return (
                "the loss has no graph: the model checkpoints with use_reentrant=True, which gives no gradient if no "
                "input of the block requires one. Use use_reentrant=False."
            )
        return (
            "the loss has no graph: it does not depend on the trainable parameters by a differentiable path (.data, "
            ".detach(), .item() or no_grad inside the loss cut it)."
        )

    def run(self, loss: Tensor | None, is_last: bool) -> None:
        """Add the gradient of a loss to the sum over micro-batches. In the last pass, pass the sums to `use`.

        Args:
            loss: a scalar with a graph; None for a micro-batch with weight 0.
            is_last: whether this is the last micro-batch.
        """
        if loss is None and is_last and self.parallel:  # the other processes wait for this one's backward pass
            loss = torch.stack([(0 * parameter).sum() for parameter in self.parameters.values()]).sum()
        foreign, functions = ([], set[str]()) if loss is None else _graph(loss, self.trained)
        self.depends_on_others |= bool(foreign)
        if is_last:
            self.missing = set(self.parameters)
            if not self.parallel and not any("Checkpoint" in name for name in functions):
                self._pass_gradients_on(loss if functions else None)
        if loss is None:
            pass
        elif foreign and not functions:
            loss.backward(inputs=list(self.parameters.values()))
        else:
            # A custom function may run a backward pass of its own: reentrant checkpointing forbids `inputs`.
            self.foreign = [(tensor, tensor.grad) for tensor in foreign]
            for tensor in foreign:
                tensor.grad = None
            loss.backward()
            self._restore_foreign()
        if is_last:
            self._finish()

    def _pass_gradients_on(self, loss: Tensor | None) -> None:
        """Pass each gradient to `use` once autograd has completed it. loss: None without custom functions."""
        if loss is not None:

            def note_task(gradient: Tensor) -> None:
                self.task = torch._C._current_graph_task_id()  # pyright: ignore[reportAttributeAccessIssue]

            loss.register_hook(note_task)
        for name, parameter in self.parameters.items():

            def finished(parameter: Tensor, name: str = name) -> None:
                current = self.task
                if current is None or current == torch._C._current_graph_task_id():  # pyright: ignore
                    self._pass_on(name, parameter)
                elif name not in self.missing:
                    raise Unsupported(_second_part(name))
                # Otherwise an inner pass has added a part. The outer pass, or `_finish`, passes the sum on.

            self.hooks.append(finished)
            parameter.register_post_accumulate_grad_hook(finished)

    def _pass_on(self, name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if name not in self.missing:
            raise Unsupported(_second_part(name))
        if gradient is None:
            raise Unsupported(
                f"the gradient of `{name}` was removed before it could be used: a hook of the model "
                "steps an optimizer or clears .grad. Remove the hook (gradcost.train moves each parameter in the "
                "backward pass), or use mezo(), which runs no backward pass."
            )
        self.missing.remove(name)
        self.use(name, gradient)

    def _finish(self) -> None:
        """Pass on the gradients that no hook has passed on, and skip the leaves that no micro-batch has used."""
        self._remove_hooks()
        has_none = len(self.missing) == len(self.parameters) and all(p.grad is None for p in self.parameters.values())
        if has_none and self.depends_on_others:
            raise BadInput(
                "the loss depends on tensors that require a gradient, and on no trainable parameter of the model: it "
                "uses another model. Use the first argument of loss(model, batch)."
            )
        with torch.no_grad():  # as in hooks of a backward without create_graph
            for leaf in self.leaves:
                if leaf.name in self.missing and leaf.parameter.grad is None:
                    self.missing.remove(leaf.name)
                    self.skip(leaf)
                elif leaf.name in self.missing:  # an earlier micro-batch may have used what the last one did not
                    self._pass_on(leaf.name, leaf.parameter)

    def _remove_hooks(self) -> None:
        for parameter in self.parameters.values():
            registered = parameter._post_accumulate_grad_hooks
            for key in [key for key, hook in (registered or {}).items() if hook in self.hooks]:
                del registered[key]
        self.hooks.clear()  # they refer to this object, and so would keep what `use` refers to

    def _restore_foreign(self) -> None:
        for tensor, grad in self.foreign:
            tensor.grad = grad


def hooks_message(parameters: dict[str, Any]) -> str | None:
    """Return why hooks on these parameters prevent backpropagation here and what to do, or None.

    A hook after accumulation may step an optimizer, clear `.grad` or change it.
    """
    for name, parameter in parameters.items():
        hooks = parameter._post_accumulate_grad_hooks
        has_foreign_hook = hooks and not all(map(is_own_hook, hooks.values()))
        if has_foreign_hook or "_in_backward_optimizers" in parameter.__dict__:
            return (
                f"`{name}` has a post-accumulate-grad hook, which may step an optimizer or change the gradient in "
                "the backward pass of an estimate. Remove the hook (gradcost.train moves each parameter in the "
                "backward pass), or use mezo(), which runs no backward pass."
            )
    return None


def _graph(loss: Tensor, trained: set[int]) -> tuple[list[Tensor], set[str]]:
    """Return the tensors outside `trained` that a backward pass of the loss would give a `.grad`, and function names.

    Function names: those of the custom autograd.Function subclasses in the loss's graph.
    """
    nodes = list(graph_nodes(loss))
    foreign = [node.variable for node in nodes if type(node) is _AccumulateGrad and id(node.variable) not in trained]
    return foreign, {type(node).__name__ for node in nodes if isinstance(node, BackwardCFunction)}


def _are_frozen(inputs: Iterable[Any]) -> bool:
    return not any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in inputs)


def _refuse_frozen_inputs(inputs: Iterable[Any]) -> None:
    """Raise where torch only warns: a reentrant checkpoint whose inputs need no gradient gives parameters none."""
    if _are_frozen(inputs):
        raise Unsupported(
            "the model checkpoints with use_reentrant=True, which gives no gradient if the parameters before the "
            "block are frozen, as they are for a part of the parameters. Use use_reentrant=False, or estimate all "
            "parameters together."
        )


def _second_part(name: str) -> str:
    return (
        f"`{name}` gets another part of its gradient after the rest was passed on: an autograd.Function of the model "
        "runs a backward pass of its own. Give the function its own parameter, or use mezo()."
    )
