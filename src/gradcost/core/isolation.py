"""Evaluate a model without changing it: restore weights, buffers, train/eval flags and random generators exactly."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gradcost.core.key import Key


@contextmanager
def weights_replaced(parameters: Sequence[nn.Parameter], weights: Sequence[Tensor]) -> Iterator[None]:
    """Give the parameters other values inside the context; restore the original values bit for bit afterwards.

    Nothing is copied: inside the context each parameter's `.data` is the tensor from `weights`.

    Args:
        parameters: the parameters to change.
        weights: one tensor per parameter, of the parameter's shape and dtype.
    """
    originals = [parameter.data for parameter in parameters]
    try:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight
        yield
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data = original


@contextmanager
def seeded_generators(key: Key, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Seed the default generators from the key inside the context; restore them bit for bit afterwards.

    The generators are torch's default ones on the CPU and on `devices`, and the one of Python's `random`. Dropout and
    other random layers draw from these generators only. No other function of gradcost seeds them.

    Args:
        key: all generators get `key.seed`.
        devices: the CUDA devices whose generators are seeded.
    """
    with restored_generators(devices) as generators:
        for generator in generators:
            generator.manual_seed(key.seed)
        random.seed(key.seed)
        yield


@contextmanager
def restored_generators(devices: Iterable[torch.device] = ()) -> Iterator[list[torch.Generator]]:
    """Yield torch's default generators; restore their states and that of Python's `random` afterwards."""
    generators = [torch.default_generator]
    generators += [torch.cuda.default_generators[device.index or 0] for device in devices]
    states, python_state = [generator.get_state() for generator in generators], random.getstate()
    try:
        yield generators
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        random.setstate(python_state)


@contextmanager
def isolated_modules(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Use copies of the modules' buffers inside the context; restore buffers and train/eval flags afterwards.

    The `gradient_checkpointing` flag of transformers models is False inside the context, because the estimator
    decides which activations are saved.
    """
    flags, buffers, checkpointing = [], [], []
    for module in modules:
        flags.append((module, module.training))
        if module._buffers:
            buffers.append((module._buffers, dict(module._buffers)))
        if getattr(module, "gradient_checkpointing", False) is True:
            checkpointing.append(module)
    try:
        for current, originals in buffers:
            current.update({name: None if b is None else b.detach().clone() for name, b in originals.items()})
        for module in checkpointing:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for current, originals in buffers:
            current.clear()
            current.update(originals)
        for module in checkpointing:
            module.gradient_checkpointing = True  # type: ignore[assignment]
        for module, training in flags:
            module.training = training
