"""The figures of a plan at many batch sizes: a few sizes are simulated, the others are on confirmed lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch

from gradcost.checkpointing.policies import Schedule
from gradcost.checkpointing.schedules import Items
from gradcost.core.errors import BadInput, GradcostError
from gradcost.core.objective import Objective
from gradcost.core.pytree import batch_size
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.estimator import Estimator, require_objective
from gradcost.estimators.reverse import Reverse
from gradcost.estimators.structure import find, micro_batches
from gradcost.instruments.memory import PURPOSES
from gradcost.planning.affine import Piece, Sample, pieces
from gradcost.planning.candidates import PROBES, described, label, options
from gradcost.planning.curve import evenly_spaced
from gradcost.planning.forecast import Forecast, device_type
from gradcost.planning.forecasts import Forecasts
from gradcost.planning.plan import seconds_estimator
from gradcost.planning.swept import Sweep, SweptMethod, SweptSchedules, exceptions
from gradcost.planning.within import MemoryTradeoff, Within
from gradcost.training.customary import Customary, optimizer_of
from gradcost.training.optimizers import Optimizer

_MOST_WHOLE = 40  # schedules that are all simulated although each takes a simulation of the whole model
_FEW = 8  # schedules of a longer list


def sweep(
    objective: Objective,
    batch: Any,
    sizes: Sequence[int],
    estimators: Iterable[Estimator] | None = None,
    optimizer: Optimizer | Customary | None = None,
    *,
    device: str | torch.device | None = None,
    probes: Sequence[int] = PROBES,
    on_progress: Callable[[str], None] = lambda what: None,
) -> Sweep:
    """Forecast a step of each estimator at each of many batch sizes, from simulations of a few of them.

    Law: each figure equals that of `plan` for this size, to the byte. `affine.pieces` finds the figures between the
    simulated sizes. Micro-batches of unequal sizes are left out: an estimator with k of them has figures at multiples
    of k.

    Args:
        objective: the model and the loss.
        batch: a typical training batch, which is resized.
        sizes: the batch sizes, increasing, each 1 or more.
        estimators: the estimators; None for the default candidates of `plan` and the schedules of `Within`.
        optimizer: the optimizer, or `Customary()`, as in `plan`; None leaves the update out of the step.
        device: where the step would run; None for the device of the model.
        probes: numbers of directions of the estimated gradients among the default candidates.
        on_progress: called before each simulation, with its description.
    Raises:
        BadInput: the number of examples of `batch` is not defined, or the loss cannot be evaluated on it.
        Unsupported: the loss can be evaluated, but not simulated.
    """
    require_objective(objective)
    if not sizes or sizes[0] < 1 or any(low >= high for low, high in pairwise(sizes)):
        raise BadInput(f"batch sizes increase and are 1 or more, not {list(sizes)}.")
    batch_size(batch)
    where = device_type(objective, device)
    works: dict[Optimizer | None, _Work] = {}

    def work_of(estimator: Estimator) -> _Work:
        chosen = None if optimizer is None else optimizer_of(optimizer, estimator)
        return works.setdefault(chosen, _Work(Forecasts(objective, batch, chosen, where), tuple(sizes), on_progress))

    on_progress("the loss on this batch")
    exact = work_of(Reverse())
    exact.forecasts.evaluate()
    is_default = estimators is None
    candidates = options(objective, sizes[-1], 1, where, probes) if estimators is None else estimators
    chosen = [each for each in candidates if not (is_default and find(each, Within))]
    methods = [method for method in (work_of(each).method(each) for each in chosen) if method.pieces]
    schedules = exact.schedules() if is_default else ()
    is_complete = bool(schedules) and all(each.least is not None for each in schedules)
    return Sweep(
        objective.dimension,
        where,
        optimizer,
        tuple(sizes),
        tuple(methods),
        schedules,
        exact.least() if is_complete else (),
        sum(work.simulated for work in works.values()),
    )


@dataclass
class _Work:
    """Computes samples. simulated: the number of forecasts."""

    forecasts: Forecasts
    sizes: tuple[int, ...]
    on_progress: Callable[[str], None]
    _seen: set[tuple[Estimator, int]] = field(default_factory=set)
    _tradeoffs: dict[int, MemoryTradeoff] = field(default_factory=dict)

    @property
    def simulated(self) -> int:
        return len(self._seen)

    @cached_property
    def seconds(self) -> Callable[[Forecast], float | None]:
        return seconds_estimator(self.forecasts.objective, self.forecasts.device or "cpu")

    def method(self, estimator: Estimator) -> SweptMethod:
        """Return the figures at the sizes that can be cut into equal micro-batches."""
        parts = micro_batches(estimator)
        each = [size // parts for size in self.sizes if size % parts == 0]
        return SweptMethod(estimator, tuple(pieces(lambda size: self.sample(estimator, parts * size), each)))

    def sample(self, estimator: Estimator, size: int) -> Sample:
        if (estimator, size) not in self._seen:
            self._seen.add((estimator, size))
            self.on_progress(f"{described(estimator)}, batch {size}")
        return self._figures(self.forecasts.of(estimator, size))

    def _figures(self, result: Forecast | str) -> Sample:
        if isinstance(result, str):
            return Sample((result,))
        numbers = (result.flops, result.forward, *(result.breakdown[each] for each in PURPOSES))
        memory = result.memory
        words = memory.operator, memory.module, memory.kernel if result.within_kernels else ""
        return Sample(words, (*numbers, result.within_kernels), self.seconds(result))

    def schedules(self) -> tuple[SweptSchedules, ...]:
        """Return the schedules of `Within`, by ranges of sizes with the same list; empty if there are none."""
        try:
            ranges = pieces(lambda size: Sample((repr(self._list(size)),)), self.sizes)
            return tuple(map(self._range, ranges))
        except (GradcostError, RuntimeError):  # as in `Forecasts.within`
            return ()

    def _tradeoff(self, size: int) -> MemoryTradeoff:
        if size not in self._tradeoffs:
            self.on_progress(f"checkpointing schedules, batch {size}")
            self._tradeoffs[size] = self.forecasts.tradeoff(1, size)[0]
        return self._tradeoffs[size]

    def _list(self, size: int) -> tuple[tuple[Items, ...], Items | None]:
        """Return the schedules at a size, and the one with the smallest peak; a few and None if they are too many."""
        tradeoff = self._tradeoff(size)
        items = tuple(point.items for point in tradeoff.points)
        is_short = len(items) <= _MOST_WHOLE or not tradeoff.forecast(items[0]).memory.timeline
        if not tradeoff.is_chain or not is_short:
            return tuple(evenly_spaced(items, _FEW)), None
        return items, tradeoff.least().items

    def _range(self, found: Piece) -> SweptSchedules:
        sizes = [size for size in self.sizes if found.first <= size <= found.last]
        items, least = self._list(sizes[0])

        def swept(schedule: Items) -> tuple[Items, tuple[Piece, ...]]:
            return schedule, tuple(pieces(lambda size: self._schedule(schedule, size), sizes))

        result = SweptSchedules(
            found.first, found.last, tuple(map(swept, items)), None if least is None else swept(least)
        )
        if least is not None:
            for size in sizes:
                if found_exceptions := exceptions(result, size):
                    result.exceptions[size] = found_exceptions
        return result

    def _schedule(self, items: Items, size: int) -> Sample:
        tradeoff = self._tradeoff(size)
        if (Reverse(Schedule(items)), size) not in self._seen:
            self.on_progress(f"{described(Reverse(Schedule(items)))}, batch {size}")
        self._seen.add((Reverse(Schedule(items)), size))
        found = self._figures(tradeoff.forecast(items))
        estimate = next((point.peak for point in tradeoff.points if point.items == items), 0)
        return found._replace(numbers=(*found.numbers, estimate))

    def least(self) -> tuple[Piece, ...]:
        """Return the figures of the smallest peak in micro-batches of one example."""

        def sample(size: int) -> Sample:
            try:
                items = self.forecasts.tradeoff(size, size)[0].least().items
            except (GradcostError, RuntimeError) as error:
                return Sample((str(error),))
            found = self.sample(Accumulated(Reverse(Schedule(items)), size), size)
            return found._replace(words=(*found.words, label(Reverse(Schedule(items)))))

        sizes = [size for size in self.sizes if size > 1]
        return tuple(pieces(sample, sizes)) if sizes else ()
