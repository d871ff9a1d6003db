"""A snapshot of everything that an estimate may change and must restore, compared bit for bit.

It overlaps with `gradcost.checks.model_state` on purpose: it is an independent oracle. It shares no code with the
library, so a kind of state that `model_state` forgets still fails law 5.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_globals
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def bits(tensor: Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return all state by name. Two equal snapshots mean that nothing was disturbed."""
    seen: dict[str, Any] = dict(_surroundings())
    for path, module in model.named_modules():
        at = path or "(model)"
        seen[f"{at}: attributes"] = list(vars(module))  # a replaced `forward` would stay here
        for name, attribute in vars(module).items():
            if name not in _REGISTRIES:
                seen[f"{at}.{name}: value"] = _value(attribute)
        seen[f"{at}: training"] = module.training
        for kind in ("_parameters", "_buffers"):
            # The dictionary itself, its order, and the identity of what it holds.
            held = getattr(module, kind)
            seen[f"{at}: {kind}"] = id(held), [(name, id(tensor)) for name, tensor in held.items()]
        for name, hooks in vars(module).items():
            if "hooks" in name:
                seen[f"{at}: {name}"] = list(hooks.items()) if isinstance(hooks, dict) else hooks
        for name, buffer in module._buffers.items():
            seen[f"{at}.{name}: bits"] = bits(buffer)
    for name, parameter in model.named_parameters():
        seen[f"{name}: bits"] = bits(parameter), parameter.data_ptr(), parameter.dtype, parameter.shape
        seen[f"{name}: requires_grad"] = parameter.requires_grad
        seen[f"{name}: grad"] = id(parameter.grad), bits(parameter.grad)
        seen[f"{name}: hooks"] = _hooks(parameter)
        seen[f"{name}: attributes"] = dict(vars(parameter))
    return seen


_REGISTRIES = {"_parameters", "_buffers", "_modules"}


def _value(held: Any) -> Any:
    """What a plain attribute holds: bits of tensors, entries of containers, the identity of other objects."""
    if isinstance(held, Tensor):
        return id(held), bits(held)
    if isinstance(held, dict):
        return id(held), [(key, _value(entry)) for key, entry in held.items()]
    if isinstance(held, set):
        return id(held), frozenset(held)
    if isinstance(held, list | tuple):
        return id(held), [_value(entry) for entry in held]
    return held if isinstance(held, int | float | str | None) else id(held)


def _hooks(parameter: nn.Parameter) -> tuple[int, ...]:
    found = parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None)
    return tuple(0 if hooks is None else len(hooks) for hooks in found)


def _surroundings() -> dict[str, Any]:
    """The state of the process: generators, modes and switches."""
    kind, keys, position, has_gauss, cached = np.random.get_state()  # type: ignore[misc]
    return {
        "torch generator": bits(torch.get_rng_state()),
        "python generator": random.getstate(),
        "numpy generator": (kind, keys.tobytes(), position, has_gauss, cached),  # type: ignore[union-attr]
        "gradients on": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "default type": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "attention kernels": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "dual level": forward_ad._current_level,
        "forward mode on": torch._C._is_fwd_grad_enabled(),
        "torch functions": torch._C._is_torch_function_enabled(),  # type: ignore[attr-defined]
        "function modes": len(_get_current_function_mode_stack()),
        "dispatch modes": len(_get_current_dispatch_mode_stack()),
        "functorch level": torch._C._functorch.maybe_current_level(),  # type: ignore[attr-defined]
        "saved tensor hooks": torch._C._autograd._top_saved_tensors_default_hooks(False) is not None,  # type: ignore[attr-defined]
        "hooks of all modules": tuple(
            len(hooks)
            for name, hooks in sorted(vars(module_globals).items())
            if name.startswith("_global_") and "hooks" in name
        ),
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of what differs between two snapshots."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
