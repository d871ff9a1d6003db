"""Capture all state that an estimate must leave unchanged or restore, and compare it bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from random import getstate  # read here, never set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradcost.core import pytree
from gradcost.core.bits import raw_bytes
from gradcost.core.evaluation.generator_states import numpy_state
from gradcost.core.isolation import restored_generators
from gradcost.core.objective import Objective

ModelState = dict[str, Any]


class _ForwardStopped(Exception):
    """The exception that `disturbed_by_raising` raises inside the model."""


def capture(objective: Objective, batch: Any = None) -> ModelState:
    """Return the state of a model and a batch, and the global state of torch, NumPy and Python, by name.

    - Parameters, buffers, `.grad` and tensors of the batch: identity and a hash of the bits, so nothing is copied.
    - Modules: flags, hooks, attributes.
    - Global state: generators (torch's on the CPU and on the model's devices, NumPy's and Python's), and switches
      such as autocast.
    """
    state = _global_state(objective)
    for number, leaf in enumerate(pytree.leaves(batch)):
        state[f"batch, entry {number}"] = id(leaf), _content(leaf)
    for path, module in objective.model.named_modules():
        name = path or "(model)"
        # The names detect a replaced `forward` that was not restored.
        state[f"{name}: attributes"] = [(attribute, _content(value)) for attribute, value in vars(module).items()]
        state[f"{name}: training"] = module.training
        for kind in ("_parameters", "_buffers"):
            tensors = getattr(module, kind)
            state[f"{name}: {kind[1:]}"] = id(tensors), [(key, id(tensor)) for key, tensor in tensors.items()]
        for attribute, hooks in vars(module).items():
            if attribute.endswith("hooks") and isinstance(hooks, dict):
                state[f"{name}: {attribute[1:]}"] = list(hooks.items())
    for name, buffer in objective.model.named_buffers():
        state[f"{name}: bits"] = _bits(buffer)
    for name, parameter in objective.model.named_parameters():
        state[f"{name}: bits"] = _bits(parameter), parameter.data_ptr(), parameter.dtype, parameter.shape
        state[f"{name}: requires_grad"] = parameter.requires_grad
        state[f"{name}: grad"] = id(parameter.grad), _bits(parameter.grad)
    return state


def diff(before: ModelState, after: ModelState) -> list[str]:
    """Return the names of the entries that differ."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def disturbed_by(objective: Objective, work: Callable[[], object], batch: Any = None) -> list[str]:
    """Return the names of the state that `work` changes and does not restore."""
    before = capture(objective, batch)
    work()
    return diff(before, capture(objective, batch))


def disturbed_by_raising(objective: Objective, work: Callable[[], object], batch: Any = None) -> list[str]:
    """As `disturbed_by`, but the model raises at the end of its forward pass, as an out-of-memory error would."""

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _ForwardStopped

    before = capture(objective, batch)
    handle = objective.model.register_forward_hook(stop)
    try:
        with suppress(_ForwardStopped):
            work()
    finally:
        handle.remove()
    return diff(before, capture(objective, batch))


def _content(value: Any) -> Any:
    """Return what identifies the content of a tensor, an array or a simple value; None for other objects."""
    if isinstance(value, Tensor):
        return _bits(value)
    if isinstance(value, np.ndarray):
        return value.tobytes() if value.dtype != object else value.tolist()
    return value if isinstance(value, int | float | str | bytes) else None


def _bits(tensor: Tensor | None) -> bytes | None:
    if tensor is None:
        return None
    if tensor.is_sparse:
        return b"".join(filter(None, map(_bits, (tensor._indices(), tensor._values()))))
    return blake2b(raw_bytes(tensor), digest_size=16).digest()


def _global_state(objective: Objective) -> ModelState:
    with restored_generators(objective.devices) as generators:
        states = [_bits(generator.get_state()) for generator in generators]
    return {
        "torch's generators": states,
        "Python's generator": getstate(),
        "NumPy's generator": numpy_state(),
        "gradients on": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default type": torch.get_default_dtype(),
        "forward mode on": torch._C._is_fwd_grad_enabled(),
        "attention kernels": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
    }
