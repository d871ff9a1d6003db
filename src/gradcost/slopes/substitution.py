"""Evaluate a model at other weights: replace each parameter while it is read, and free the replacement afterwards.

Two mechanisms cover every read of a trainable parameter.

1. Module swap. While a module's forward runs, its own parameters are replaced by the results of `make`. All code in
   the forward reads the replacements, including custom autograd functions and compiled kernels. The parameters are
   restored when the forward returns or raises.
2. Torch-function mode. It replaces a parameter among the arguments of a single torch function. It covers parameters
   that are read while their module does not run: `nn.MultiheadAttention` reads `out_proj.weight` without calling
   `out_proj`, a tied head reads the embedding's weight, and `nn.ParameterList` is never called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradcost.core.objective import Leaf, Objective

Make = Callable[[Leaf], Tensor]
Rule = Callable[..., Tensor]


@contextmanager
def substituted(
    objective: Objective,
    make: Make,
    rules: dict[Any, Rule] | None = None,
    skip_swap: Callable[[nn.Module, str], bool] = lambda module, name: False,
) -> Iterator[None]:
    """Replace each leaf of the objective by `make(leaf)` inside the context.

    At any time, replacements exist only for the running module and the modules that contain it.
    Law: the model has its original parameters and hooks afterwards, even after an error.

    Args:
        objective: the model and its leaves.
        make: returns the replacement of a leaf.
        rules: maps torch functions to the functions that run instead.
        skip_swap: (module, parameter name) -> True if only torch functions read this parameter. The module swap then
            skips the parameter, and the torch-function mode replaces it.
    """
    leaves = {id(leaf.parameter): leaf for leaf in objective.leaves}
    handles: list[Any] = []
    swaps: list[_Swap] = []
    try:
        for module in objective.modules:
            trainable = [(name, leaves[id(p)]) for name, p in module._parameters.items() if id(p) in leaves]
            swapped = [(name, leaf) for name, leaf in trainable if not skip_swap(module, name)]
            if swapped:
                swap = _Swap(module, swapped, make)
                swaps.append(swap)
                handles.append(module.register_forward_pre_hook(swap.enter, prepend=True))
                handles.append(module.register_forward_hook(swap.leave, always_call=True))
        with _SubstitutionMode(leaves, make, rules or {}):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for swap in swaps:
            swap.restore()


@contextmanager
def with_rules(rules: dict[Any, Rule]) -> Iterator[None]:
    """Replace torch functions inside the context, as `substituted` does, but no weights.

    Args:
        rules: maps torch functions to the functions that run instead.
    """
    with _SubstitutionMode({}, lambda leaf: leaf.parameter, rules):
        yield


class _Swap:
    """Hooks that replace the parameters of one module while its forward runs."""

    def __init__(self, module: nn.Module, parameters: list[tuple[str, Leaf]], make: Make) -> None:
        self.module, self.parameters, self.make = module, parameters, make
        self.running = 0  # depth of nested calls: a module may call itself

    def enter(self, module: nn.Module, args: Any) -> None:
        self.running += 1
        if self.running == 1:
            with torch._C.DisableTorchFunction():
                substitutes = {name: self.make(leaf) for name, leaf in self.parameters}
            module._parameters.update(substitutes)  # type: ignore[arg-type]

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running -= 1
        if self.running == 0:
            self.restore()

    def restore(self) -> None:
        self.running = 0
        for name, leaf in self.parameters:
            self.module._parameters[name] = leaf.parameter


class _SubstitutionMode(TorchFunctionMode):
    """Replaces parameters among the arguments of a torch function, and torch functions by their rules."""

    def __init__(self, leaves: dict[int, Leaf], make: Make, rules: dict[Any, Rule]) -> None:
        super().__init__()
        self.leaves, self.make, self.rules = leaves, make, rules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _METADATA:
            args = self._replace(args)
            if kwargs:
                kwargs = {name: self._replace(argument) for name, argument in kwargs.items()}
            func = self.rules.get(func, func)
        return func(*args, **kwargs)

    def _replace(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            leaf = self.leaves.get(id(argument))
            return argument if leaf is None else self.make(leaf)
        if type(argument) in (tuple, list):
            return type(argument)([self._replace(item) for item in argument])
        return argument


# Functions that read no element of a tensor: their arguments need no replacement.
_METADATA = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad", "grad_fn")
    + ("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes")
} | {
    getattr(Tensor, name)
    for name in (
        "size",
        "dim",
        "numel",
        "nelement",
        "stride",
        "element_size",
        "is_floating_point",
        "is_complex",
    )
    + ("is_contiguous", "storage_offset", "get_device", "ndimension", "__len__", "__hash__", "type")
}
