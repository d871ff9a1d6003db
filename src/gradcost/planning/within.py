"""Backpropagation under a memory budget: the checkpointing schedule with the fewest FLOPs that fits."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch.utils._python_dispatch import _disable_current_modes

from gradcost.checkpointing.optimal import frontier
from gradcost.checkpointing.policies import Saving, Schedule
from gradcost.checkpointing.replay import not_recomputed
from gradcost.checkpointing.schedule_cost import Point, peak, recomputed
from gradcost.checkpointing.schedules import Items, schedule_length, uniform
from gradcost.core.blocks import find_blocks
from gradcost.core.errors import BadInput, DoesNotFit, GradcostError, Unsupported
from gradcost.core.evaluation.first_use import findings
from gradcost.core.fake import is_fake
from gradcost.core.notes import warn_once
from gradcost.core.objective import Objective, loss_errors
from gradcost.core.pytree import tensors
from gradcost.core.units import size
from gradcost.core.value import value
from gradcost.estimators.reverse import Reverse
from gradcost.planning.block_profile import Profile, profile
from gradcost.planning.by_depth import ByDepth
from gradcost.planning.fake_model import on_fakes
from gradcost.planning.forecast import Forecast, device_type, rounding
from gradcost.planning.refusals import simulation_errors
from gradcost.planning.schedule_search import fewer_flops, lower_peak
from gradcost.training.optimizers import Optimizer

_MOST_SHAPES = 1000  # of batches; bounds the memory if each step has another one
_MARGIN = 8  # estimated peaks of a chain, less the base, are right to one part in 8


@value
class Within(Saving):
    """The checkpointing schedule with the fewest FLOPs among those whose peak memory is at most `bytes`.

    The budget covers all memory of a step: parameters, buffers, batch, activations, gradients (one parameter's at
    a time), and `beside`. The blocks are those of `core.blocks.find_blocks`; recomputed regions may be nested, and a
    block may run again in up to 5 parts.
    Dynamic programming over the bytes and FLOPs of each block gives the optimal schedules of a chain. If a block gets
    other tensors than the previous block's output (an encoder's output, a skip connection), schedules near the best
    ones are simulated too, and a Note is issued. Before a schedule is chosen, the peak of its complete step is
    simulated. All bytes and FLOPs come from fake tensors.

    Law: without an optimizer, the measured peak is at most `bytes - beside`. The gradient equals that of
    backpropagation bit for bit.

    Args:
        bytes: the memory budget, in bytes.
        beside: bytes of the budget for the optimizer's state and temporaries; `plan` computes them.
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

    def beside_gradients(self, bytes: int) -> Within:
        if self.beside + bytes >= self.bytes:
            raise DoesNotFit(f"the gradients of all parameters take {bytes:,} bytes of the {self.bytes:,} of {self}.")
        return Within(self.bytes, self.beside + bytes)

    def applied(self, objective: Objective, batch: Any) -> AbstractContextManager[None]:
        schedule = Schedule(self.schedule(objective, batch))
        if not is_fake(objective.leaves[0].parameter):
            self._note_if_searched(objective, batch)
        return self._checked(schedule, objective, batch)

    def _checked(self, schedule: Schedule, objective: Objective, batch: Any) -> AbstractContextManager[None]:
        """Return the schedule's context manager, which checks at its first use which blocks can be recomputed."""
        context = schedule.applied(objective, batch)
        for name, reason in not_recomputed(objective).items():
            raise Unsupported(
                f"{name} cannot be recomputed ({reason}), so {self} cannot bound the memory: use Blocks()."
            )
        return context

    def _note_if_searched(self, objective: Objective, batch: Any) -> None:
        with _disable_current_modes():
            figures = MemoryTradeoff(objective, batch).figures
        places = (*figures.breaks, *figures.shared)
        if places:
            warn_once(
                objective.model,
                "within",
                f"block {min(places)} of {type(objective.model).__name__} does not get the output of block "
                f"{min(places) - 1} alone, so {self} uses the best schedule of those that it simulated; another one "
                "may need fewer FLOPs.",
            )

    def objection(self, objective: Objective, batch: Any) -> str | None:
        try:
            schedule = Schedule(self.schedule(objective, batch))
            with loss_errors(objective):
                self._checked(schedule, objective, batch)
        except GradcostError as error:
            return str(error)
        return None

    def schedule(self, objective: Objective, batch: Any) -> Items:
        """Return the chosen schedule, in the notation of `Schedule`.

        Args:
            objective: the model and the loss.
            batch: a typical training batch.
        """
        with _disable_current_modes():
            return MemoryTradeoff(objective, batch).cheapest(self.bytes - self.beside, self.beside).items


