"""Record the state that a module call reads besides its arguments; restore it when the call runs again (a rerun)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from gradcost.checkpointing.containers import packed, unpacked
from gradcost.core.evaluation.generator_states import numpy_state, python_state, set_numpy_state, set_python_state
from gradcost.core.evaluation.saved_state import version_of
from gradcost.core.interrupts import undoing
from gradcost.core.isolation import generator_state, set_generator_state

# Settings of the process or thread that a context manager around a call may change: (read, write).
_SETTINGS: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    *(
        (partial(read, device), partial(write, device))
        for device in ("cpu", "cuda")
        for read, write in (
            (torch.get_autocast_dtype, torch.set_autocast_dtype),
            (torch.is_autocast_enabled, torch.set_autocast_enabled),
        )
    ),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch._C._get_flash_sdp_enabled, torch._C._set_sdp_use_flash),
    (torch._C._get_mem_efficient_sdp_enabled, torch._C._set_sdp_use_mem_efficient),
    (torch._C._get_math_sdp_enabled, torch._C._set_sdp_use_math),
    (torch._C._get_cudnn_sdp_enabled, torch._C._set_sdp_use_cudnn),
]


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")

# Python modules of the layers with running statistics.
_STATISTICS = ("torch.nn.modules.batchnorm", "torch.nn.modules.instancenorm")


class Generators:
    """The random generators whose states are recorded before each call.

    Args:
        devices: CUDA devices whose generators are recorded. The CPU's generator is always recorded.
        python: whether the generator of Python's `random` is recorded. This takes time and memory: pass True only if
            a forward pass draws from it.
        numpy: whether NumPy's global generator is recorded. Pass True only if a forward pass draws from it.
        own: generator objects that are attributes of the blocks' modules.
    """

    def __init__(
        self, devices: Sequence[torch.device], python: bool = True, numpy: bool = True, own: Sequence[Any] = ()
    ) -> None:
        self._torch = [torch.default_generator]
        self._torch += [torch.cuda.default_generators[device.index or 0] for device in devices]
        self._others = [(python_state, set_python_state)] if python else []
        self._others += [(numpy_state, set_numpy_state)] if numpy else []
        self._others += [(partial(generator_state, g), partial(set_generator_state, g)) for g in own]

    def states(self) -> list[Any]:
        return [generator.get_state() for generator in self._torch] + [read() for read, _ in self._others]

    def set(self, states: list[Any]) -> None:
        for generator, state in zip(self._torch, states, strict=False):
            generator.set_state(state)
        for (_, write), state in zip(self._others, states[len(self._torch) :], strict=True):
            write(state)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restore the states at the end of the context."""
        states = self.states()
        with undoing(lambda: self.set(states)):
            yield


class BlockModules:
    """The modules of a block, and the names of the state to copy before each call.

    A block may be called many times per evaluation. These facts are equal for all calls and computed once.

    Args:
        block: the block; None for a function without modules.
        changing: module -> names of the attributes and buffers that its forward changes in place without a new
            version number: lists, dictionaries, objects, `.data` of tensors.
        to_end: whether a rerun of the block goes on after its last saved tensor.
    """

    def __init__(
        self, block: nn.Module | None, changing: Mapping[nn.Module, Collection[str]], to_end: bool = False
    ) -> None:
        self.owner = block
        modules = () if block is None else block.modules()
        self.modules = [module for module in modules if isinstance(module.__dict__.get("_parameters"), dict)]
        self.changing = [(module, names) for module in self.modules if (names := changing.get(module))]
        # The original buffers. An evaluation replaces them by copies later.
        self.buffers = {id(module): dict(module._buffers) for module in self.modules if reads_buffers(module)}
        self.to_end = to_end or any(isinstance(module, nn.RReLU) for module in self.modules)


def reads_buffers(module: nn.Module) -> bool:
    """Return whether a forward may read buffers that it wrote. Torch's layers with running statistics do not."""
    return bool(module._buffers) and type(module).__module__ not in _STATISTICS


def statistics_of(modules: Sequence[nn.Module]) -> dict[int, nn.Module]:
    """Return storage -> layer of all running statistics. In train mode a layer saves them, but does not read them."""
    layers = [module for module in modules if not reads_buffers(module)]
    buffers = [(buffer, layer) for layer in layers for buffer in layer._buffers.values() if buffer is not None]
    return {buffer.untyped_storage()._cdata: layer for buffer, layer in buffers}


