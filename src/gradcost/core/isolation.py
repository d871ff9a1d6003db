"""Evaluate a model without changing it: generators, buffers, flags and weights are restored bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gradcost.core.key import Key


@contextmanager
def weights_replaced(parameters: Sequence[nn.Parameter], weights: Sequence[Tensor]) -> Iterator[None]:
    """Let the parameters read other weights inside the context; restore them bit for bit afterwards.

    Nothing is copied: each parameter's `.data` points at the other tensor, which is neither kept nor changed.

    Args:
        parameters: the parameters.
        weights: one tensor a parameter, of its shape and dtype.
    """
    own = [parameter.data for parameter in parameters]
    try:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight
        yield
    finally:
        for parameter, data in zip(parameters, own, strict=True):
            parameter.data = data


@contextmanager
def randomness(key: Key, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Within, the default generators (torch's, on the CPU and `devices`, and Python's) draw from the key.

    Afterwards they are as before, bit for bit. This is the one place where a global generator is touched:
    dropout and its like read no other.
    """
    with restored_generators(devices) as generators:
        for generator in generators:
            generator.manual_seed(key.seed)
        random.seed(key.seed)
        yield


@contextmanager
def restored_generators(devices: Iterable[torch.device] = ()) -> Iterator[list[torch.Generator]]:
    """The default generators, put back bit for bit at the end."""
    generators = [torch.default_generator]
    generators += [torch.cuda.default_generators[device.index or 0] for device in devices]
    states, python = [generator.get_state() for generator in generators], random.getstate()
    try:
        yield generators
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        random.setstate(python)


@contextmanager
def undisturbed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within, the modules work on copies of their buffers; afterwards buffers and flags are what they were.

    A transformers model's own gradient checkpointing is off within: the estimator decides what is saved.
    """
    flags, buffers, checkpointing = [], [], []
    for module in modules:
        flags.append((module, module.training))
        if module._buffers:
            buffers.append((module._buffers, dict(module._buffers)))
        if getattr(module, "gradient_checkpointing", False) is True:
            checkpointing.append(module)
    try:
        for live, before in buffers:
            live.update({name: None if b is None else b.detach().clone() for name, b in before.items()})
        for module in checkpointing:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for live, before in buffers:
            live.clear()
            live.update(before)
        for module in checkpointing:
            module.gradient_checkpointing = True  # type: ignore[assignment]
        for module, training in flags:
            module.training = training