class MemoryTradeoff:
    """The best checkpointing schedules of a chain of blocks, in the order of increasing peak.

    figures: the bytes and FLOPs of single blocks (`Profile`).
    by_depth: computes the forecasts of these arguments; None for a new one.
    points: each schedule with its peak bytes and recomputed FLOPs, computed from `figures`.
    `peak`, `least` and `cheapest` instead simulate whole steps.

    Raises:
        Unsupported: the model has no chain of blocks, its blocks do not run once each, or it cannot be simulated.
    """

    def __init__(
        self,
        objective: Objective,
        batch: Any,
        optimizer: Optimizer | None = None,
        device: str | None = None,
        by_depth: ByDepth | None = None,
    ) -> None:
        if not find_blocks(objective.model):
            raise Unsupported(f"no repeated blocks were found in {type(objective.model).__name__}: use Everything().")
        self._step = objective, batch, optimizer, device
        self._by_depth = ByDepth(objective, optimizer, device) if by_depth is None else by_depth
        cache = findings(objective.model, objective.loss).setdefault(("schedules", objective.model.training), {})
        cache_key = (*_shapes(objective, batch), optimizer, device_type(objective, device))
        if cache_key not in cache:
            if len(cache) >= _MOST_SHAPES:
                cache.clear()
            cache[cache_key] = _Known(*self._best_schedules())
        self._known = cache[cache_key]
        self.points, self.figures = self._known.points, self._known.figures

    def _best_schedules(self) -> tuple[Profile, list[Point]]:
        objective, batch, _, device = self._step
        where = device_type(objective, device)
        figures = self._by_depth.figures(batch)
        if figures is None:
            with simulation_errors(objective, batch), on_fakes(objective, batch, where) as (fake, fake_batch):
                figures = profile(fake, fake_batch, rounding(where))
        points = frontier(figures.stages, figures.epilogue, breaks=figures.breaks)
        return figures, [Point(figures.base + point.peak, point.flops, point.items) for point in points]

    @property
    def is_chain(self) -> bool:
        """Whether each block gets the previous block's output and no other tensor of an earlier block.

        If so, `cheapest` returns the fewest FLOPs of all schedules that fit; if not, of the simulated schedules.
        """
        return not (self.figures.breaks or self.figures.shared)

    def peak(self, index: int) -> int:
        """Return the peak of a whole step under schedule `index`, simulated on fake tensors."""
        return self._simulated(self.points[index].items).peak

    def least(self) -> Point:
        """Return the schedule with the smallest simulated peak.

        Candidates: the first three of `points`, one region per block, and without a chain also their neighbours.
        """
        if self._known.least is None:
            blocks = schedule_length(self.points[0].items)
            candidates = dict.fromkeys([*(point.items for point in self.points[:3]), ((1,),) * blocks])
            best = self._lowest(sorted(map(self._estimated, candidates), key=lambda point: point[:2]))
            self._known.least = best if self.is_chain else lower_peak([best], self._simulated, self._estimated)
        return self._known.least

    def _lowest(self, estimates: Sequence[Point]) -> Point:
        """Return the lowest simulated peak. In a chain, estimates far above the first are not simulated."""
        first, *rest = estimates
        best = self._simulated(first.items)
        margin = (first.peak - self.figures.base) // _MARGIN
        for point in rest:
            if not self.is_chain or point.peak <= first.peak + margin:
                best = min(best, self._simulated(point.items), key=lambda point: (point.peak, point.flops))
        return best

    def forecast(self, items: Items) -> Forecast:
        """Return the forecast of a whole step under a schedule, from the cache if it was simulated before."""
        if items not in self._known.simulated:
            self._known.simulated[items] = self._by_depth.forecast(Reverse(Schedule(items)), self._step[1])
        return self._known.simulated[items]

    def cheapest(self, budget: int, beside: int = 0) -> Point:
        """Return the schedule with the fewest FLOPs that fits, with its simulated peak.

        Args:
            budget: the largest peak, in bytes.
            beside: bytes beside this budget; the message of the error counts them.
        Raises:
            DoesNotFit: no schedule fits; the message states the least memory that is needed.
        """
        fits = last_that_fits([point.peak for point in self.points], self.peak, budget)
        if fits >= 0 and self.is_chain:
            return Point(self.peak(fits), self.points[fits].flops, self.points[fits].items)
        if fits < 0 and self.least().peak > budget:
            raise DoesNotFit(self._too_small(budget, beside))
        if self.is_chain:
            return self.least()
        starts = [self.least()] if fits < 0 else []
        near = [point.items for point in self.points[max(fits, 0) : fits + 2]]
        starts += map(self._simulated, near + self._uniform())
        return fewer_flops(starts, budget, self._simulated, self._estimated)

    def _too_small(self, budget: int, beside: int) -> str:
        least = self.least().peak + beside
        parts = f", and {beside:,} are for gradients of a plain loop or an optimizer" if beside else ""
        return (
            f"{budget + beside:,} bytes are too few: the smallest peak of an exact gradient of the whole batch is "
            f"{least:,} bytes ({size(least)}), with the checkpointing schedules that were tried. Of these, "
            f"{self._unavoidable():,} bytes are parameters, buffers and batch{parts}. Micro-batches (Accumulated) "
            "may need less."
        )

    def _unavoidable(self) -> int:
        """Return the bytes of parameters, buffers and batch."""
        step = self.forecast(self.least().items)
        return step.peak - step.beyond

    def _uniform(self) -> list[Items]:
        """Return Everything(), and Segments(n) for 1, 2, 4, ... and for all blocks."""
        blocks = schedule_length(self.points[0].items)
        counts = dict.fromkeys([*(1 << power for power in range(blocks.bit_length())), blocks])
        return [(blocks,), *(uniform(blocks, count) for count in counts if count <= blocks)]

    def _simulated(self, items: Items) -> Point:
        result = self.forecast(items)
        everything = (schedule_length(items),)
        if items != everything and not self.is_chain:
            self.forecast(everything)
        known = self._known.simulated.get(everything)
        return Point(result.peak, result.flops - (0 if known is None else known.flops), items)

    def _estimated(self, items: Items) -> Point:
        figures = self.figures
        peak_bytes = figures.base + peak(items, figures.stages, figures.epilogue)
        return Point(peak_bytes, recomputed(items, figures.stages), items)