class CallState:
    """What a call of a block reads besides its arguments: generators, settings, and the state of its modules.

    Args:
        generators: the generators to record.
        block: the modules of the block.
    """

    __slots__ = ("_cached", "_changing", "_device", "_generators", "_modules", "_settings", "_states")

    def __init__(self, generators: Generators, block: BlockModules) -> None:
        self._generators, self._states = generators, generators.states()
        self._settings = [read() for read, _ in _SETTINGS]
        self._device = _default_device() if torch._C._len_torch_function_stack() else None
        self._cached = dict(parametrize._cache) if parametrize._cache_enabled else None
        self._modules: list[tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]]] = []
        for module in block.modules:
            attributes = module.__dict__
            buffers = attributes["_buffers"]
            if buffers:
                originals = block.buffers.get(id(module))
                buffers = dict(buffers) if originals is None else _recorded_buffers(buffers, originals)
            recorded = attributes.copy()
            for name in _HOOKS:
                if recorded[name]:
                    recorded[name] = recorded[name].copy()  # hooks may be registered for this forward pass only
            self._modules.append((module, recorded, dict(attributes["_parameters"]), buffers))
        self._changing = [
            (module, name, packed(_attribute_or_buffer(module, name), _clone))
            for module, names in block.changing
            for name in names
            if name in module.__dict__ or name in module._buffers
        ]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Set this state inside the context, for a rerun. Afterwards restore the present state, except generators."""
        present = [read() for read, _ in _SETTINGS]
        cache_enabled = torch.is_autocast_cache_enabled()
        parametrize_state = parametrize._cache_enabled, parametrize._cache
        attributes = [module.__dict__ for module, *_ in self._modules]

        def restore() -> None:
            for (module, *_), present_attributes in zip(self._modules, attributes, strict=True):
                object.__setattr__(module, "__dict__", present_attributes)
            parametrize._cache_enabled, parametrize._cache = parametrize_state
            torch.set_autocast_cache_enabled(cache_enabled)
            _write_settings([read() for read, _ in _SETTINGS], present)

        with undoing(restore):
            self._generators.set(self._states)
            _write_settings(present, self._settings)
            # No autocast cache: it would store the converted copies of all weights until the last call returns.
            torch.set_autocast_cache_enabled(False)
            parametrize._cache_enabled = 0 if self._cached is None else 1
            parametrize._cache = {} if self._cached is None else dict(self._cached)
            self._write_modules()
            with nullcontext() if self._device is None else self._device:
                yield

    def _write_modules(self) -> None:
        for module, attributes, parameters, buffers in self._modules:
            attributes = attributes.copy()
            attributes["_parameters"] = dict(parameters)
            # Running statistics are cloned: in a plain training loop a rerun would move them a second time.
            attributes["_buffers"] = {
                name: buffer.read() if type(buffer) is _Buffer else None if buffer is None else _clone(buffer)
                for name, buffer in buffers.items()
            }
            object.__setattr__(module, "__dict__", attributes)
        memo: dict[int, Any] = {}
        for module, name, copy in self._changing:
            value = unpacked(copy, lambda leaf: _clone(leaf) if isinstance(leaf, Tensor) else leaf, memo)
            (module._buffers if name in module._buffers else module.__dict__)[name] = value


class _Buffer:
    """The value of a buffer before a call. It is copied unless the original buffer has the same value."""

    __slots__ = ("copy", "original", "tensor", "version")

    def __init__(self, tensor: Tensor, original: Tensor | None) -> None:
        self.tensor, self.original, self.version = tensor, original, version_of(tensor)
        # An evaluation works on copies of the buffers. At version 0 a copy still has the value of its original.
        is_original = original is not None and original is not tensor and self.version == 0
        self.copy = None if is_original else _clone(tensor)

    def read(self) -> Tensor:
        """Return the value before the call: the tensor itself if nothing has changed it since, otherwise a copy."""
        if version_of(self.tensor) == self.version:
            return self.tensor
        value = self.original if self.copy is None else self.copy
        assert value is not None
        return _clone(value)


def _recorded_buffers(buffers: dict[str, Any], originals: dict[str, Any]) -> dict[str, Any]:
    return {
        name: buffer if buffer is None else _Buffer(buffer, originals.get(name)) for name, buffer in buffers.items()
    }


def _attribute_or_buffer(module: nn.Module, name: str) -> Any:
    return module._buffers[name] if name in module._buffers else module.__dict__[name]


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _write_settings(present: list[Any], wanted: list[Any]) -> None:
    for (_, write), now, then in zip(_SETTINGS, present, wanted, strict=True):
        if now != then:
            write(then)


def _default_device() -> DeviceContext | None:
    """Return the innermost `with torch.device(...)` around this call, or None."""
    devices = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, DeviceContext)]
    return DeviceContext(devices[-1].device) if devices else None
