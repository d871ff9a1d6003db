"""A picture of all that an estimate may touch and must put back, to compare bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from random import getstate  # read here, never set
from typing import Any

import torch
from torch import Tensor, nn

from gradcost.core.isolation import restored_generators
from gradcost.core.objective import Objective

Picture = dict[str, Any]


class _Stop(Exception):
    """What the model is made to raise."""


def capture(objective: Objective) -> Picture:
    """Everything, by name; equal pictures mean that nothing was disturbed.

    Parameters, buffers and `.grad` by identity and by a hash of their bits, so it needs no copy of the model;
    flags, hooks, attributes, generators (torch's, on the CPU and the model's devices, and Python's), switches.
    """
    seen = _surroundings(objective)
    for path, module in objective.model.named_modules():
        at = path or "(model)"
        seen[f"{at}: attributes"] = list(vars(module))  # a replaced `forward` would stay here
        seen[f"{at}: training"] = module.training
        for kind in ("_parameters", "_buffers"):
            held = getattr(module, kind)
            seen[f"{at}: {kind[1:]}"] = id(held), [(name, id(tensor)) for name, tensor in held.items()]
        for name, hooks in vars(module).items():
            if name.endswith("hooks") and isinstance(hooks, dict):
                seen[f"{at}: {name[1:]}"] = list(hooks.items())
    for name, buffer in objective.model.named_buffers():
        seen[f"{name}: bits"] = _bits(buffer)
    for name, parameter in objective.model.named_parameters():
        seen[f"{name}: bits"] = _bits(parameter), parameter.data_ptr(), parameter.dtype, parameter.shape
        seen[f"{name}: requires_grad"] = parameter.requires_grad
        seen[f"{name}: grad"] = id(parameter.grad), _bits(parameter.grad)
    return seen


def diff(before: Picture, after: Picture) -> list[str]:
    """The names of what differs between two pictures."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def disturbed_by(objective: Objective, work: Callable[[], object]) -> list[str]:
    """The names of what `work` leaves otherwise than it found it."""
    before = capture(objective)
    work()
    return diff(before, capture(objective))


def disturbed_by_raising(objective: Objective, work: Callable[[], object]) -> list[str]:
    """As `disturbed_by`, where the model raises at the end of its forward, as one without memory would."""

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Stop

    before = capture(objective)
    handle = objective.model.register_forward_hook(stop)
    try:
        with suppress(_Stop):
            work()
    finally:
        handle.remove()
    return diff(before, capture(objective))


def _bits(tensor: Tensor | None) -> bytes | None:
    if tensor is None:
        return None
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
    return blake2b(flat.numpy().tobytes(), digest_size=16).digest()


def _surroundings(objective: Objective) -> Picture:
    with restored_generators(objective.devices) as generators:
        states = [_bits(generator.get_state()) for generator in generators]
    return {
        "torch's generators": states,
        "Python's generator": getstate(),
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
