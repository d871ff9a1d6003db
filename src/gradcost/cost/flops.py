"""Arithmetic: the FLOPs of matrix products and convolutions, counted as torch dispatches them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, mm_flop

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm, _ATEN.addmm, _ATEN.addmm_, _ATEN.bmm, _ATEN.baddbmm, _ATEN.baddbmm_}


class CountedFlops(TorchDispatchMode):
    """Within, `flops` sums torch's own formulas (2 m n k a product), and `matmuls` counts the products.

    Torch's registry misses the in-place `addmm_`; element-wise work is not counted. Counts whatever runs:
    forward-mode tangents, vmapped products and what checkpointing computes again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.matmuls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        self.matmuls += packet in _PRODUCTS
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet is _ATEN.addmm_:
            self.flops += mm_flop(args[1].shape, args[2].shape)
        return out
