"""Which module is at work: in a forward, in what a backward computes again, and in a backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree


class ModuleTracker:
    """`here` is the name of the innermost module of `model` at work, "" outside of all.

    In a backward it is the module whose output's gradient was asked for last.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._inside: list[str] = []
        self._behind = ""

    @property
    def here(self) -> str:
        return self._inside[-1] if self._inside else self._behind

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Within, the hooks are in place; they hold no tensor."""
        enter = register_module_forward_pre_hook(lambda module, args: self._enter(module))
        leave = register_module_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            enter.remove()
            leave.remove()
            self._inside.clear()

    def _enter(self, module: nn.Module) -> None:
        self._inside.append(self._names.get(id(module), type(module).__name__))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self._inside.pop() if self._inside else ""
        for leaf in pytree.tree_leaves(output):
            node = leaf.grad_fn if isinstance(leaf, Tensor) else None
            metadata: Any = {} if node is None else node.metadata
            if node is not None and "gradcost" not in metadata:
                metadata["gradcost"] = name  # the innermost module leaves first
                node.register_prehook(lambda grads, name=name: self._return(name))

    def _return(self, name: str) -> None:
        self._behind = name
