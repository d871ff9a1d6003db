"""A snapshot of the modules and parameters of a model at the construction of its objective, to detect changes."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gradcost.core.errors import BadInput
from gradcost.core.evaluation.first_use import forget_if_changed

MOST_LOSSES = 100  # with results in a `Structure`; bounds the memory if each step makes a new loss


class Structure:
    """A snapshot of a model's modules and of their parameters and children. Derived objectives share one snapshot.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = tuple(model.modules())
        forget_if_changed(model, self.modules)
        if any(getattr(module, "max_norm", None) is not None for module in self.modules):
            raise BadInput(
                "an embedding with max_norm rewrites its table in the forward pass, so an evaluation would change "
                "the weights. Make it with max_norm=None, and renormalise after a step if necessary."
            )
        self.devices = devices_of(model)  # CUDA devices whose generators an evaluation seeds
        parameters = list(model.parameters())
        named = (*model.named_parameters(), *model.named_buffers())
        lazy = [name for name, tensor in named if nn.parameter.is_lazy(tensor)]
        if lazy:
            raise BadInput(
                f"`{lazy[0]}` has no shape before its module's first forward: run the model on a batch, and "
                "make the Objective after that."
            )
        meshes = {name: tensor.device_mesh for name, tensor in named if hasattr(tensor, "device_mesh")}  # pyright: ignore
        sharded = next(iter(meshes), None)
        # Says which parameter each process has a part of; None: there is none.
        self.sharded = sharded and f"`{sharded}` is sharded over processes (FSDP or a DTensor)"
        self.parallel = tuple(m for m in self.modules if isinstance(m, nn.parallel.DistributedDataParallel))
        # Whether a backward pass averages the gradients of several processes.
        self.averages = any(dist.get_world_size(module.process_group) > 1 for module in self.parallel)
        # The process groups in which a backward pass exchanges gradients.
        self.groups = [module.process_group for module in self.parallel] if self.averages else []
        self.groups += [mesh.get_group(axis) for mesh in dict.fromkeys(meshes.values()) for axis in range(mesh.ndim)]
        self.ids = {id(parameter) for parameter in parameters}
        self.isolations: dict[tuple[int, bool], Any] = {}  # (id of the loss, train/eval flag) -> Isolation
        # (id of the loss, train/eval flags) -> (the loss, Moving)
        self.moving: dict[tuple[int, tuple[bool, ...]], tuple[Any, Any]] = {}
        self._frozen = tuple(parameter for parameter in parameters if not parameter.requires_grad)
        self._trainable_count = len(parameters) - len(self._frozen)
        self._first = parameters[0] if parameters else None
        self._device = None if self._first is None else self._first.device
        registries = [registry for module in self.modules for registry in (module._parameters, module._modules)]
        self._entries = [(registry, list(registry.values())) for registry in registries if len(registry)]
        self._empty_registries = [registry for registry in registries if not len(registry)]

    def __reduce__(self) -> tuple[type[Structure], tuple[nn.Module]]:
        return Structure, (self.model,)  # a deep copy is the structure of the copied model

    def processes_message(self) -> str | None:
        """Return why only the backward pass of the model as it is combines the processes that train it, or None."""
        remedy = (
            "Give each process the whole model, and use BatchParallel or DirectionParallel, which send no gradient."
        )
        if self.sharded is not None:
            return f"{self.sharded}, and only backprop() serves sharded parameters. {remedy}"
        if self.averages:
            return (
                "the model is a DistributedDataParallel, which averages the processes' gradients in its backward "
                f"pass only. Make the Objective of its .module. {remedy}"
            )
        return None

    def check(self, leaves: Sequence[Any]) -> None:
        """Raise if the model has changed since construction. Costs less than 1 us per module and 0.1 us per leaf.

        Args:
            leaves: the leaves of the objective.
        Raises:
            BadInput: a parameter or a module was replaced, added, removed, frozen or unfrozen. The message names it.
        """
        self.check_unfrozen(leaves)
        for registry, values in self._entries:
            if len(registry) != len(values) or not all(map(is_, registry.values(), values)):
                raise BadInput(self._changed(registry, values))
        if any(map(len, self._empty_registries)):
            filled = next(registry for registry in self._empty_registries if len(registry))
            raise BadInput(self._changed(filled, []))
        for leaf in leaves:
            if not leaf.parameter.requires_grad:
                raise BadInput(self._toggled(leaf.parameter, "frozen (requires_grad=False)"))
        if self._first is not None and self._first.device != self._device:  # the model was moved to another device
            self.devices, self._device = devices_of(self.model), self._first.device

    def check_unfrozen(self, leaves: Sequence[Any]) -> None:
        """Raise if a frozen parameter was unfrozen, unless the objective uses only some of the trainable parameters.

        Args:
            leaves: the leaves of the objective.
        Raises:
            BadInput: a parameter was unfrozen. The message names it.
        """
        if len(leaves) == self._trainable_count:
            for parameter in self._frozen:
                if parameter.requires_grad:
                    raise BadInput(self._toggled(parameter, "unfrozen (requires_grad=True)"))

    def _changed(self, registry: Any, values: list[Any]) -> str:
        now = list(registry.items())
        names = [
            name for index, (name, value) in enumerate(now) if index >= len(values) or value is not values[index]
        ]
        module = next(
            (
                name
                for name, module in self.model.named_modules()
                if registry is module._parameters or registry is module._modules
            ),
            "",
        )
        where = ".".join(filter(None, (module, names[0] if names else "")))
        what = f"`{where}` was replaced or added" if names else f"an entry of `{where or 'the model'}` was removed"
        return f"{what} {_SINCE_CONSTRUCTION}"

    def _toggled(self, parameter: nn.Parameter, how: str) -> str:
        name = next(name for name, other in self.model.named_parameters() if other is parameter)
        return f"`{name}` was {how} {_SINCE_CONSTRUCTION}"


_SINCE_CONSTRUCTION = (
    "after the Objective was made, so its leaves are not the trainable parameters of the model any more. Make a new "
    "Objective, and a new optimizer state, after each change to the model."
)


def devices_of(model: nn.Module) -> tuple[torch.device, ...]:
    """Return the CUDA devices that hold a parameter of the model."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    return tuple(sorted(devices, key=str))