def last_that_fits(estimates: Sequence[int], peak: Callable[[int], int], budget: int) -> int:
    """Return the index of the last schedule that fits and whose successor does not; -1 if none was found.

    Searches with doubling strides around the index that the estimates predict, then bisects. Where peaks do not grow
    with the index, it is one of several such indices.

    Args:
        estimates: the estimated peaks, increasing.
        peak: returns the simulated peak of an index.
        budget: the largest peak, in bytes.
    """
    fits, over = -1, len(estimates)  # the largest index that fits and the smallest that does not, so far
    stride, at = 1, max(bisect_right(estimates, budget) - 1, 0)
    while over - fits > 1:
        if peak(at) <= budget:
            fits, at = at, min(at + stride, over - 1)
        else:
            over, at = at, max(at - stride, fits + 1)
        stride *= 2
        if fits >= 0 and over < len(estimates):
            at = (fits + over) // 2
    return fits


@dataclass
class _Known:
    """The profile, schedules and simulations of a model and a loss, for one shape of the batch and one optimizer."""

    figures: Profile
    points: list[Point]
    simulated: dict[Items, Forecast] = field(default_factory=dict)  # schedule -> forecast of a step
    least: Point | None = None


def _shapes(objective: Objective, batch: Any) -> tuple[Any, ...]:
    modes = tuple(module.training for module in objective.modules)
    trained = tuple((leaf.name, leaf.parameter.dtype) for leaf in objective.leaves)
    return objective.parts, tuple((leaf.shape, leaf.dtype) for leaf in tensors(batch)), modes, trained
