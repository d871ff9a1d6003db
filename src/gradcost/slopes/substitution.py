"""Evaluate a model at other weights: replace each parameter while it is read, and free the replacement afterwards.

Two mechanisms cover every read of a trainable parameter by eager code.

1. Module swap. While a module's forward runs, its own parameters are replaced by the results of `make`. All code in
   the forward reads the replacements, including custom autograd functions and compiled kernels. The parameters are
   restored when the forward returns or raises. A module that holds other tensors, as under
   `torch.func.functional_call`, keeps them.
2. Torch-function mode. It replaces a parameter among the arguments of a single torch function. It covers parameters
   that are read while their module does not run: `nn.MultiheadAttention` reads `out_proj.weight` without calling
   `out_proj`, a tied head reads the embedding's weight, and `nn.ParameterList` is never called. Inside `torch.func`
   transforms it also replaces the wrappers that `grad`, `jvp` and `vmap` make of a parameter.

`.detach()` and `.data` of a parameter, and one that the loss freezes for a part of it, give the original value: to
backprop they are constants. Compiled modules are refused; compiled functions run eagerly. `read_check` finds others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from gradcost.core.errors import Unsupported
from gradcost.core.evaluation.autograd_use import CUTS, gives_constants, known_use
from gradcost.core.evaluation.compiled import compiled_message, eagerly, is_compiled
from gradcost.core.evaluation.embeddings import LOOKUPS, EmbeddingCall
from gradcost.core.interrupts import Hooks, undoing
from gradcost.core.objective import Leaf, Objective
from gradcost.slopes.rules import OPERATORS, Rule

Make = Callable[[Leaf], Tensor]


@contextmanager
def substituted(
    objective: Objective,
    make: Make,
    rules: dict[Any, Rule] | None = None,
    skip_swap: Callable[[nn.Module, str], bool] | None = None,
    of_leaves: dict[Any, Rule] | None = None,
    constant: Make = lambda leaf: leaf.parameter.detach(),
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
        of_leaves: maps torch functions to functions that get the leaves instead of their replacements. One that
            returns NotImplemented leaves the call to `make` and `rules`.
        constant: returns the result of `.detach()` and `.data` of a leaf. Default: its own value, as for backprop.
    Raises:
        Unsupported: a module with trainable parameters is compiled, or several processes train the model.
    """
    if (message := objective.structure.processes_message()) is not None:
        raise Unsupported(message)
    leaves, swapped = {id(leaf.parameter): leaf for leaf in objective.leaves}, dict[int, Leaf]()
    use = known_use(objective)
    if use is not None and use.of_parameters:
        make = _connected(make)
    swaps, hooks, frozen = list[_Swap](), Hooks(), set[int]()
    make = _trained(make, constant, frozen)

    def restore() -> None:
        hooks.remove()
        for swap in swaps:
            swap.restore()

    with undoing(restore):
        for module in objective.modules:
            attributes = module.__dict__
            if "forward" in attributes or "_compiled_call_impl" in attributes:
                _refuse_if_compiled(objective, module, leaves)
            own = [(name, leaves[id(p)]) for name, p in module._parameters.items() if id(p) in leaves]
            if skip_swap is not None:
                own = [(name, leaf) for name, leaf in own if not skip_swap(module, name)]
            if own:
                swap = _Swap(module, own, swapped, make)
                swaps.append(swap)
                hooks.before(module, swap.enter)
                hooks.after(module, swap.leave, always=True)
        mode = _SubstitutionMode(leaves, swapped, make, constant, rules or {}, of_leaves or {}, frozen=frozen)
        with eagerly(), mode:
            yield


@contextmanager
def with_rules(rules: dict[Any, Rule]) -> Iterator[None]:
    """Replace torch functions inside the context, as `substituted` does, but no weights.

    Args:
        rules: maps torch functions to the functions that run instead.
    """
    with eagerly(), _SubstitutionMode({}, {}, _same, _same, rules, {}, frozen=set()):
        yield


def _refuse_if_compiled(objective: Objective, module: nn.Module, leaves: dict[int, Leaf]) -> None:
    if is_compiled(module) and any(id(p) in leaves for p in module.parameters()):
        raise Unsupported(compiled_message(objective))


