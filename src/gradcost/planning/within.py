"""Backpropagation under a memory budget: the checkpointing schedule with the fewest FLOPs that fits."""

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
    """The checkpointing schedule with the fewest FLOPs among those whose peak memory is at most `bytes`.

    The budget covers all memory of a step: parameters, buffers, batch, activations, gradients (one parameter's at
    a time), and `beside`. The blocks are those of `core.blocks.find_blocks`; recomputed regions may be nested.
    Dynamic programming over the bytes and FLOPs of each block gives the optimal schedules. The peak of a whole step
    is simulated before a schedule is chosen. All figures come from fake tensors.

    Law: the measured peak is at most `bytes - beside`, and the gradient equals that of backpropagation bit for bit.

    Args:
        bytes: the memory budget, in bytes.
        beside: bytes of the budget for the optimizer's state and temporaries; `planning.within.within` computes them.
    Raises:
        BadInput: bytes is not above `beside`.
        DoesNotFit: no schedule fits; the message states the least memory that is needed.
    Source: Herrmann et al. 2019 (arXiv 1911.13214).
    """

    bytes: int
    beside: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.beside < self.bytes:
            raise BadInput(
                f"the budget must exceed beside ({self.beside!r} bytes, 0 or more); it is {self.bytes!r} bytes."
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
        """Return the schedule, as `Schedule` takes it.

        Args:
            objective: the model and the loss.
            batch: a typical training batch.
        """
        with _disable_current_modes():
            return MemoryTradeoff(objective, batch).cheapest(self.bytes - self.beside).items


def within(
    budget: int, objective: Objective, batch: Any, optimizer: Optimizer | None = None, device: str | None = None
) -> Within:
    """Return `Within(budget, beside)`, with `beside` computed for this optimizer.

    Raises:
        DoesNotFit: no schedule fits.
    """
    items = MemoryTradeoff(objective, batch, optimizer, device).cheapest(budget).items
    without_optimizer = forecast(Reverse(Schedule(items)), objective, batch, None, device).peak
    return Within(budget, budget - without_optimizer)


class MemoryTradeoff:
    """The best checkpointing schedules of a chain of blocks, in the order of increasing peak.

    points: each schedule with its peak bytes and recomputed FLOPs, computed from the figures of single blocks.
    `peak` and `cheapest` instead simulate a whole step.

    Raises:
        Unsupported: the model has no chain of blocks, or its blocks do not run once each.
    """

    def __init__(
        self, objective: Objective, batch: Any, optimizer: Optimizer | None = None, device: str | None = None
    ) -> None:
        if not find_blocks(objective.model):
            raise Unsupported(f"no repeated blocks were found in {type(objective.model).__name__}: use Everything().")
        self._step = objective, batch, optimizer, device
        cache = _cache.setdefault(objective.model, {})
        cache_key = (*_shapes(objective, batch), optimizer, device_type(objective, device))
        if cache_key not in cache:
            cache[cache_key] = self._best_schedules(), {}
        self.points, self._simulated_peaks = cache[cache_key]

    def _best_schedules(self) -> list[Point]:
        objective, batch, _, device = self._step
        where = device_type(objective, device)
        with on_fakes(objective, batch, where) as (fake, fake_batch):
            figures = profile(fake, fake_batch, rounding(where))
        points = frontier(figures.stages, figures.epilogue)
        return [Point(figures.base + point.peak, point.flops, point.items) for point in points]

    def peak(self, index: int) -> int:
        """Return the peak of a whole step under schedule `index`, simulated on fake tensors."""
        if index not in self._simulated_peaks:
            objective, batch, optimizer, device = self._step
            estimator = Reverse(Schedule(self.points[index].items))
            self._simulated_peaks[index] = forecast(estimator, objective, batch, optimizer, device).peak
        return self._simulated_peaks[index]

    def cheapest(self, budget: int) -> Point:
        """Return the schedule with the fewest FLOPs that fits, with its simulated peak.

        Raises:
            DoesNotFit: no schedule fits; the message states the least memory that is needed.
        """
        # Search with doubling strides around the predicted index, then bisect.
        fits, over = -1, len(self.points)  # the largest index known to fit, and the smallest known not to
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
                f"{budget:,} bytes are fewer than any exact gradient of the whole batch needs here. The least is "
                f"{least:,} bytes, by nested checkpointing; Accumulated(..., parts) needs less."
            )
        return Point(self.peak(fits), self.points[fits].flops, self.points[fits].items)


# By model, then by loss, shapes, modes, optimizer and device: the points and the simulated peaks.
_cache: weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[list[Point], dict[int, int]]]]
_cache = weakref.WeakKeyDictionary()


def _shapes(objective: Objective, batch: Any) -> tuple[Any, ...]:
    modes = tuple(module.training for module in objective.modules)
    trained = tuple((leaf.name, leaf.parameter.dtype) for leaf in objective.leaves)
    return objective.loss, objective.parts, tuple((leaf.shape, leaf.dtype) for leaf in tensors(batch)), modes, trained
