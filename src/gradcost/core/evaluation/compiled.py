"""Recognise compiled code: it ignores the weights and functions that gradcost replaces during an evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Return whether torch.compile or TorchScript compiled this module or its forward."""
    return (
        module._compiled_call_impl is not None
        or type(module).__name__ == "OptimizedModule"
        or isinstance(module, torch.jit.ScriptModule)
        or is_compiled_function(module.__dict__.get("forward"))
    )


def is_compiled_function(function: Any) -> bool:
    """Return whether torch.compile made this function or a function that it wraps."""
    while function is not None:
        if getattr(function, "_torchdynamo_orig_callable", None) is not None:
            return True
        function = getattr(function, "__wrapped__", None)
    return False