def _connected(make: Make) -> Make:
    """Return `make` with results whose derivative with respect to the parameter is the identity.

    A loss that differentiates by `torch.autograd.grad` with respect to its parameters then finds them in its graph.
    """

    def made(leaf: Leaf) -> Tensor:
        value = make(leaf)
        return leaf.parameter - leaf.parameter.detach() + value if torch.is_grad_enabled() else value

    return made


def _trained(make: Make, constant: Make, frozen: set[int]) -> Make:
    """Return `constant` for leaves whose parameter's id is in `frozen` at the call, and `make` for the others."""
    return lambda leaf: constant(leaf) if id(leaf.parameter) in frozen else make(leaf)


def _outside_transforms(make: Make, level: int | None) -> Make:
    """Return `make`, called outside of the `torch.func` transforms that the loss applies.

    Inside a transform, new tensors are functorch wrappers, and in-place noise does not work on them.
    level: the transform level at which the evaluation began.
    """

    def made(leaf: Leaf) -> Tensor:
        popped = []
        try:
            while _current_level() != level:
                popped.append(functorch.pop_dynamic_layer_stack())
            return make(leaf)
        finally:
            while popped:
                functorch.push_dynamic_layer_stack(popped.pop())

    return made


def _same(leaf: Leaf) -> Tensor:
    return leaf.parameter


class _Swap:
    """Hooks that replace the parameters of one module while its forward runs.

    leaves: (parameter name, leaf) pairs. swapped: id of a replacement in use -> its leaf, for all modules.
    """

    def __init__(
        self, module: nn.Module, leaves: list[tuple[str, Leaf]], swapped: dict[int, Leaf], make: Make
    ) -> None:
        self.module, self.leaves, self.swapped, self.make = module, leaves, swapped, make
        self.level = _current_level()
        self.running = 0  # depth of nested calls: a module may call itself
        self.substitutes: list[tuple[str, Leaf, Tensor]] = []
        self.added: list[int] = []  # ids that it added to `swapped`; a module around it may have added others

    def enter(self, module: nn.Module, args: Any) -> None:
        self.running += 1
        if self.running == 1:
            current, make = module._parameters, self.make
            if _current_level() != self.level:
                make = _outside_transforms(make, self.level)
            with torch._C.DisableTorchFunction():
                # Skip a parameter that the caller has replaced, as functional_call does.
                self.substitutes = [
                    (name, leaf, make(leaf)) for name, leaf in self.leaves if current.get(name) is leaf.parameter
                ]
            for name, leaf, substitute in self.substitutes:
                current[name] = substitute  # type: ignore[assignment]
                if id(substitute) not in self.swapped:
                    self.added.append(id(substitute))
                    self.swapped[id(substitute)] = leaf

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running -= 1
        if self.running == 0:
            current = module._parameters
            for name, leaf, substitute in self.substitutes:
                if current.get(name) is substitute:
                    current[name] = leaf.parameter
            for substitute_id in self.added:
                del self.swapped[substitute_id]
            self.substitutes, self.added = [], []

    def restore(self) -> None:
        """Restore the parameters: after a KeyboardInterrupt torch calls no hook."""
        for name, leaf in self.leaves:
            self.module._parameters[name] = leaf.parameter


