"""An independent oracle for FLOPs: it shares no code with `gradcost.instruments.flops.OpCounter`."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


class Flops(TorchDispatchMode):
    """Adds up the FLOPs of every operation that torch has a formula for, and of in-place `addmm_`, which it lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        formula = flop_registry.get(aten.addmm if packet is aten.addmm_ else packet)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out
