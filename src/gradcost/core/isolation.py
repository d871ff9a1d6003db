"""Evaluate a model without changing it: restore weights, buffers, attributes and random generators exactly."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gradcost.core.evaluation.generator_states import (
    numpy_state,
    python_state,
    seed_numpy,
    set_numpy_state,
    set_python_state,
)
from gradcost.core.fake import is_fake
from gradcost.core.interrupts import undoing
from gradcost.core.key import Key
from gradcost.core.notes import warn_once


@contextmanager
def weights_replaced(parameters: Sequence[Tensor], weights: Sequence[Tensor]) -> Iterator[None]:
    """Give the parameters other values inside the context; restore the original values bit for bit afterwards.

    Nothing is copied: inside the context each parameter's `.data` is the tensor from `weights`.

    Args:
        parameters: the parameters to change.
        weights: one tensor per parameter, of the parameter's shape and dtype.
    """
    originals = [parameter.data for parameter in parameters]

    def restore() -> None:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data = original

    with undoing(restore):
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight
        yield


@contextmanager
def grads_set_aside(model: nn.Module) -> Iterator[None]:
    """Set `.grad` of all parameters to None inside the context; restore the tensors afterwards."""
    saved = [(parameter, parameter.grad) for parameter in model.parameters()]

    def restore() -> None:
        for parameter, grad in saved:
            parameter.grad = grad

    with undoing(restore):
        for parameter, _ in saved:
            parameter.grad = None
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode inside the context; restore the mode of each module afterwards."""
    flags = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, training in flags:
            module.training = training

    with undoing(restore):
        model.eval()
        yield


