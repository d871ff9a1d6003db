"""Recognise compiled code: it ignores the weights and functions that gradcost replaces during an evaluation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


def compiled_message(objective: Any) -> str | None:
    """Return why compiled code with trainable parameters is unsupported and what to use instead, or None."""
    leaves = {id(leaf.parameter) for leaf in objective.leaves}
    if is_compiled_function(objective.loss):
        return (
            "the loss function is compiled, and compiled code does not see substituted weights. Pass the function "
            "that was compiled, or use backprop()."
        )
    for name, module in objective.model.named_modules():
        if is_compiled(module) and any(id(p) in leaves for p in module.parameters()):
            return (
                f"`{name or type(module).__name__}` is compiled, and compiled code does not see substituted "
                "weights. Pass the module before it is compiled (module._orig_mod for torch.compile(module)), or use "
                "backprop()."
            )
    return None


@contextmanager
def eagerly() -> Iterator[None]:
    """Inside the context, functions that torch.compile made run uncompiled.

    Compiled code drops the tangents of its inputs without an error, and keeps replaced weights of earlier calls.
    """
    if "torch._dynamo" in sys.modules:  # otherwise torch.compile has made no function
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
