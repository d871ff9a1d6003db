"""Find out how a loss uses autograd inside: whether it differentiates, and what it computes under `torch.no_grad()`.

`examine` runs a loss on the first micro-batch. The result is stored per model, loss and train/eval mode.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from gradcost.core.errors import GradcostError, Unsupported
from gradcost.core.evaluation.autograd_graph import graph_nodes
from gradcost.core.evaluation.compiled import eagerly, is_compiled_function
from gradcost.core.evaluation.embeddings import LOOKUPS, EmbeddingCall
from gradcost.core.evaluation.first_use import can_check, findings
from gradcost.core.interrupts import Hooks, raise_interrupt, undoing


class AutogradUse(NamedTuple):
    """What a loss does with autograd.

    A *constant part* runs under `torch.no_grad()` or `torch.inference_mode()`. Its results are constant for backprop.

    Args:
        differentiates: the loss calls `torch.autograd.grad`.
        of_parameters: it differentiates with respect to trainable parameters.
        uses_slopes: it differentiates without `create_graph`, so the result is a constant for backprop.
        has_constants: the loss has a derivative, and depends on a constant part that depends on the weights.
        reads_moved: constant parts read activations, or weights of a module that was called outside of such parts. If
            False, they read weights only in modules that they call.
        detaches: the loss depends on the result of `.detach()` or `.data` of an activation.
        depends_on_mode: the loss has another value with gradients off.
        transforms: it applies `torch.func` transforms.
        forward_mode: it differentiates in forward mode, for example by `torch.func.jvp`.
        sets_mode: it sets the gradient mode, as `torch.no_grad()` does.
        hooks: it registers hooks on tensors, which run in a backward pass.
        pads: it calls an embedding with a padding index and a weight that was computed from parameters.
        functions: the names of the custom `torch.autograd.Function`s in its graph.
    """

    differentiates: bool = False
    of_parameters: bool = False
    uses_slopes: bool = False
    has_constants: bool = False
    reads_moved: bool = False
    detaches: bool = False
    depends_on_mode: bool = False
    transforms: bool = False
    forward_mode: bool = False
    sets_mode: bool = False
    hooks: bool = False
    pads: bool = False
    functions: tuple[str, ...] = ()

    @property
    def needs_gradients(self) -> bool:
        """Whether an evaluation needs gradients on."""
        return self.differentiates or self.has_constants or self.depends_on_mode


ORDINARY = AutogradUse()
SET_GRAD_ENABLED: Any = torch._C._set_grad_enabled
_MAKE_DUAL: Any = torch._VF._make_dual  # type: ignore[attr-defined]
CUTS = {Tensor.detach, Tensor.detach_, Tensor.data.__get__, torch.detach}  # type: ignore[attr-defined]
_CONSTANT, _DETACHED = 1, 2  # bit flags of `_Watch.origins`
_BACKWARD = {Tensor.backward, torch.autograd.backward}
_DERIVATIVES = {torch.autograd.grad, *_BACKWARD}
_PURPOSE = "use of autograd"
_PROVISIONAL = "use of autograd on fake tensors"  # without `depends_on_mode`
_STORED_GRAPH = "the loss reuses a tensor with its autograd graph from an earlier evaluation: store it detached."
_TOLERANCE = 1e3  # machine epsilons between losses with gradients on and off: kernels round differently


def known_use(objective: Any) -> AutogradUse | None:
    """Return what `examine` found about this objective's loss; None if it has not examined this loss."""
    attributes, training = objective.__dict__, objective.model.training
    known = attributes.get("_autograd_use")
    if known is not None and known[0] is training:
        return known[1]
    found = _findings_of(objective)
    use = found.get((_PURPOSE, training))
    if use is not None:
        attributes["_autograd_use"] = training, use
    elif (provisional := found.get((_PROVISIONAL, training))) is not None and not can_check(objective.model):
        use = provisional
    return use


def _findings_of(objective: Any) -> dict[Any, Any]:
    return findings(objective.model, getattr(objective.loss, "observed_loss", objective.loss))


def custom_functions(objective: Any) -> list[str]:
    """Return the names of the custom functions of this loss, without those of checkpointing, DDP and FSDP."""
    functions = getattr(known_use(objective), "functions", ())
    return [name for name in functions if not any(part in name for part in ("Checkpoint", "DDPSink", "RegisterPost"))]


class ConstantParts:
    """Tracks which part of a loss runs, by the gradient mode that the loss sets. Gradients are on at the start.

    is_inside: whether a constant part runs. level: the functorch level at which it began.
    """

    def __init__(self) -> None:
        self.is_inside, self.level = False, None

    def follow(self, was_enabled: bool, enabled: bool) -> bool:
        """Update `is_inside` when the loss sets the gradient mode. Return whether a constant part begins or ends.

        Args:
            was_enabled: the mode before.
            enabled: the mode after.
        """
        level = functorch.maybe_current_level()
        if was_enabled is self.is_inside or enabled is not self.is_inside:
            return False  # no change; or the forward of an autograd.Function, where torch switches gradients off
        if enabled and level != self.level:
            return False  # a transform inside no_grad (torch.func.grad) switches gradients on for its own level only
        self.is_inside, self.level = not enabled, None if enabled else level
        return True


