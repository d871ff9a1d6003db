"""Forward-mode rules of torch functions: the tangent of the output, in fewer passes than PyTorch's rules.

PyTorch's rules multiply zeros for a missing tangent, build a tangent from several element-wise operations, and under
`torch.func.vmap` often expand the primal to all directions. The Jacobians of softmax and of a normalisation without
weights are symmetric, so the kernel of their backward pass computes the tangent in one pass.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]

from gradcost.core.evaluation.embeddings import LOOKUPS, EmbeddingCall
from gradcost.core.notes import Note
from gradcost.slopes import attention
from gradcost.slopes.duals import Dual, apart, ordinary, rows_of
from gradcost.slopes.rules import RULES

_ATEN = torch.ops.aten


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return F.linear of dual tensors. A missing tangent costs no matrix product."""
    parts = apart(input, weight, bias) if weight.ndim == 2 else None
    if parts is None:
        return _linear_of_tensors(input, weight, bias)
    if parts.directions == 0:
        return F.linear(input, weight, bias)
    x, w, b = parts.duals
    assert x is not None
    assert w is not None
    with ordinary():
        out = F.linear(x.primal, w.primal, None if b is None else b.primal)
        tangents = _of_linear(x, w, None if b is None else b.tangents, out.new_empty((parts.directions, *out.shape)))
    return parts.joined(out, tangents)


def _of_linear(x: Dual, w: Dual, along_bias: Tensor | None, out: Tensor) -> Tensor:
    """Fill `out`, shape (directions, ..., outputs), with dx W' + x dW' + db. Each product adds to what is there."""
    rows, flat = rows_of(x.primal), rows_of(out)
    by_direction = out.view(len(out), len(rows), out.shape[-1])
    is_empty = True
    if w.tangents is not None:
        for number, moved in enumerate(w.tangents):
            target = by_direction[number]
            if along_bias is None:
                torch.mm(rows, moved.t(), out=target)
            else:
                torch.addmm(along_bias[number], rows, moved.t(), out=target)
        is_empty = False
    elif along_bias is not None:
        by_direction.copy_(along_bias.unsqueeze(1))
        is_empty = False
    if x.tangents is not None:
        moved_rows = rows_of(x.tangents)
        if is_empty:
            torch.mm(moved_rows, w.primal.t(), out=flat)
        else:
            torch.addmm(flat, moved_rows, w.primal.t(), out=flat)
    return out


