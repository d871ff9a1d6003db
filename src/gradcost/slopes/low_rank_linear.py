"""Forward-mode rule for linear layers along a low-rank direction.

For dW = left' right / sqrt(rank) the tangent x dW' is (x right') left / sqrt(rank). The matrix dW is never formed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradcost.core.objective import Leaf, Objective
from gradcost.directions.low_rank import Factors


def only_linear_reads(module: nn.Module, name: str) -> bool:
    """Return True if the module's only use of this parameter is as the weight of F.linear.

    That is known of `nn.Linear` itself. A subclass, or a forward replaced on the instance, may do anything.
    """
    return type(module) is nn.Linear and name == "weight" and "forward" not in vars(module)


class LowRankLinearMode(TorchFunctionMode):
    """Inside this mode, F.linear with a leaf as its weight returns a dual tensor.

    Its tangent is the one along the leaf's factors plus the one of the input and the bias. The mode calls F.linear
    on the weight without a tangent for the latter.

    Law: beyond the forward pass, and the input's tangent where it has one, an m x n weight costs
    rank (m + n) / (m n) of its matmul.
    """

    def __init__(
        self,
        objective: Objective,
        factors: Callable[[Leaf], Factors],
        with_tangent: Callable[[str, Tensor, Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.leaves = {id(leaf.parameter): leaf for leaf in objective.leaves if leaf.parameter.ndim == 2}
        self.factors, self.with_tangent = factors, with_tangent

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self._linear if func is F.linear else func)(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        leaf = self.leaves.get(id(weight))
        if leaf is None:
            return F.linear(input, weight, bias)
        with torch._C.DisableTorchFunction():  # the outer substitution mode would replace the leaf
            bare, (left, right) = leaf.parameter.detach(), self.factors(leaf)
        out, tangent = forward_ad.unpack_dual(F.linear(input, bare, bias))
        narrow = forward_ad.unpack_dual(input).primal @ right.mT * len(left) ** -0.5
        along = narrow @ left
        return self.with_tangent(leaf.name, out, along if tangent is None else tangent.add_(along))
