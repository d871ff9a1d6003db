"""Backpropagation within a number of bytes: the schedule of recomputation that costs least and fits."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from gradcost.checkpointing.optimal import Items, Point, frontier
from gradcost.checkpointing.policies import Saving, Schedule
from gradcost.core.blocks import find_blocks
from gradcost.core.errors import BadInput, DoesNotFit, GradcostError, Unsupported
from gradcost.core.objective import Objective
from gradcost.core.pytree import tensors
from gradcost.core.value import value
from gradcost.estimators.reverse import Reverse
from gradcost.planning.block_profile import profile
from gradcost.planning.fake_model import on_fakes
from gradcost.planning.forecast import device_type, forecast, rounding
from gradcost.training.optimizers import Optimizer


@value
class Within(Saving):
    """The schedule of recomputation with the fewest FLOPs among those whose peak is at most `bytes`.

    `bytes` is all of a step's memory: weights, buffers, the batch, gradients (made and used leaf by leaf),
    activations, and `beside`, what an optimizer keeps and makes in its step (`within` finds that). The blocks are
    those of `chain.find_blocks`; regions are nested. The choice is by dynamic programming over figures of each
    block (`schedules`), taken on fake tensors, and each choice is followed whole on fakes before it is made.

    Law: the tracked peak is at most `bytes - beside`; the gradient has the bits of backpropagation. Source:
    Herrmann et al. 2019 (arXiv 1911.13214). Raises: ValueError when the least that any schedule needs is more,
    with that number; and when bytes is not above 0.
    """

    bytes: int
    beside: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.beside < self.bytes:
            raise BadInput(
                f"a budget is more bytes than what lies beside ({self.beside!r}, 0 or more), not {self.bytes!r}."
            )

    def applied(self, objective: Objective, batch: Any) -> AbstractContextManager[None]:
        return Schedule(self.schedule(objective, batch)).applied(objective, batch)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        try:
            self.schedule(objective, batch)
        except GradcostError as error:
            return str(error)
        return None

    def schedule(self, objective: Objective, batch: Any) -> Items:
        """The items of the schedule."""
        with _disable_current_modes():
            return MemoryTradeoff(objective, batch).cheapest(self.bytes - self.beside).items


def within(
    budget: int, objective: Objective, batch: Any, optimizer: Optimizer | None = None, device: str | None = None
) -> Within:
    """`Within` a budget for the whole step with this optimizer. Raises: ValueError when no schedule fits."""
    items = MemoryTradeoff(objective, batch, optimizer, device).cheapest(budget).items
    alone = forecast(Reverse(Schedule(items)), objective, batch, None, device).peak
    return Within(budget, budget - alone)


class MemoryTradeoff:
    """What memory buys in recomputation: the best schedules of an objective's chain, from the least peak up.

    points: peak bytes of a step and the FLOPs computed again, told from the figures of single blocks; `peak` and
    `cheapest` follow a schedule whole on fakes. Raises: ValueError when the model has no chain of blocks, or one
    that is not run once each.
    """

    def __init__(
        self, objective: Objective, batch: Any, optimizer: Optimizer | None = None, device: str | None = None
    ) -> None:
        if not find_blocks(objective.model):
            raise Unsupported(f"no repeated blocks were found in {type(objective.model).__name__}: use Everything().")
        self._step = objective, batch, optimizer, device
        known = _known.setdefault(objective.model, {})
        name = (*_shapes(objective, batch), optimizer, device_type(objective, device))
        if name not in known:
            known[name] = self._best(), {}
        self.points, self._followed = known[name]

    def _best(self) -> list[Point]:
        objective, batch, _, device = self._step
        where = device_type(objective, device)
        with on_fakes(objective, batch, where) as (fake, fake_batch):
            figures = profile(fake, fake_batch, rounding(where))
        found = frontier(figures.stages, figures.epilogue)
        return [Point(figures.base + point.peak, point.flops, point.items) for point in found]

    def peak(self, index: int) -> int:
        """The peak of a whole step under a point's schedule, followed on fakes."""
        if index not in self._followed:
            objective, batch, optimizer, device = self._step
            estimator = Reverse(Schedule(self.points[index].items))
            self._followed[index] = forecast(estimator, objective, batch, optimizer, device).peak
        return self._followed[index]

    def cheapest(self, budget: int) -> Point:
        """The schedule with the fewest FLOPs that fits, with its followed peak.

        Raises: ValueError when none does, with the least that would do.
        """
        fits, over = -1, len(self.points)  # the best that is known to fit, and the least that is known not to
        stride, at = 1, max(bisect_right(self.points, budget, key=lambda point: point.peak) - 1, 0)
        while over - fits > 1:
            if self.peak(at) <= budget:
                fits, at = at, min(at + stride, over - 1)
            else:
                over, at = at, max(at - stride, fits + 1)
            stride *= 2
            if fits >= 0 and over < len(self.points):
                at = (fits + over) // 2
        if fits < 0:
            least = min(self.peak(index) for index in range(min(3, len(self.points))))
            raise DoesNotFit(
                f"{budget:,} bytes are fewer than any exact gradient of the whole batch needs here: the least is "
                f"{least:,}, by nested recomputation. Accumulated(..., parts) needs less."
            )
        return Point(self.peak(fits), self.points[fits].flops, self.points[fits].items)


# Of a model, in its modes and for a batch of certain shapes: the points, and the peaks that were followed.
_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[list[Point], dict[int, int]]]]
_known = weakref.WeakKeyDictionary()


def _shapes(objective: Objective, batch: Any) -> tuple[Any, ...]:
    modes = tuple(module.training for module in objective.modules)
    trained = tuple((leaf.name, leaf.parameter.dtype) for leaf in objective.leaves)
    return objective.loss, objective.parts, tuple((leaf.shape, leaf.dtype) for leaf in tensors(batch)), modes, trained
