"""The outputs of linear layers and convolutions, as they are made: each call of each layer has its own noise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradcost.core.key import Key
from gradcost.core.objective import Leaf, Objective
from gradcost.directions import Directions
from gradcost.directions.direction import combination

# Exactly these: a subclass may do more with its weights than to multiply its input by them.
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Layers = Mapping[nn.Module, Sequence[Leaf]]  # each with the leaves that it owns


class TrialLog(NamedTuple):
    """An evaluation whose layers are visited: the objective to evaluate, and how often each layer was called."""

    objective: Objective
    calls: Counter[nn.Module]


@dataclass(frozen=True)
class Output:
    """What one call of a layer gave, and where its noise lies: at `start` in the stream of its name and call."""

    layer: nn.Module
    name: str
    call: int
    start: int
    value: Tensor

    def noise(self, directions: Directions, seeds: Sequence[int], scales: Sequence[float]) -> Tensor:
        """sum_k scales[k] u_k, where u_k is this output's noise under seed k."""
        return combination(directions, self._leaf(), self._own(seeds), scales)

    def moved(self, directions: Directions, seed: int, step: float) -> Tensor:
        """The output with its noise added, `step` times."""
        return directions.add(self.value, self._leaf(), self._own([seed]), [step])

    def _own(self, seeds: Sequence[int]) -> list[int]:
        return [Key(seed).fold(self.name, self.call).seed for seed in seeds]

    def _leaf(self) -> Leaf:
        """To directions an output is what a leaf is: a name, a tensor and a place."""
        return Leaf(self.name, self.value, self.start, self.value.numel())  # pyright: ignore[reportArgumentType]


def layers_of(objective: Objective) -> Layers:
    """The layers whose outputs stand for their weights, with the leaves that they own.

    A layer that shares a leaf with another module, or that has leaves beside its weight and bias, is not one.
    """
    owners = Counter(id(p) for module in objective.modules for p in module._parameters.values() if p is not None)
    leaves = {id(leaf.parameter): leaf for leaf in objective.leaves}
    found: dict[nn.Module, list[Leaf]] = {}
    for module in objective.modules:
        own = {name: leaves[id(p)] for name, p in module._parameters.items() if id(p) in leaves}
        alone = all(owners[id(leaf.parameter)] == 1 for leaf in own.values())
        if type(module) in LAYERS and own and alone and own.keys() <= {"weight", "bias"}:
            found[module] = list(own.values())
    return found


@contextmanager
def visited(
    objective: Objective,
    layers: Layers,
    leave: Callable[[Output], Tensor],
    enter: Callable[[nn.Module], None] | None = None,
) -> Iterator[TrialLog]:
    """Within, each call of a layer calls `enter`, and what `leave` makes of its output is its output.

    The objective to evaluate meanwhile is the same one, which says when a micro-batch begins; calls are those of its
    last evaluation. The noise of a call in one micro-batch lies behind that of the
    same call in the one before, so where an output's first dimension is the batch's, micro-batches have the noise
    that the whole batch has. Law: the hooks are gone afterwards, whatever happens.
    """
    begun, calls, total = 0, Counter[nn.Module](), Counter[nn.Module]()
    reached = Counter[tuple[nn.Module, int]]()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal begun
        if begun % objective.parts == 0:
            reached.clear()
            total.clear()
        begun += 1
        calls.clear()
        return objective.loss(model, batch)

    def before(module: nn.Module, args: Any) -> None:
        if enter is not None:
            enter(module)

    def after(module: nn.Module, args: Any, made: Tensor) -> Tensor:
        call = calls[module]
        start = reached[module, call]
        calls[module] += 1
        total[module] += 1
        reached[module, call] = start + made.numel()
        with torch._C.DisableTorchFunction():
            return leave(Output(module, layers[module][0].name, call, start, made))

    handles: list[Any] = []
    try:
        for module in layers:
            # Before any hook of the user's: it is the layer's own output whose derivative is the noise's.
            handles.append(module.register_forward_pre_hook(before, prepend=True))
            handles.append(module.register_forward_hook(after, prepend=True))
        yield TrialLog(objective.with_loss(loss), total)
    finally:
        for handle in handles:
            handle.remove()
