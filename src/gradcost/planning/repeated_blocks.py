"""Find the equal blocks of a model, and copy the model with fewer of them. The copies share the parameters."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradcost.core.objective import Objective

_LONGEST_PERIOD = 6  # blocks of a repeated pattern, such as five layers with local attention and a global one


@dataclass(frozen=True)
class Repeated:
    """The repeated part of a `ModuleList` or `Sequential`: `count` units of `period` consecutive children.

    Args:
        name: the name of the container in the model.
        start: index of the first child of the first unit.
        period: children per unit.
        count: the number of units.
    """

    name: str
    start: int
    period: int
    count: int

    def unit(self, module: str) -> tuple[int, str] | None:
        """Return the unit of a module and the module's name relative to the unit; None if it is in no unit."""
        prefix = f"{self.name}." if self.name else ""
        child, _, rest = module.removeprefix(prefix).partition(".")
        if not module.startswith(prefix) or not child.isdigit():
            return None
        unit, place = divmod(int(child) - self.start, self.period)
        if not 0 <= unit < self.count:
            return None
        return unit, f"{place}.{rest}" if rest else str(place)

    def module(self, unit: int, relative: str) -> str:
        """Return the name in the model of a module of a unit: the inverse of `unit`."""
        place, _, rest = relative.partition(".")
        child = str(self.start + unit * self.period + int(place))
        return ".".join(filter(None, (self.name, child, rest)))


def find_repeated(objective: Objective) -> tuple[Repeated, ...]:
    """Return the repeated parts with the most units; several if they have equally many, such as encoder and decoder.

    Units are equal if they have equal modules (by class, `repr`, hooks, and flags, numbers and functions in their
    attributes) and parameters of equal shape, strides and dtype, trained or not. An attribute that is the index of
    the child does not count.
    """
    trained = {id(leaf.parameter) for leaf in objective.leaves}
    found: list[Repeated] = []
    for name, module in objective.model.named_modules():
        is_inside = any(other.unit(name) is not None or name == other.name for other in found)
        if isinstance(module, nn.ModuleList | nn.Sequential) and not is_inside:
            kinds = _kinds(list(module.children()), trained)
            start, period, count = _longest_repetition(kinds)
            if count > 1:
                found.append(Repeated(name, start, period, count))
    most = max((part.count for part in found), default=0)
    return tuple(part for part in found if part.count == most)


def with_fewer(objective: Objective, parts: Sequence[Repeated], count: int) -> tuple[Objective, tuple[Repeated, ...]]:
    """Return a copy of an objective with `count` units of each repeated part, and these parts in the copy."""
    shared: list[Any] = [*objective.model.parameters(), *objective.model.buffers()]
    for part in parts:
        children = list(objective.model.get_submodule(part.name).children())
        shared += children[_dropped(part, count)]  # not copied, since the copy does not have them
    model = copy.deepcopy(objective.model, {id(each): each for each in shared})
    for part in parts:
        container = model.get_submodule(part.name)
        kept = list(container.children())
        del kept[_dropped(part, count)]
        container._modules = {str(index): child for index, child in enumerate(kept)}
    result = Objective(model, objective.loss, objective.parts, objective.data)
    trained = {id(leaf.parameter) for leaf in objective.leaves}
    if any(id(leaf.parameter) not in trained for leaf in result.leaves):
        result = result.only([leaf.name for leaf in result.leaves if id(leaf.parameter) in trained])
    return result, tuple(replace(part, count=count) for part in parts)


def _dropped(part: Repeated, count: int) -> slice:
    """Return the children of a container that a copy with `count` units does not have."""
    return slice(part.start + part.period * count, part.start + part.period * part.count)


def _kinds(blocks: Sequence[nn.Module], trained: set[int]) -> list[Any]:
    """Return one value per block; equal blocks have equal values."""
    numbers = [
        {
            (name, attribute): value
            for name, module in block.named_modules()
            for attribute, value in vars(module).items()
            if isinstance(value, bool | int | float | str | None)
        }
        for block in blocks
    ]
    # An attribute that is the index of the block in every block, such as `layer_idx`.
    indices = {key for key in numbers[0] if all(type(each.get(key)) is int for each in numbers)} if blocks else set()
    indices = {key for key in indices if all(each[key] == index for index, each in enumerate(numbers))}
    kinds = []
    for block, each in zip(blocks, numbers, strict=True):
        parameters = [(*_layout(n, p), id(p) in trained, p.requires_grad) for n, p in block.named_parameters()]
        buffers = [_layout(name, buffer) for name, buffer in block.named_buffers()]
        attributes = {key: value for key, value in each.items() if key not in indices}
        modules = [_functions(module) for module in block.modules()]
        kinds.append((type(block), repr(block), parameters, buffers, attributes, modules))
    return kinds


def _layout(name: str, tensor: Tensor) -> tuple[Any, ...]:
    return name, tensor.shape, tensor.dtype, tensor.stride() if tensor.layout == torch.strided else tensor.layout


def _functions(module: nn.Module) -> list[tuple[str, Any]]:
    """Return the code of a module's hooks and of the functions in its attributes, such as its own `forward`."""
    found = []
    for name, value in vars(module).items():
        if isinstance(value, dict) and name.endswith("_hooks"):
            found += [(name, _code(hook)) for hook in value.values()]
        elif callable(value) and not isinstance(value, nn.Module | Tensor):
            found.append((name, _code(value)))
        elif isinstance(value, tuple | list | torch.dtype) and name[:1] != "_":
            found.append((name, repr(value)))
    return found


def _code(function: Any) -> Any:
    """Return a value that is equal for functions with the same code."""
    if isinstance(function, functools.partial):
        return "partial", _code(function.func), *map(_code, function.args)
    function = getattr(function, "__func__", function)
    if isinstance(function, type | types.BuiltinFunctionType):
        return function
    return getattr(function, "__code__", type(function))


def _longest_repetition(kinds: Sequence[Any]) -> tuple[int, int, int]:
    """Return (start, period, count) of the longest repetition of consecutive kinds; the shortest period first."""
    best = 0, 1, 0
    for period in range(1, _LONGEST_PERIOD + 1):
        start = 0
        for end in range(period, len(kinds) + 1):
            if end == len(kinds) or kinds[end] != kinds[end - period]:
                count = (end - start) // period
                if count > 1 and count * period > best[1] * best[2]:
                    best = start, period, count
                start = end - period + 1
    return best