class _SubstitutionMode(TorchFunctionMode):
    """Replaces parameters among the arguments of a torch function, and torch functions by their rules."""

    def __init__(
        self,
        leaves: dict[int, Leaf],
        swapped: dict[int, Leaf],
        make: Make,
        constant: Make,
        rules: dict[Any, Rule],
        of_leaves: dict[Any, Rule],
        *,
        frozen: set[int],
    ) -> None:
        super().__init__()
        self.leaves, self.swapped, self.make, self.constant = leaves, swapped, make, constant
        self.rules, self.of_leaves, self.frozen = rules, of_leaves, frozen
        self.level = _current_level()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in UNREAD:  # reads no element of a tensor
            if func in _FREEZING and (self._froze(*args, **kwargs) or self._is_transformed()):
                return args[0]
            if gives_constants(func, *args, **kwargs):
                return pytree.tree_map_only(Tensor, Tensor.detach, func(*args, **kwargs))  # without tangents
            if func in CUTS:
                leaf = self.leaves.get(id(args[0])) or self.swapped.get(id(args[0]))
                if leaf is not None:
                    value = self.constant(leaf)
                    return value if func in (Tensor.detach, torch.detach) else value.data  # its own version counter
            return func(*args, **kwargs)
        if func in LOOKUPS:
            return self._embedding(func, args, kwargs)
        return self._replaced(func, args, kwargs)

    def _embedding(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call an embedding. Backprop gives its padding row no gradient, so the row is the original weight's."""
        out, call = self._replaced(func, args, kwargs), EmbeddingCall.of(func, args, kwargs)
        if call.padding is None:
            return out
        leaf = self.leaves.get(id(call.weight)) or self.swapped.get(id(call.weight))
        return out if leaf is None else call.padded(out, self.constant(leaf))

    def _replaced(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call the rule of a function, or the function, with replacements for the leaves."""
        if func in self.of_leaves and not (self.frozen and any(id(argument) in self.frozen for argument in args)):
            result = self.of_leaves[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        if _current_level() != self.level:
            args = self._replace_in_transform(args)
            kwargs = {name: self._replace_in_transform(argument) for name, argument in kwargs.items()}
        else:
            if self._has_leaves(args):
                args = self._replace(args)
            if kwargs:
                kwargs = {name: self._replace(argument) for name, argument in kwargs.items()}
        if isinstance(func, OPERATORS) and OPERATORS in self.rules:
            return self.rules[OPERATORS](func, *args, **kwargs)
        return self.rules.get(func, func)(*args, **kwargs)

    def _froze(self, tensor: Tensor, requires_grad: bool = True) -> bool:
        """Follow a loss that freezes a leaf for a part of it; return whether the tensor is a leaf."""
        leaf = self.leaves.get(id(tensor)) or self.swapped.get(id(tensor))
        if leaf is not None:
            (self.frozen.discard if requires_grad else self.frozen.add)(id(leaf.parameter))
        return leaf is not None

    def _has_leaves(self, args: Any) -> bool:
        """Return False if no argument is a leaf or a sequence, the most frequent case."""
        for argument in args:  # noqa: SIM110  # a generator expression takes twice the time
            if id(argument) in self.leaves or type(argument) in (tuple, list):
                return True
        return False

    def _is_transformed(self) -> bool:
        """Return True under a transform of the slope itself (forward mode) if the loss applies none here."""
        return self.level is not None and _current_level() == self.level and not _marks_inputs()

    def _replace(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            leaf = self.leaves.get(id(argument))
            return argument if leaf is None else self.make(leaf)
        if type(argument) in (tuple, list):
            return type(argument)([self._replace(item) for item in argument])
        return argument

    def _replace_in_transform(self, argument: Any) -> Any:
        """Replace a leaf, or the wrapper that `torch.func` made of it, and keep the derivatives in the wrapper."""
        if type(argument) in (tuple, list):
            return type(argument)([self._replace_in_transform(item) for item in argument])
        if not isinstance(argument, Tensor):
            return argument
        batched, differentiated, leaf = [], False, argument
        while functorch.is_functorch_wrapped_tensor(leaf):
            if functorch.is_batchedtensor(leaf):
                batched.append((functorch.maybe_get_bdim(leaf), functorch.maybe_get_level(leaf)))
            else:
                differentiated = True
            leaf = functorch.get_unwrapped(leaf)
        if id(leaf) not in self.leaves:
            return argument
        value = _outside_transforms(self.make, self.level)(self.leaves[id(leaf)])
        for dim, level in reversed(batched):
            value = functorch._add_batch_dim(value, dim, level)
        # The difference is 0, and its derivative with respect to the wrapper is the identity.
        return argument - argument.detach() + value if differentiated else value


_current_level = functorch.maybe_current_level  # of torch.func transforms; None outside
_marks_inputs = functorch.get_inplace_requires_grad_allowed  # torch.func.grad calls requires_grad_ on its arguments
_FREEZING = {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]
# Functions that read no element of a tensor: their arguments need no replacement.
UNREAD = (
    {torch.autograd.grad, *_FREEZING, *CUTS}
    | {
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad", "grad_fn")
        + ("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes")
    }
    | {
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
)
