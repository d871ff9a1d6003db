"""Count the FLOPs, matrix products and moved bytes of every operator that torch dispatches."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    conv_flop_count,
    flop_registry,
    mm_flop,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from gradcost.core import memory_events
from gradcost.core.fake import DEVICE
from gradcost.core.pytree import operands
from gradcost.instruments.memory import MemoryTracker, strided_parts
from gradcost.instruments.module_tracker import ModuleTracker

_ATEN = torch.ops.aten
_MATMULS = {_ATEN.mm, _ATEN.addmm, _ATEN.addmm_, _ATEN.bmm, _ATEN.baddbmm, _ATEN.baddbmm_}
# Operators that read only some elements of their first argument: those that they return.
_GATHER = {_ATEN.embedding, _ATEN.index_select, _ATEN.gather, _ATEN.index}


def _convolution_backward(grad: Any, x: Any, weight: Any, *more: Any, **_: Any) -> int:
    """Return the FLOPs of the gradients of input and weight: each costs as much as the convolution.

    torch counts the weight gradient of a convolution in groups as often as there are groups.
    """
    transposed, mask = more[4], more[7]
    return sum(mask[:2]) * conv_flop_count(x.shape, weight.shape, grad.shape, transposed)


def _rnn(x: Any, w0: Any, w1: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of a recurrent layer on inputs (T, B, ...): two products with gate weights per time step."""
    return 2 * (x.shape[0] * x.shape[1]) * (w0.shape[0] * w0.shape[1] + w1.shape[0] * w1.shape[1])


