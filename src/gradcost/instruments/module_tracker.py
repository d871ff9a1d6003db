"""Track which module runs in the forward pass, in recomputation and in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from gradcost.core import memory_events


class ModuleTracker:
    """Track the innermost running module inside `followed()`.

    `here` is the module's name; "" if no module runs. In the backward pass it is the module whose output's gradient
    was computed last, or the block that is recomputed.

    Args:
        model: the model that defines the module names. Modules outside the model are named by their class.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._key = f"gradcost {id(self)}"  # in the metadata of nodes: each tracker has its own hooks
        self._stack: list[str] = []
        self._backward = ""

    @property
    def here(self) -> str:
        if self._stack:
            return self._stack[-1]
        again = memory_events.running_again()
        return self._backward if again is None else self._names.get(id(again), type(again).__name__)

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Update `here` inside the context, by hooks that reference no tensor."""
        enter = register_module_forward_pre_hook(lambda module, args: self._enter(module))
        leave = register_module_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            enter.remove()
            leave.remove()
            self._stack.clear()

    def _enter(self, module: nn.Module) -> None:
        if not self._stack and torch._C._current_graph_task_id() < 0:
            self._backward = ""  # a forward pass outside of any backward pass
        self._stack.append(self._names.get(id(module), type(module).__name__))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self._stack.pop() if self._stack else ""
        for leaf in pytree.tree_leaves(output):
            node = leaf.grad_fn if isinstance(leaf, Tensor) else None
            metadata: Any = {} if node is None else node.metadata
            if node is not None and self._key not in metadata:
                metadata[self._key] = name  # not overwritten by outer modules, which return later
                node.register_prehook(lambda grads, name=name: self._set_backward(name))

    def _set_backward(self, name: str) -> None:
        self._backward = name
