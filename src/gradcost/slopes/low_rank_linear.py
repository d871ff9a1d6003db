"""Forward-mode rule for linear layers along a low-rank direction.

A weight W of shape (m, n) has the tangent dW = left' right / sqrt(rank), with left of shape (rank, m) and right of
shape (rank, n). For an input x, it adds x dW' = (x right') left / sqrt(rank) to the output's tangent. The matrix dW
is never formed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradcost.core.gradient_mode import in_constant_part
from gradcost.core.objective import Leaf, Objective
from gradcost.directions.low_rank import Factors


def only_linear_reads(module: nn.Module, name: str) -> bool:
    """Return True if the module reads this parameter only as the weight of F.linear.

    This is certain only for the weight of `nn.Linear` itself, without subclass or replaced `forward`.
    """
    return type(module) is nn.Linear and name == "weight" and "forward" not in vars(module)


def _is_real_matrix(parameter: Tensor) -> bool:
    return parameter.ndim == 2 and not parameter.is_complex()


class LowRankLinearMode(TorchFunctionMode):
    """Inside this mode, F.linear with a leaf as its weight returns a dual tensor.

    The tangent is the sum of two parts: x dW', computed from the factors, and the tangent of F.linear with a constant
    weight, from the tangents of input and bias.

    Cost of x dW' for an m x n weight: the fraction rank (m + n) / (m n) of the layer's forward matmul.
    """

    def __init__(
        self,
        objective: Objective,
        factors: Callable[[Leaf], Factors],
        with_tangent: Callable[[str, Tensor, Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.leaves = {id(leaf.parameter): leaf for leaf in objective.leaves if _is_real_matrix(leaf.parameter)}
        self.factors, self.with_tangent = factors, with_tangent

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self._linear if func is F.linear else func)(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        leaf = self.leaves.get(id(weight))
        if leaf is None or in_constant_part():
            return F.linear(input, weight, bias)
        with torch._C.DisableTorchFunction():  # the enclosing substitution mode would replace the leaf
            constant_weight, (left, right) = leaf.parameter.detach(), self.factors(leaf)
        out, tangent = forward_ad.unpack_dual(F.linear(input, constant_weight, bias))
        projected_input = forward_ad.unpack_dual(input).primal @ right.mT * len(left) ** -0.5
        weight_part = projected_input @ left
        return self.with_tangent(leaf.name, out, weight_part if tangent is None else tangent.add_(weight_part))
