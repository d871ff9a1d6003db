"""Refuse functions that drop the tangents of their inputs without an error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.utils import _pytree as pytree

from gradcost.core.errors import Unsupported
from gradcost.core.evaluation.gradient_mode import in_constant_part
from gradcost.slopes.rules import OPERATORS, Rule

_OWN = ("aten", "prim", "prims")  # namespaces of torch's operators, whose forward-mode rules raise if there is none


def rules() -> dict[Any, Rule]:
    """Return rules for `substituted` that raise Unsupported where a tangent would be lost."""
    level = functorch.maybe_current_level()
    operator = functools.partial(_operator, level)
    products = {
        function: functools.partial(_scatter_reduce, function, level)
        for function in (torch.scatter_reduce, Tensor.scatter_reduce, Tensor.scatter_reduce_)
    }
    return {OPERATORS: operator} | products


def _operator(level: int | None, operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Call an operator. One of torch.library, and torch.cond, run below autograd if no input requires a gradient."""
    result = operator(*args, **kwargs)
    if str(operator).split(".")[0] in _OWN:
        return result
    outputs = [output for output in pytree.tree_leaves(result) if isinstance(output, Tensor)]
    if outputs and not any(output.is_floating_point() or output.is_complex() for output in outputs):
        return result
    has_functions = isinstance(operator, torch._ops.HigherOrderOperator)  # which may read weights
    has_tangents = _have_tangents((args, kwargs), level) or (has_functions and not in_constant_part())
    is_inside = functorch.maybe_current_level() != level
    if has_tangents and (is_inside or not _have_tangents(outputs, level)):
        raise Unsupported(_message(str(operator)))
    return result


def _scatter_reduce(
    function: Callable[..., Tensor],
    level: int | None,
    input: Tensor,
    dim: Any,
    index: Any,
    src: Any,
    reduce: str,
    **options: Any,
) -> Tensor:
    """Call scatter_reduce. PyTorch's forward-mode rule for products returns no tangent."""
    if reduce == "prod" and _have_tangents((input, src), level):
        raise Unsupported(_message('scatter_reduce with reduce="prod"'))
    return function(input, dim, index, src, reduce, **options)


def _have_tangents(tree: Any, level: int | None) -> bool:
    """Return whether a tensor has a tangent. True for inputs inside a transform of the loss, which hides tangents."""
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    if functorch.maybe_current_level() != level:
        return any(functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _message(name: str) -> str:
    return (
        f"{name} has no forward-mode rule, and the tangents of its inputs would be lost. Use torch's own operations, "
        "or mezo(), which needs no derivative, or backprop()."
    )