def _grouped_mm(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of a grouped product: each row, or each term of the sum, belongs to one group."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[-1] * (a.shape[2] if a.ndim == 3 else 1)


def _encoder_layer(x: Any, *arguments: Any, **_: Any) -> int:
    """Return the FLOPs of torch's fused encoder layer for inference: four linear maps and the attention."""
    b, t, d = x.shape
    weights = sum(a.shape[0] * a.shape[1] for a in arguments if isinstance(a, Tensor) and a.ndim == 2)
    return 2 * b * t * weights + 4 * b * t * t * d


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of attention. Grouped queries share keys and values; torch 2.9 refuses their shapes."""
    return sdpa_flop_count(q.shape, *(_with_heads_of(q, each) for each in (k, v)))


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, *(_with_heads_of(q, each) for each in (k, v)))


def _with_heads_of(q: Any, shared: Any) -> tuple[int, ...]:
    """Return the shape of keys or values (B, H, T, D) if each head of the queries had its own."""
    return (shared.shape[0], q.shape[1], *shared.shape[2:])


_ATTENTION = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
# FLOP formulas that torch's registry lacks, or has for some inputs only. Each takes the operator's arguments.
_FORMULAS: dict[Any, Callable[..., int]] = {
    _ATEN.addmm_: lambda c, a, b, **_: mm_flop(a.shape, b.shape),
    _ATEN.baddbmm_: lambda c, a, b, **_: 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2],
    _ATEN.mv: lambda a, x, **_: 2 * a.shape[0] * a.shape[1],
    _ATEN.addmv: lambda y, a, x, **_: 2 * a.shape[0] * a.shape[1],
    _ATEN.addmv_: lambda y, a, x, **_: 2 * a.shape[0] * a.shape[1],
    _ATEN.dot: lambda x, y: 2 * x.shape[0],
    _ATEN.vdot: lambda x, y: 2 * x.shape[0],
    _ATEN.addbmm: lambda c, a, b, **_: 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2],
    _ATEN.addr: lambda c, x, y, **_: 2 * x.shape[0] * y.shape[0],
    **{getattr(_ATEN, f"_scaled_dot_product_{kernel}"): _attention for kernel in _ATTENTION},
    **{getattr(_ATEN, f"_scaled_dot_product_{kernel}_backward"): _attention_backward for kernel in _ATTENTION},
    _ATEN.convolution_backward: _convolution_backward,
    _ATEN._grouped_mm: _grouped_mm,
    _ATEN.mkldnn_rnn_layer: _rnn,
    _ATEN.mkldnn_rnn_layer_backward: lambda *a, **k: 2 * _rnn(*a, **k),
    _ATEN._transformer_encoder_layer_fwd: _encoder_layer,
    _ATEN._native_multi_head_attention: lambda q, k, v, *a, **_: _encoder_layer(q, *a),
}
# Names of operators that count as element-wise although torch does not tag them so (normalisation, losses, ...).
_ELEMENTWISE = re.compile(
    "norm|softmax|_loss|cross_entropy|pool|sum|mean|var|std|amax|amin|max|min|gelu|threshold|dropout|"
    "prod|logsumexp|glu|floor_divide|histc|bincount|elu|softplus|hardswish|hardtanh|upsample|col2im"
)
# Names of operators that move or create numbers without arithmetic.
_MOVES = re.compile(
    "copy|clone|cat|stack|empty|zero|ones|full|fill|arange|embedding|index|gather|scatter|pad|tril|triu|eye|"
    "scalar_tensor|lift_fresh|bernoulli|normal_|uniform_|rand|im2col|as_strided|transpose|constant|new_|sort|topk|"
    "kthvalue|where|repeat|roll|flip|detach|resize|set_|item|_local_scalar_dense|_assert|slice_backward|select_backward|masked|all|any|"
    "sparse_coo|coalesce|_indices|_values|_nnz|is_same_size|_has_same_storage_numel|_unsafe_view|unsafe_split|equal|_reshape_alias"
)


class Operation(NamedTuple):
    """What one operator adds to the counts. uncounted: its name, if neither flops nor elementwise counts it."""

    module: str
    flops: int
    is_matmul: bool
    elementwise: int
    moved: int
    uncounted: str


@dataclass
class Counts:
    """Counts of the operators that ran.

    Args:
        flops: FLOPs of matrix products (2 m n k each), convolutions, attention and recurrent layers, by the formulas
            of torch and `_FORMULAS`.
        matmuls: number of matrix products.
        elementwise: number of output elements of all other computations: one operation per element.
        moved: bytes read and written.
        drawn: number of random numbers added to weights.
        flops_by_module: flops, by module name.
        matmuls_by_module: matmuls, by module name.
        uncounted: number of calls of each computing operator that neither `flops` nor `elementwise` counts.
        work: number of operator calls for each pair (flops, bytes moved), for a roofline model.
    """

    flops: int = 0
    matmuls: int = 0
    elementwise: int = 0
    moved: int = 0
    drawn: int = 0
    flops_by_module: Counter[str] = field(default_factory=Counter)
    matmuls_by_module: Counter[str] = field(default_factory=Counter)
    uncounted: Counter[str] = field(default_factory=Counter)
    work: Counter[tuple[int, int]] = field(default_factory=Counter)

    def add(self, operation: Operation, times: int = 1) -> None:
        """Add an operator.

        Args:
            operation: what it adds.
            times: how often to add it.
        """
        module, flops, is_matmul, elementwise, moved, uncounted = operation
        if not times:
            return
        if flops:
            self.flops += times * flops
            self.flops_by_module[module] += times * flops
        if is_matmul:
            self.matmuls += times
            self.matmuls_by_module[module] += times
        if uncounted:
            self.uncounted[uncounted] += times
        self.elementwise += times * elementwise
        self.moved += times * moved
        self.work[(flops, moved)] += times

    def extrapolated(self, before: Counts, more: int) -> Counts:
        """Return these counts plus `more` times their difference from `before`."""
        result: dict[str, Any] = {}
        for each in fields(Counts):
            x, y = getattr(before, each.name), getattr(self, each.name)
            if isinstance(y, Counter):
                result[each.name] = Counter({key: y[key] + more * (y[key] - x[key]) for key in {**x, **y}})
            else:
                result[each.name] = y + more * (y - x)
        return Counts(**result)


class OpCounter(TorchDispatchMode):
    """Count every operator that runs inside `followed()`, also in forward-mode AD, vmap and recomputation.

    Operators on fake tensors count like those on real tensors.

    Args:
        model: the model whose module names appear in the counts.
        tracker: a memory tracker whose operators are counted while both are followed: faster than two modes, and
            `operations` then lists them. None: the counter sees the operators itself.
    """

    def __init__(self, model: nn.Module, tracker: MemoryTracker | None = None) -> None:
        super().__init__()
        self.counts = Counts()
        self.modules = ModuleTracker(model) if tracker is None else tracker.modules
        self.operations: list[Operation] = []
        self._tracker = tracker

    @contextmanager
    def followed(self) -> Iterator[Counts]:
        """Count inside the context; yield `counts`, which is updated at each operator."""
        with ExitStack() as stack:
            stack.enter_context(memory_events.observe(self))
            if self._tracker is None:
                stack.enter_context(self.modules.followed())
                stack.enter_context(self)
            else:
                self._tracker.on_operator = self._count
            yield self.counts

    def on_tag(self, kind: memory_events.Kind, tensor: Tensor) -> None:
        """Count the random numbers added to a weight: torch does not dispatch gradcost's noise kernels."""
        if kind == "noise":
            self.counts.drawn += memory_events.times_counted() * tensor.numel()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:
            return args[0].device
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._count(func, args, kwargs, out)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if _is_view(func) or func.namespace != "aten":
            return
        packet, flops, elementwise, uncounted = func.overloadpacket, 0, 0, ""
        if packet in _FORMULAS:
            flops = _FORMULAS[packet](*args, **kwargs)
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
        else:
            kind = _kind(func)
            elementwise = _numel(out) if kind == "elementwise" else 0
            uncounted = str(packet) if kind == "unknown" else ""
        moved = _bytes(out) + (_bytes((args[1:], out)) if packet in _GATHER else _bytes((args, kwargs)))
        operation = Operation(self.modules.here, flops, packet in _MATMULS, elementwise, moved, uncounted)
        times = memory_events.times_counted()
        self.counts.add(operation, times)
        if self._tracker is not None:
            self.operations += [operation] * times


@cache
def _is_view(func: Any) -> bool:
    """Return True if each output shares memory with an argument and no argument is changed."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


@cache
def _kind(func: Any) -> str:
    """Return "move", "elementwise" or "unknown"."""
    name = func.overloadpacket.__name__
    if _MOVES.search(name):
        return "move"
    # torch tags `add` as pointwise, but not the in-place `add_`
    out_of_place = getattr(_ATEN, name.rstrip("_"), func.overloadpacket)
    overloads = [func, *(getattr(out_of_place, overload) for overload in out_of_place.overloads())]
    if any(torch.Tag.pointwise in overload.tags for overload in overloads) or _ELEMENTWISE.search(name):
        return "elementwise"
    return "unknown"


def _numel(tree: Any) -> int:
    return sum(tensor.numel() for tensor in operands((tree,)))


def _bytes(tree: Any) -> int:
    parts = (part for tensor in operands((tree,)) for part in strided_parts(tensor))
    return sum(part.numel() * part.element_size() for part in parts)
