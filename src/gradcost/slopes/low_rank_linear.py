"""Linear layers whose weight moves along a matrix of low rank: x dW' is (x B) A' / sqrt(rank), and dW never made."""

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


def passes_its_weight_on(module: nn.Module, name: str) -> bool:
    """Whether a module does nothing with this parameter but give it to F.linear, which `Products` then sees.

    So it is of `nn.Linear` itself: a class that inherits from it, or a forward that was put in the place of its own,
    may do anything.
    """
    return type(module) is nn.Linear and name == "weight" and "forward" not in vars(module)


class Products(TorchFunctionMode):
    """Within, an F.linear whose weight is a leaf, as it stands, gives a dual: the tangent along the leaf's factors is
    added to that of the input and of the bias. It calls F.linear on the bare weight for those.

    Law: beside the forward, and the input's tangent where it has one, it costs rank (m + n) / (m n) of a matmul with
    an m x n weight.
    """

    def __init__(
        self,
        objective: Objective,
        factors: Callable[[Leaf], Factors],
        carrying: Callable[[str, Tensor, Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.leaves = {id(leaf.parameter): leaf for leaf in objective.leaves if leaf.parameter.ndim == 2}
        self.factors, self.carrying = factors, carrying

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self._linear if func is F.linear else func)(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        leaf = self.leaves.get(id(weight))
        if leaf is None:
            return F.linear(input, weight, bias)
        with torch._C.DisableTorchFunction():  # the nets around this one would read the leaf as its substitute
            bare, (left, right) = leaf.parameter.detach(), self.factors(leaf)
        out, tangent = forward_ad.unpack_dual(F.linear(input, bare, bias))
        narrow = forward_ad.unpack_dual(input).primal @ right.mT * len(left) ** -0.5
        along = narrow @ left
        return self.carrying(leaf.name, out, along if tangent is None else tangent.add_(along))