def examine(objective: Any, batch: Any, key: Any) -> AutogradUse | None:
    """Find out how a loss uses autograd, and store the result. Cost: two forward passes, three if it differentiates.

    Args:
        objective: the Objective. Its loss is evaluated at the current weights, on the first micro-batch.
        batch: any pytree.
        key: seeds the random layers.
    Returns:
        What the loss does; None if it can be evaluated neither with gradients on nor off.
    Raises:
        BadInput: an evaluation writes into a parameter.
        Unsupported: two evaluations under one key give two losses.
    """
    if torch.is_inference_mode_enabled():
        return ORDINARY  # gradients cannot be on here, so the result is not stored
    if is_compiled_function(objective.loss):
        return ORDINARY  # a function mode does not see the calls inside it
    objective.prepare(batch, key)
    on, off = _with_gradients(objective, batch, key), None
    if on is None or (not on[0].needs_gradients and can_check(objective.model)):
        off = _without_gradients(objective, batch, key)
        if on is None and off is None:
            return None
    use = ORDINARY if on is None else on[0]
    if on is not None and off is not None and _differ(on[1], off):
        use = use._replace(depends_on_mode=True)
    purpose = _PURPOSE if can_check(objective.model) else _PROVISIONAL
    objective.__dict__.pop("_autograd_use", None)  # result of an earlier examination
    _findings_of(objective)[purpose, objective.model.training] = use
    return use


def _with_gradients(objective: Any, batch: Any, key: Any) -> tuple[AutogradUse, Tensor] | None:
    """Evaluate with gradients on. Return the use of autograd and the loss; None if the loss raises."""
    is_over = False

    def stop(dropped: None) -> Tensor:
        if is_over:
            raise Unsupported(_STORED_GRAPH)
        raise _Differentiates

    for keeps_graph in (False, True):  # most losses need no graph, and it may not fit into memory
        hooks = nullcontext() if keeps_graph else saved_tensors_hooks(drop, stop)
        try:
            with torch.enable_grad(), hooks, _watched(objective, keeps_graph) as watch:
                loss = _first_loss(objective, batch, key)
            is_over = True
        except _Differentiates:
            continue
        except GradcostError:
            raise  # such as BadInput at the first write into the batch
        except Exception as error:
            raise_interrupt(error)
            if not keeps_graph and "saved tensor hooks" in str(error):  # torch.func.grad does not allow them
                continue
            return None
        return watch.use(loss), loss
    return None


def _without_gradients(objective: Any, batch: Any, key: Any) -> Tensor | None:
    try:
        with torch.no_grad():
            return _first_loss(objective, batch, key)
    except GradcostError:
        raise
    except Exception as error:
        raise_interrupt(error)
        return None


def _first_loss(objective: Any, batch: Any, key: Any) -> Tensor:
    with eagerly(), closing(objective.losses(batch, key)) as losses:
        return next(losses)[1]


def _differ(one: Tensor, other: Tensor) -> bool:
    """Return whether two losses differ by more than the rounding of different kernels."""
    a, b = float(one.detach()), float(other)
    if a == b or (math.isnan(a) and math.isnan(b)):
        return False
    return not abs(a - b) <= _TOLERANCE * torch.finfo(one.dtype).eps * max(abs(a), abs(b))


def drop(tensor: Tensor) -> None:
    """Save nothing: a hook for `saved_tensors_hooks`."""


def gives_constants(func: Any, *args: Any, **kwargs: Any) -> bool:
    """Return whether this call is torch.autograd.grad without `create_graph`: constant for backprop."""
    if func is not torch.autograd.grad or functorch.maybe_current_level() is not None:
        return False
    return not (kwargs.get("create_graph") or (len(args) > 4 and args[4]))


class _Differentiates(BaseException):
    """The loss differentiates, but its graph saves no tensors."""


@contextmanager
def _watched(objective: Any, keeps_graph: bool) -> Iterator[_Watch]:
    """Yield a `_Watch` that observes the loss while it is evaluated inside the context."""
    leaves = {id(leaf.parameter) for leaf in objective.leaves}
    watch, hooks = _Watch(leaves, keeps_graph), Hooks()
    with undoing(hooks.remove):
        for module in objective.modules:
            if any(id(parameter) in leaves for parameter in module._parameters.values()):
                hooks.before(module, watch.enter)
                hooks.after(module, watch.leave, always=True)
        with watch:
            yield watch


