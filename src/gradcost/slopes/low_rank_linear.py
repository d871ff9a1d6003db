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

from gradcost.core.evaluation.gradient_mode import in_constant_part
from gradcost.core.objective import Leaf, Objective
from gradcost.directions.low_rank import Factors
from gradcost.slopes.duals import apart, ordinary, rows_of, with_directions, with_tangent


def only_linear_reads(module: nn.Module, name: str) -> bool:
    """Return True if the module reads this parameter only as the weight of F.linear.

    This is certain only for the weight of `nn.Linear` itself, without subclass or replaced `forward`.
    """
    return type(module) is nn.Linear and name == "weight" and "forward" not in vars(module)


def _has_real_factors(parameter: Tensor) -> bool:
    return parameter.ndim == 2 and parameter.numel() > 0 and not parameter.is_complex()


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
        level: int | None,
    ) -> None:
        super().__init__()
        self.leaves = {id(leaf.parameter): leaf for leaf in objective.leaves if _has_real_factors(leaf.parameter)}
        self.factors, self.level = factors, level

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self._linear if func is F.linear else func)(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        leaf = self.leaves.get(id(weight))
        if leaf is None or in_constant_part():
            return F.linear(input, weight, bias)
        with torch._C.DisableTorchFunction():  # the enclosing substitution mode would replace the leaf
            constant_weight = leaf.parameter.detach()
        out = F.linear(input, constant_weight, bias)
        with torch._C.DisableTorchFunction():
            with ordinary():
                factors = self.factors(leaf)
            return self._with_weight_part(leaf.name, factors, input, out)

    def _with_weight_part(self, name: str, factors: Factors, input: Tensor, out: Tensor) -> Tensor:
        """Return `out` with x dW' added to its tangent. The tangent is fresh, so it is changed in place."""
        given, result = apart(input), apart(out)
        if given is None or result is None:  # autocast
            left, right = (with_directions(stack, self.level) for stack in factors)
            primal, tangent = forward_ad.unpack_dual(out)
            weight_part = (forward_ad.unpack_dual(input).primal @ right.mT * len(left) ** -0.5) @ left
            return with_tangent(name, primal, weight_part if tangent is None else tangent.add_(weight_part))
        (x,), (y,) = given.duals, result.duals
        assert x is not None
        assert y is not None
        with ordinary():
            left, right = factors
            directions, rank, outputs = left.shape
            rows = rows_of(x.primal)
            projected = (rows @ rows_of(right).t()).mul_(rank**-0.5)
            tangents = y.primal.new_empty((directions, *y.primal.shape)) if y.tangents is None else y.tangents
            for number, target in enumerate(tangents.view(directions, len(rows), outputs)):
                part = projected[:, number * rank : (number + 1) * rank]
                if y.tangents is None:
                    torch.mm(part, left[number], out=target)
                else:
                    torch.addmm(target, part, left[number], out=target)
        return with_tangent(name, y.primal, with_directions(tangents, self.level))
