"""Read torch's modes of this thread in about 1 us, and restore them after an exception left some of them active."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._functorch.eager_transforms as transforms
import torch.autograd.forward_ad as forward_ad
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _python_dispatch as python_dispatch

_c: Any = torch._C
_autograd = _c._autograd
# Keys that `_DisableTorchDispatch` and `_DisableFuncTorch` exclude.
_EXCLUDABLE = [_c.DispatchKey.Python, _c.DispatchKey.PreDispatch, _c.DispatchKey.PythonTLSSnapshot]
_EXCLUDABLE += [_c.DispatchKey.FuncTorchDynamicLayerFrontMode, _c.DispatchKey.FuncTorchDynamicLayerBackMode]


class Modes(NamedTuple):
    """Torch's modes of this thread. The first 11 fields are the results of `_READERS`, in this order.

    overridable, is_disabled: whether `__torch_function__` is enabled; whether it is disabled for function modes too.
    is_excluded: whether the dispatch key Python is excluded. saved: the hooks of saved tensors.
    flash, mem_efficient, math, cudnn, overrideable: whether each kernel of attention is enabled.
    """

    grad: bool
    overridable: bool
    is_disabled: bool
    is_excluded: bool
    forward: bool
    saved: Any
    flash: bool
    mem_efficient: bool
    math: bool
    cudnn: bool
    overrideable: bool
    dual_level: int
    nesting: int
    functions: list[Any]
    dispatch: list[Any]
    level: int
    autocast: tuple[Any, ...] | None

    def restore(self) -> None:
        """Set the modes of this thread to these values."""
        if functorch.maybe_current_level() is not None and functorch.get_dynamic_layer_stack_depth() > self.level:
            functorch.pop_dynamic_layer_stack_and_undo_to_depth(self.level)
        transforms.JVP_NESTING = self.nesting
        if self.dual_level < 0:
            with contextlib.suppress(RuntimeError):  # no level was entered
                _c._exit_dual_level(level=0)
        forward_ad._current_level = self.dual_level
        _c._set_fwd_grad_enabled(self.forward)
        _restore_stack(
            self.functions,
            _c._len_torch_function_stack,
            _c._pop_torch_function_stack,
            _c._push_on_torch_function_stack,
        )
        _restore_stack(
            self.dispatch,
            _c._len_torch_dispatch_stack,
            lambda: _c._pop_torch_dispatch_stack(None),
            _c._push_on_torch_dispatch_stack,
        )
        if not self.dispatch:
            _clear_dispatch_flags()
        while not _same_hooks(_autograd._top_saved_tensors_default_hooks(True), self.saved):
            _autograd._pop_saved_tensors_default_hooks()
        for kernel in ("flash", "mem_efficient", "math", "cudnn", "overrideable"):
            getattr(_c, f"_set_sdp_use_{kernel}")(getattr(self, kernel))
        _restore_autocast(self.autocast)
        for key in () if self.is_excluded else _EXCLUDABLE:
            _c._dispatch_tls_set_dispatch_key_excluded(key, False)
        states = _c._TorchFunctionState
        disabled = states.ALL_DISABLED if self.is_disabled else states.SUBCLASSES_DISABLED
        _c._set_torch_function_state(states.ENABLED if self.overridable else disabled)
        _c._set_grad_enabled(self.grad)


_READERS: list[Callable[[], Any]] = [
    torch.is_grad_enabled,
    _c._is_torch_function_enabled,
    _c._is_torch_function_all_disabled,
    functools.partial(_c._dispatch_tls_is_dispatch_key_excluded, _c.DispatchKey.Python),
    _c._is_fwd_grad_enabled,
    functools.partial(_autograd._top_saved_tensors_default_hooks, True),
    _c._get_flash_sdp_enabled,
    _c._get_mem_efficient_sdp_enabled,
    _c._get_math_sdp_enabled,
    _c._get_cudnn_sdp_enabled,
    _c._get_overrideable_sdp_enabled,
]
# Fast tests of whether modes that are rarely used are active.
_activity_tests: Any = (_c._len_torch_function_stack, _c._len_torch_dispatch_stack, functorch.maybe_current_level)
_activity_tests += (_c._is_any_autocast_enabled,)


def modes() -> tuple[Any, ...]:
    """Return the fields of `Modes` as a plain tuple, which costs less. Every estimate calls this function."""
    functions, dispatch, level, autocast = _activity_tests
    return (
        *[read() for read in _READERS],
        forward_ad._current_level,
        transforms.JVP_NESTING,
        _get_current_function_mode_stack() if functions() else [],
        python_dispatch._get_current_dispatch_mode_stack() if dispatch() else [],
        0 if level() is None else functorch.get_dynamic_layer_stack_depth(),
        _autocast() if autocast() else None,
    )


def _restore_stack(modes: list[Any], length: Any, pop: Any, push: Any) -> None:
    while length() > len(modes):
        pop()
    for mode in modes[length() :]:
        push(mode)


def _clear_dispatch_flags() -> None:
    """Clear the flags that torch sets while a dispatch mode is active."""
    flags: Any = python_dispatch
    flags._is_in_torch_dispatch_mode = flags._is_in_non_infra_torch_dispatch_mode = False
    flags._is_in_any_mode_without_ignore_compile_internals = False
    if hasattr(flags, "set_is_in_mode_without_ignore_compile_internals"):  # torch 2.9 has no such copy of the flag
        flags.set_is_in_mode_without_ignore_compile_internals(False)


def _same_hooks(one: Any, other: Any) -> bool:
    return one is other or one is None or (other is not None and one[0] is other[0] and one[1] is other[1])


def _autocast() -> tuple[Any, ...]:
    devices = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    return devices, torch.is_autocast_cache_enabled()


def _restore_autocast(before: tuple[Any, ...] | None) -> None:
    """Restore autocast. before: the result of `_autocast`; None if it was off."""
    if before is None:
        for device in ("cpu", "cuda"):
            torch.set_autocast_enabled(device, False)
    else:
        devices, is_cached = before
        for device, enabled, dtype in devices:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(is_cached)
    torch.clear_autocast_cache()