class _Watch(TorchFunctionMode):
    """Observes a loss that is evaluated with gradients on.

    leaves: the ids of the trainable parameters. keeps_graph: if False, a derivative raises `_Differentiates`.
    """

    def __init__(self, leaves: set[int], keeps_graph: bool) -> None:
        super().__init__()
        self.leaves, self.keeps_graph, self.parts = leaves, keeps_graph, ConstantParts()
        self.differentiates = self.of_parameters = self.uses_slopes = False
        self.transforms = self.forward_mode = self.sets_mode = self.hooks = self.pads = False
        self.has_constants = self.reads_moved = False
        self.origins: Any = WeakIdKeyDictionary()  # tensor -> bit flags: _CONSTANT, _DETACHED
        self.running: list[int] = []  # ids of parameters of the modules that run, if called outside of constant parts

    def use(self, loss: Tensor) -> AutogradUse:
        """Return what was observed. loss: the loss that was evaluated."""
        # A transform returns new tensor objects, which `origins` does not contain.
        origin = self.origins.get(loss, 0) | (_CONSTANT if self.transforms and self.has_constants else 0)
        has_constants = bool(origin & _CONSTANT) and loss.requires_grad
        return AutogradUse(
            differentiates=self.differentiates,
            of_parameters=self.of_parameters,
            uses_slopes=self.uses_slopes,
            has_constants=has_constants,
            reads_moved=has_constants and self.reads_moved,
            detaches=bool(origin & _DETACHED) and loss.requires_grad,
            transforms=self.transforms,
            forward_mode=self.forward_mode,
            sets_mode=self.sets_mode,
            hooks=self.hooks,
            pads=self.pads,
            functions=_custom_functions(loss),
        )

    def enter(self, module: nn.Module, args: Any) -> None:
        self.running += [] if self._is_constant() else [id(parameter) for parameter in module._parameters.values()]

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        for parameter in module._parameters.values():
            if id(parameter) in self.running:
                self.running.remove(id(parameter))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_transformed = functorch.maybe_current_level() is not None
        self.transforms = self.transforms or is_transformed
        self.forward_mode = self.forward_mode or func is _MAKE_DUAL
        self.hooks = self.hooks or func is Tensor.register_hook
        self.pads = self.pads or (func in LOOKUPS and EmbeddingCall.of(func, args, kwargs).pads_computed)
        if func is SET_GRAD_ENABLED:
            self.sets_mode = True
            self.parts.follow(torch.is_grad_enabled(), *args)
        elif func in _BACKWARD and not (kwargs.get("inputs") and kwargs.get("create_graph")):
            raise Unsupported(
                "the loss calls backward(), which adds to `.grad` of the parameters that it reads. Use "
                "torch.autograd.grad(value, inputs, create_graph=True) in the loss, or use backprop()."
            )
        elif func in _DERIVATIVES and not is_transformed:
            self.differentiates = True
            if not self.keeps_graph:
                raise _Differentiates
            self.of_parameters |= any(id(tensor) in self.leaves for tensor in _tensors((args, kwargs)))
            self.uses_slopes |= gives_constants(func, *args, **kwargs)
        result = func(*args, **kwargs)
        if self.origins or func in CUTS or self._is_constant():
            self._follow(func, (args, kwargs), result)
        return result

    def _is_constant(self) -> bool:
        return self.parts.is_inside or torch.is_inference_mode_enabled()

    def _follow(self, func: Any, arguments: Any, result: Any) -> None:
        """Record in `origins` which results depend on constant parts or on detached tensors."""
        inputs = _tensors(arguments)
        outputs = _tensors(result) or (inputs[:1] if func is Tensor.__setitem__ else [])
        if not outputs:
            return  # the result is a shape, a dtype or a number
        origin = functools.reduce(operator.or_, (self.origins.get(tensor, 0) for tensor in inputs), 0)
        with_grad = [tensor for tensor in inputs if tensor.requires_grad]
        if with_grad and self._is_constant():
            origin |= _CONSTANT
            self.has_constants = True
            in_called = all(id(tensor) in self.leaves and id(tensor) not in self.running for tensor in with_grad)
            self.reads_moved = self.reads_moved or not in_called
        elif with_grad and func in CUTS and id(with_grad[0]) not in self.leaves:
            origin |= _DETACHED
        for tensor in outputs if origin else ():
            self.origins[tensor] = origin | self.origins.get(tensor, 0)
            if tensor._is_view() and tensor._base is not None:
                self.origins[tensor._base] = origin | self.origins.get(tensor._base, 0)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _custom_functions(loss: Tensor) -> tuple[str, ...]:
    """Return the names of the custom `torch.autograd.Function`s in the graph of a loss."""
    custom = [node for node in graph_nodes(loss) if isinstance(node, torch.autograd.function.BackwardCFunction)]
    return tuple(dict.fromkeys(type(node).__name__.removesuffix("Backward") for node in custom))
