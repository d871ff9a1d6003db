"""Layers in which the examples of a batch are not independent, so that micro-batches compute something else."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def mixing_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that normalize by statistics of the batch: BatchNorm, unless it uses running statistics."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    }


def mixing_layer(model: nn.Module) -> str | None:
    """Return the first of `mixing_layers` with its class, such as "1 (BatchNorm1d)"; None if there is none."""
    for name, module in mixing_layers(model).items():
        return f"{name} ({type(module).__name__})" if name else type(module).__name__
    return None