@contextmanager
def seeded_generators(key: Key, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Seed the default generators from the key inside the context; restore them bit for bit afterwards.

    They are torch's default generators on the CPU and on `devices`, that of Python's `random`, and NumPy's global
    generator. Dropout and other random layers draw from them. No other function of gradcost seeds them.

    Args:
        key: all generators get `key.seed`.
        devices: the CUDA devices whose generators are seeded.
    """
    with restored_generators(devices) as generators:
        for generator in generators:
            generator.manual_seed(key.seed)
        random.seed(key.seed)
        seed_numpy(key.seed)
        yield


@contextmanager
def restored_generators(devices: Iterable[torch.device] = ()) -> Iterator[list[torch.Generator]]:
    """Yield torch's default generators. Restore them, and those of Python's `random` and NumPy, afterwards."""
    generators = [torch.default_generator]
    generators += [torch.cuda.default_generators[device.index or 0] for device in devices]
    states, of_python, of_numpy = [g.get_state() for g in generators], python_state(), numpy_state()

    def restore() -> None:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        set_python_state(of_python)
        set_numpy_state(of_numpy)

    with undoing(restore):
        yield generators


@contextmanager
def isolated_modules(modules: Sequence[nn.Module], has_views: bool = False) -> Iterator[None]:
    """Give the modules copies of their attributes and buffers inside the context; restore the originals afterwards.

    - Each module gets a copy of its attribute dictionary. Attributes that are set inside the context (hidden states,
      caches, `training`, weights that hooks make) get their old values back afterwards.
    - Buffers are cloned. A tensor that several modules share is cloned once. If `has_views`, buffers and attributes
      that share memory also share memory inside the context.
    - The cache of `torch.nn.utils.parametrize.cached` is empty at the start of the context, and restored afterwards.
    - The `gradient_checkpointing` flag of transformers models is False inside the context, because the estimator
      decides which activations are saved. A `Note` says so.
    """
    originals: list[tuple[nn.Module, dict[str, Any]]] = []
    clones: dict[int, Tensor] = {}
    storage_clones = dict.fromkeys(shared_storages(modules)) if has_views else {}  # by address; made at first use
    cached = dict(parametrize._cache) if parametrize._cache_enabled else None
    has_own_checkpointing = False

    def restore() -> None:
        for module, original in originals:
            object.__setattr__(module, "__dict__", original)
        if cached is not None:
            parametrize._cache.clear()
            parametrize._cache.update(cached)

    with undoing(restore):
        if cached:
            parametrize._cache.clear()
        for module in modules:
            original = module.__dict__
            attributes = original.copy()
            if attributes.get("gradient_checkpointing") is True:
                attributes["gradient_checkpointing"] = False
                has_own_checkpointing = True
            if attributes.get("_buffers"):
                copies = {name: _clone(b, clones) for name, b in attributes["_buffers"].items()}
                if has_views:
                    in_clones = {name: _in_clone(b, storage_clones) for name, b in attributes["_buffers"].items()}
                    copies |= {name: b for name, b in in_clones.items() if b is not attributes["_buffers"][name]}
                attributes["_buffers"] = copies
            for name, value in original.items() if has_views else ():
                if isinstance(value, Tensor):
                    attributes[name] = _in_clone(value, storage_clones)
            originals.append((module, original))
            object.__setattr__(module, "__dict__", attributes)
        if has_own_checkpointing:
            warn_once(modules[0], "own checkpointing off", _OWN_CHECKPOINTING.format(type(modules[0]).__name__))
        yield


_OWN_CHECKPOINTING = (
    "gradient checkpointing is on in this {}, and off inside an estimate: the estimator decides which activations "
    "are saved. Use checkpointed() to recompute the blocks."
)


def _clone(buffer: Tensor | None, clones: dict[int, Tensor]) -> Tensor | None:
    if buffer is None:
        return None
    clone = clones.get(id(buffer))
    if clone is None:
        # Keep the graph: a buffer with a graph was computed from a parameter.
        clone = clones[id(buffer)] = (buffer if buffer.grad_fn is not None else buffer.detach()).clone()
    return clone


def shared_storages(modules: Sequence[nn.Module]) -> list[int]:
    """Return the addresses of the storages that a buffer shares with another buffer, or with a module's attribute."""
    buffers: dict[int, Any] = {id(b): b for module in modules for b in module._buffers.values() if _has_storage(b)}
    attributes = {id(value): value for module in modules for value in vars(module).values() if _has_storage(value)}
    counts = Counter(tensor.untyped_storage().data_ptr() for tensor in (buffers | attributes).values())
    addresses = {buffer.untyped_storage().data_ptr() for buffer in buffers.values()}
    in_both = {buffers[name].untyped_storage().data_ptr() for name in buffers.keys() & attributes.keys()}
    return [address for address in addresses if address and (counts[address] > 1 or address in in_both)]


def _has_storage(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not is_fake(value)


def _in_clone(value: Any, storage_clones: dict[int, Any]) -> Any:
    """Return a tensor like `value` in the clone of its storage; `value` itself if its storage is not shared."""
    address = value.untyped_storage().data_ptr() if _has_storage(value) else None
    if address not in storage_clones:
        return value
    if storage_clones[address] is None:
        storage_clones[address] = value.untyped_storage().clone()
    twin = torch.empty(0, dtype=value.dtype, device=value.device)
    return twin.set_(storage_clones[address], value.storage_offset(), value.shape, value.stride())


@contextmanager
def seeded_objects(key: Key, generators: Sequence[Any]) -> Iterator[None]:
    """Seed random generators of a model from the key inside the context; restore their states afterwards.

    Args:
        key: the generator with index i gets the seed of `key.fold("generator", i)`.
        generators: torch.Generator, np.random.Generator, np.random.RandomState or random.Random objects.
    """
    states = [generator_state(generator) for generator in generators]

    def restore() -> None:
        for generator, state in zip(generators, states, strict=True):
            set_generator_state(generator, state)

    with undoing(restore):
        for number, generator in enumerate(generators):
            seed = key.fold("generator", number).seed
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
            elif isinstance(generator, random.Random):
                generator.seed(seed)
            elif hasattr(generator, "bit_generator"):
                generator.bit_generator.state = type(generator.bit_generator)(seed).state
            else:
                generator.seed(seed & 0xFFFFFFFF)
        yield


def generator_state(generator: Any) -> Any:
    """Return the state of a generator object of torch, NumPy or Python, for `set_generator_state`."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "bit_generator"):
        return generator.bit_generator.state
    return generator.get_state()


def set_generator_state(generator: Any, state: Any) -> None:
    """Give a generator object a state that `generator_state` returned."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _one_thread() -> None:
    """Use one thread in a forked process: torch would wait for the threads that a fork does not copy."""
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_one_thread)
