"""Weights that read as others for one evaluation, made where they are used and dropped after use.

Two nets catch every read of a trainable parameter. While a module runs, its own parameters are swapped for
what `make` gives, so that whatever its forward does with them (custom autograd functions, compiled kernels)
sees the substitute; they are put back when it returns or raises. A parameter that is read while its owner is
not running (`nn.MultiheadAttention` reads `out_proj.weight` without calling `out_proj`; a tied head reads the
embedding's table; a parameter list is never called) meets the second net: a torch-function mode that sees
the parameter among an operation's arguments and substitutes it for that one operation.
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
    stays: Callable[[nn.Module, str], bool] = lambda module, name: False,
) -> Iterator[None]:
    """Within, each leaf of the objective reads as `make(leaf)`; `rules` replaces torch functions by others.

    A parameter that `stays` in its module, given by name, is left to the second net: it must reach nothing but torch
    functions.

    At most the parameters of one module (and of those that contain it) are made at a time. Law: whatever
    happens within, the model holds its own parameters and hooks afterwards.
    """
    leaves = {id(leaf.parameter): leaf for leaf in objective.leaves}
    handles: list[Any] = []
    swaps: list[_Swap] = []
    try:
        for module in objective.modules:
            found = [(name, leaves[id(p)]) for name, p in module._parameters.items() if id(p) in leaves]
            owned = [(name, leaf) for name, leaf in found if not stays(module, name)]
            if owned:
                swap = _Swap(module, owned, make)
                swaps.append(swap)
                handles.append(module.register_forward_pre_hook(swap.enter, prepend=True))
                handles.append(module.register_forward_hook(swap.leave, always_call=True))
        with _Net(leaves, make, rules or {}):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for swap in swaps:
            swap.restore()


@contextmanager
def ruled(rules: dict[Any, Rule]) -> Iterator[None]:
    """Within, torch functions are replaced as within `substituted`, and the weights read as they are."""
    with _Net({}, lambda leaf: leaf.parameter, rules):
        yield


class _Swap:
    """The parameters of one module, swapped while it runs."""

    def __init__(self, module: nn.Module, owned: list[tuple[str, Leaf]], make: Make) -> None:
        self.module, self.owned, self.make = module, owned, make
        self.running = 0  # a module may call itself

    def enter(self, module: nn.Module, args: Any) -> None:
        self.running += 1
        if self.running == 1:
            with torch._C.DisableTorchFunction():
                made = {name: self.make(leaf) for name, leaf in self.owned}
            module._parameters.update(made)  # type: ignore[arg-type]

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running -= 1
        if self.running == 0:
            self.restore()

    def restore(self) -> None:
        self.running = 0
        for name, leaf in self.owned:
            self.module._parameters[name] = leaf.parameter


class _Net(TorchFunctionMode):
    """Substitutes parameters that reach an operation as they are, and applies rules for operations."""

    def __init__(self, leaves: dict[int, Leaf], make: Make, rules: dict[Any, Rule]) -> None:
        super().__init__()
        self.leaves, self.make, self.rules = leaves, make, rules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _METADATA:
            args = self._read(args)
            if kwargs:
                kwargs = {name: self._read(argument) for name, argument in kwargs.items()}
            func = self.rules.get(func, func)
        return func(*args, **kwargs)

    def _read(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            leaf = self.leaves.get(id(argument))
            return argument if leaf is None else self.make(leaf)
        if type(argument) in (tuple, list):
            return type(argument)([self._read(item) for item in argument])
        return argument


# Reading these needs no numbers, so no noise is made for them.
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
