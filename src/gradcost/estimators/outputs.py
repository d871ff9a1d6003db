"""Visit the outputs of linear layers and convolutions, with independent noise for each call of each layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradcost.core.interrupts import Hooks, undoing
from gradcost.core.key import Key
from gradcost.core.objective import Leaf, Objective
from gradcost.directions import Directions

# Exactly these types: a subclass may use its weights in other ways.
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Layers = Mapping[nn.Module, Sequence[Leaf]]  # the trainable parameters of each layer


class LayerVisits(NamedTuple):
    """Result of `visited`.

    objective: the objective to evaluate inside the context. calls: number of calls of each layer in the latest batch.
    """

    objective: Objective
    calls: Counter[nn.Module]


@dataclass(frozen=True)
class Output:
    """The output of one call of a layer. Each pair (name, call) has its own stream of noise."""

    layer: nn.Module
    name: str  # of the layer's first parameter
    call: int  # number of the call in this forward pass, from 0
    start: int  # position in the stream at which the noise of this output begins
    value: Tensor

    def noise(self, directions: Directions, seeds: Sequence[int], scales: Sequence[float]) -> Tensor:
        """Return sum_k scales[k] u_k, where u_k is the noise of this output for seed k."""
        return directions.draw(self._leaf(), self._seeds(seeds), scales)

    def moved(self, directions: Directions, seed: int, step: float) -> Tensor:
        """Return the output plus `step` times its noise."""
        return directions.add(self.value, self._leaf(), self._seeds([seed]), [step])

    def _seeds(self, seeds: Sequence[int]) -> list[int]:
        return [Key(seed).fold(self.name, self.call).seed for seed in seeds]

    def _leaf(self) -> Leaf:
        """Return the output as a Leaf: directions need a name, a tensor and a position."""
        return Leaf(self.name, self.value, self.start, self.value.numel())  # pyright: ignore[reportArgumentType]


def layers_of(objective: Objective) -> Layers:
    """Return the layers whose outputs are perturbed instead of their weights, with their parameters.

    Omitted are layers that share a parameter with another module or have more parameters than weight and bias.
    """
    owners = Counter(id(p) for module in objective.modules for p in module._parameters.values() if p is not None)
    leaves = {id(leaf.parameter): leaf for leaf in objective.leaves}
    layers: dict[nn.Module, list[Leaf]] = {}
    for module in objective.modules:
        own = {name: leaves[id(p)] for name, p in module._parameters.items() if id(p) in leaves}
        unshared = all(owners[id(leaf.parameter)] == 1 for leaf in own.values())
        if type(module) in LAYERS and own and unshared and own.keys() <= {"weight", "bias"}:
            layers[module] = list(own.values())
    return layers


@contextmanager
def visited(
    objective: Objective,
    layers: Layers,
    leave: Callable[[Output], Tensor],
    enter: Callable[[nn.Module], None] | None = None,
) -> Iterator[LayerVisits]:
    """Inside the context, call `enter(layer)` before each call of a layer and replace its output by `leave(output)`.

    Evaluate the objective of the yielded LayerVisits, which counts micro-batches. A call's noise begins in its stream
    where the noise of the same call in the previous micro-batch ends. If the first dimension of the outputs is the
    batch, the micro-batches together therefore get the same noise as the full batch. The hooks are removed at the
    end, also after an exception.
    """
    evaluations, calls, total = 0, Counter[nn.Module](), Counter[nn.Module]()
    noise_ends = Counter[tuple[nn.Module, int]]()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal evaluations
        if evaluations % objective.parts == 0:
            noise_ends.clear()
            total.clear()
        evaluations += 1
        calls.clear()
        return objective.loss(model, batch)

    loss.observed_loss = objective.loss  # type: ignore[attr-defined]

    def before(module: nn.Module, args: Any) -> None:
        if enter is not None:
            enter(module)

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        call = calls[module]
        start = noise_ends[module, call]
        calls[module] += 1
        total[module] += 1
        noise_ends[module, call] = start + output.numel()
        with torch._C.DisableTorchFunction():
            return leave(Output(module, layers[module][0].name, call, start, output))

    hooks = Hooks()
    with undoing(hooks.remove):
        for module in layers:
            hooks.before(module, before)
            hooks.after(module, after, first=True)  # perturb the raw output, before user hooks change it
        yield LayerVisits(objective.with_loss(loss), total)