def _linear_of_tensors(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return F.linear of dual tensors by operations on whole tensors, as autocast and transforms need.

    A loss that calls autograd needs PyTorch's rule, which saves the weight with its tangent for a backward pass.
    """
    if torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad):
        return F.linear(input, weight, bias)
    x, dx = forward_ad.unpack_dual(input)
    w, dw = forward_ad.unpack_dual(weight)
    b, db = (None, None) if bias is None else forward_ad.unpack_dual(bias)
    out = F.linear(x, w, b)
    tangent = None if dw is None else F.linear(x, dw, db)
    if dx is not None:
        along_input = F.linear(dx, w, db if dw is None else None)
        tangent = along_input if tangent is None else tangent.add_(along_input)
    elif tangent is None and db is not None:
        tangent = db.expand(out.shape).clone()
    return out if tangent is None else forward_ad.make_dual(out, tangent)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Return F.layer_norm of dual tensors: with the normalised input n, dy = w J dx + n dw + db.

    J, the Jacobian of n, is symmetric: the backward kernel without weights computes J dx.
    """
    parts = apart(input, weight, bias)
    if parts is None:
        return _normalizing(F.layer_norm)(input, normalized_shape, weight, bias, eps)
    if parts.directions == 0:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    x, w, b = parts.duals
    assert x is not None
    shape = list(normalized_shape)
    with ordinary():
        scale, shift = (None if dual is None else dual.primal for dual in (w, b))
        out, mean, rstd = torch.native_layer_norm(x.primal, shape, scale, shift, eps)
        tangents = out.new_empty((parts.directions, *out.shape))
        along_scale = None if w is None else w.tangents
        normalized = None if along_scale is None else F.layer_norm(x.primal, shape, eps=eps)
        for number, tangent in enumerate(tangents):
            if x.tangents is None:
                tangent.zero_()
            else:
                arguments = x.tangents[number], x.primal, shape, mean, rstd, None, None, [True, False, False]
                moved = _ATEN.native_layer_norm_backward(*arguments)[0]
                tangent.copy_(moved) if scale is None else torch.mul(moved, scale, out=tangent)
                del moved
            if along_scale is not None and normalized is not None:
                tangent.addcmul_(normalized, along_scale[number])
            if b is not None and b.tangents is not None:
                tangent.add_(b.tangents[number])
    return parts.joined(out, tangents)


def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """Return F.softmax of dual tensors. Its Jacobian is symmetric: the backward kernel computes the tangent."""
    parts = apart(input) if dim is not None and dtype in (None, input.dtype) else None
    if parts is None or parts.directions == 0:
        return F.softmax(input, dim, _stacklevel, dtype)
    x = parts.duals[0]
    assert dim is not None
    assert x is not None
    assert x.tangents is not None
    with ordinary():
        out = F.softmax(x.primal, dim)
        tangents = torch.stack([_ATEN._softmax_backward_data(moved, out, dim, out.dtype) for moved in x.tangents])
    return parts.joined(out, tangents)


def _elementwise(function: Callable[..., Tensor], backward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the rule of an element-wise function. Its derivative is computed once for all directions.

    backward: (gradient, input, options of the function) -> gradient times derivative.
    """

    @functools.wraps(function)
    def rule(input: Tensor, *args: Any, **options: Any) -> Tensor:
        parts = None if args or options.pop("inplace", False) else apart(input)
        if parts is None or parts.directions == 0:
            return function(input, *args, **options)
        x = parts.duals[0]
        assert x is not None
        assert x.tangents is not None
        with ordinary():
            out = function(x.primal, **options)
            if parts.directions == 1:
                tangents = backward(x.tangents[0], x.primal, **options).unsqueeze(0)
            else:
                tangents = x.tangents * backward(torch.ones_like(x.primal), x.primal, **options)
        return parts.joined(out, tangents)

    return rule


def _normalizing(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a normalisation: if one argument has a tangent, the others get zero tangents.

    For a missing tangent (a frozen weight) PyTorch's rule would insert zero tensors without storage, which fake
    tensors do not support.
    """

    def rule(*args: Any, **kwargs: Any) -> Tensor:
        def is_dual(argument: Any) -> bool:
            return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None

        def with_zero_tangent(argument: Any) -> Any:
            missing = isinstance(argument, Tensor) and argument.is_floating_point() and not is_dual(argument)
            return forward_ad.make_dual(argument, torch.zeros_like(argument)) if missing else argument

        if not any(map(is_dual, (*args, *kwargs.values()))):
            return function(*args, **kwargs)
        duals = {name: with_zero_tangent(argument) for name, argument in kwargs.items()}
        return function(*map(with_zero_tangent, args), **duals)

    return rule


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    out = attention.attention(*args, **kwargs)
    if out is None:
        out = F.scaled_dot_product_attention(*args, **kwargs)
        note_math_attention()
    return out


@functools.cache
def note_math_attention() -> None:
    warnings.warn(
        "attention with dropout or under autocast runs on the math kernel for a Jvp slope, in memory that is "
        "quadratic in the length.",
        Note,
        stacklevel=2,
    )


def _batch_norm(input: Tensor, running_mean: Any, running_var: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Apply batch norm. In training mode, omit the running statistics, which functorch cannot write.

    Training mode does not read them, and an evaluation discards its copies of the buffers.
    """
    training = args[2] if len(args) > 2 else kwargs.get("training", False)
    statistics = (None, None) if training else (running_mean, running_var)
    return F.batch_norm(input, *statistics, *args, **kwargs)


def _dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, train: bool = True
) -> Tensor:
    """Apply dropout with the mask of plain evaluations. functorch would draw it in another memory order."""
    if not (training and train) or p == 0:  # `train` is torch.dropout's name for F.dropout's `training`
        return input
    mask = _mask(input, p)
    mask = mask if p == 1 else mask.div_(1 - p)
    return input.mul_(mask) if inplace else input * mask


def _alpha_dropout(input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:
    """Apply alpha dropout with the mask of plain evaluations and the arithmetic of torch."""
    if not training or p == 0:
        return input
    if p == 1:
        return input.mul_(0) if inplace else input * 0
    mask, alpha = _mask(input, p), 1.7580993408473766  # the scale of SELU times its alpha
    scale = 1 / math.sqrt((alpha * alpha * p + 1) * (1 - p))
    shift = mask.add(-1).mul_(alpha * scale).add_(alpha * scale * p)
    mask.mul_(scale)
    return (input.mul_(mask) if inplace else input * mask).add_(shift)


def _mask(input: Tensor, p: float) -> Tensor:
    """Return 0 with probability p and 1 otherwise, drawn in the memory order of the ordinary tensor."""
    while functorch.is_functorch_wrapped_tensor(input):
        input = functorch.get_unwrapped(input)
    return torch.empty_like(input).bernoulli_(1 - p)


def _in_place(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda input, p, train: rule(input, p, train, True)


def _with_constant_padding(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the rule of an embedding. The padding row of its weight has no tangent, as it gets no gradient."""

    def rule(*args: Any, **kwargs: Any) -> Tensor:
        out, call = RULES[function](*args, **kwargs), EmbeddingCall.of(function, args, kwargs)
        if call.padding is None:
            return out
        weight = forward_ad.unpack_dual(call.weight)
        return out if weight.tangent is None else call.padded(out, weight.primal)

    return rule


# Rules that take dual tensors apart.
OF_DUALS: dict[Any, Callable[..., Tensor]] = {
    F.linear: linear,
    F.layer_norm: layer_norm,
    F.group_norm: _normalizing(F.group_norm),
    F.scaled_dot_product_attention: _attention,
    F.softmax: softmax,
    F.gelu: _elementwise(F.gelu, _ATEN.gelu_backward),
    F.silu: _elementwise(F.silu, _ATEN.silu_backward),
} | {function: _with_constant_padding(function) for function in LOOKUPS}
# Rules of functions that functorch computes in another way than plain torch.
IN_TRANSFORM: dict[Any, Callable[..., Tensor]] = {
    F.batch_norm: _batch_norm,
    F.dropout: _dropout,
    torch.dropout: _dropout,
    torch.dropout_: _in_place(_dropout),
    F.alpha_dropout: _alpha_dropout,
    torch.alpha_dropout: lambda input, p, train: _alpha_dropout(input, p, train),
    torch.alpha_dropout_: _in_place(_alpha_dropout),
}


def at_this_level() -> dict[Any, Callable[..., Tensor]]:
    """Return `OF_DUALS` for the current functorch level.

    A transform that the loss itself applies is another level. There the tensors are wrapped once more, and PyTorch's
    own rules run.
    """
    level = functorch.maybe_current_level()

    def rule_or_function(function: Any, rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def chosen(*args: Any, **kwargs: Any) -> Tensor:
            return (rule if functorch.maybe_current_level() == level else function)(*args, **kwargs)

        return chosen

    return {function: rule_or_function(function, rule) for function, rule in OF_DUALS.items()}
