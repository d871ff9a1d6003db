"""The figures of a plan at many batch sizes: a few sizes are simulated, the others are on confirmed lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch

from gradcost.checkpointing.optimal import Items
from gradcost.checkpointing.policies import Schedule
from gradcost.core.errors import BadInput, GradcostError
from gradcost.core.objective import Objective
from gradcost.core.pytree import batch_size
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.estimator import Estimator, require_objective
from gradcost.estimators.reverse import Reverse
from gradcost.estimators.structure import find, micro_batches
from gradcost.instruments.memory import PURPOSES
from gradcost.planning.affine import Piece, Sample, piece_of, pieces
from gradcost.planning.candidates import described, label, options, terse
from gradcost.planning.curve import evenly_spaced
from gradcost.planning.forecast import Forecast, device_type
from gradcost.planning.forecasts import Forecasts, offloads
from gradcost.planning.plan import seconds_estimator
from gradcost.planning.recommend import family
from gradcost.planning.row import COLUMNS, Row
from gradcost.planning.within import MemoryTradeoff, Within, last_that_fits
from gradcost.theory.moments import second_moment
from gradcost.training.optimizers import Optimizer

FIGURES = ("flops", "forward", *PURPOSES, "within_kernels")  # the numbers of a sample; the purposes sum to the peak
_PEAK = slice(2, 2 + len(PURPOSES))
_MOST_WHOLE = 40  # schedules that are all simulated although each takes a simulation of the whole model
_FEW = 8  # schedules of a longer list


@dataclass(frozen=True)
class SweptMethod:
    """One method at many batch sizes. pieces: the numbers are FIGURES, the words where the peak is, or a refusal."""

    estimator: Estimator
    pieces: tuple[Piece, ...]

    @property
    def parts(self) -> int:
        """The number of micro-batches. There are figures for its multiples only."""
        return micro_batches(self.estimator)

    def record(self, dimension: int) -> dict[str, Any]:
        """Return the method as plain JSON data. dimension: the number of trainable weights."""
        row = Row(self.estimator, None, steps=second_moment(self.estimator, dimension))
        return {
            "method": row.method,
            "write": label(self.estimator),
            "estimator": repr(self.estimator),
            "family": family(self.estimator),
            "exact": row.exact,
            "offloads": offloads(self.estimator),
            "parts": self.parts,
            "steps": row.steps,
            "steps cell": row.cells()[COLUMNS.index("steps × (theory)")],
            "pieces": [_record(piece) for piece in self.pieces],
        }


@dataclass(frozen=True)
class SweptSchedules:
    """The checkpointing schedules from which `Within(budget)` chooses, at the sizes from `first` to `last`.

    Args:
        first: the smallest size.
        last: the largest size.
        schedules: each schedule with its pieces, in the order of `MemoryTradeoff.points`. The last number of a sample
            is the peak that `MemoryTradeoff` estimates.
        least: the schedule with the smallest peak, with its pieces; None if the list is not complete.
        exceptions: by size, (low, high, index): the budgets from low, and below high, for which the search finds this
            index and not the last one that fits; high is None without a bound, and the index is -1 for none.
    """

    first: int
    last: int
    schedules: tuple[tuple[Items, tuple[Piece, ...]], ...]
    least: tuple[Items, tuple[Piece, ...]] | None
    exceptions: dict[int, list[tuple[int, int | None, int]]] = field(default_factory=dict)

    def chosen(self, size: int, budget: int) -> tuple[Items, Sample] | None:
        """Return the schedule of `Within(budget)` and its figures; None if no schedule fits."""
        samples = [_at(found, size) for _, found in self.schedules]
        index = max((i for i, each in enumerate(samples) if peak(each) <= budget), default=-1)
        for low, high, other in self.exceptions.get(size, ()):
            if low <= budget and (high is None or budget < high):
                index = other
        if index >= 0:
            return self.schedules[index][0], samples[index]
        if self.least is not None and peak(_at(self.least[1], size)) <= budget:
            return self.least[0], _at(self.least[1], size)
        return None

    def record(self) -> dict[str, Any]:
        return {
            "first": self.first,
            "last": self.last,
            "schedules": [_schedule_record(*each) for each in self.schedules],
            "least": None if self.least is None else _schedule_record(*self.least),
            "exceptions": {str(size): [list(each) for each in found] for size, found in self.exceptions.items()},
        }


@dataclass(frozen=True)
class Sweep:
    """The figures of one objective at many batch sizes.

    Args:
        weights: the number of trainable weights.
        device: the type of device.
        optimizer: the optimizer; None leaves the update out of the step.
        sizes: the batch sizes, increasing.
        methods: the methods, refused ones included.
        schedules: the schedules of `Within`, by ranges of sizes; empty if the methods were given.
        least: the nested checkpointing with the smallest peak in micro-batches of one example; the last word of a
            sample is the expression of one micro-batch.
        simulated: the number of simulated pairs of a method and a size.
    """

    weights: int
    device: str
    optimizer: Optimizer | None
    sizes: tuple[int, ...]
    methods: tuple[SweptMethod, ...]
    schedules: tuple[SweptSchedules, ...]
    least: tuple[Piece, ...]
    simulated: int

    def record(self) -> dict[str, Any]:
        """Return the sweep as plain JSON data."""
        return {
            "weights": self.weights,
            "device": self.device,
            "optimizer": None if self.optimizer is None else terse(self.optimizer),
            "sizes": list(self.sizes),
            "figures": list(FIGURES),
            "methods": [method.record(self.weights) for method in self.methods],
            "schedules": [each.record() for each in self.schedules],
            "least": [_record(piece) for piece in self.least],
            "simulated": self.simulated,
        }


def sweep(
    objective: Objective,
    batch: Any,
    sizes: Sequence[int],
    estimators: Iterable[Estimator] | None = None,
    optimizer: Optimizer | None = None,
    *,
    device: str | torch.device | None = None,
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
        optimizer: the optimizer; None leaves the update out of the step.
        device: where the step would run; None for the device of the model.
        on_progress: called before each simulation, with its description.
    Raises:
        BadInput: the number of examples of `batch` is not defined, or the loss cannot be evaluated on it.
        Unsupported: the loss can be evaluated, but not simulated.
    """
    require_objective(objective)
    if not sizes or sizes[0] < 1 or any(low >= high for low, high in pairwise(sizes)):
        raise BadInput(f"batch sizes increase and are 1 or more, not {list(sizes)}.")
    batch_size(batch)
    work = _Work(Forecasts(objective, batch, optimizer, device_type(objective, device)), tuple(sizes), on_progress)
    where = work.forecasts.device or "cpu"
    on_progress("the loss on this batch")
    work.forecasts.evaluate()
    is_default = estimators is None
    candidates = options(objective, sizes[-1], 1, where) if estimators is None else estimators
    chosen = [each for each in candidates if not (is_default and find(each, Within))]
    methods = [SweptMethod(each, work.method(each)) for each in chosen if work.multiples(each)]
    schedules = work.schedules() if is_default else ()
    is_complete = bool(schedules) and all(each.least is not None for each in schedules)
    return Sweep(
        objective.dimension,
        where,
        optimizer,
        tuple(sizes),
        tuple(methods),
        schedules,
        work.least() if is_complete else (),
        work.simulated,
    )


@dataclass
class _Work:
    """Computes samples. simulated: the number of forecasts."""

    forecasts: Forecasts
    sizes: tuple[int, ...]
    on_progress: Callable[[str], None]
    _seen: set[tuple[Estimator, int]] = field(default_factory=set)

    @property
    def simulated(self) -> int:
        return len(self._seen)

    @cached_property
    def seconds(self) -> Callable[[Forecast], float | None]:
        return seconds_estimator(self.forecasts.objective, self.forecasts.device or "cpu")

    def multiples(self, estimator: Estimator) -> list[int]:
        """Return the sizes that can be cut into equal micro-batches."""
        return [size for size in self.sizes if size % micro_batches(estimator) == 0]

    def method(self, estimator: Estimator) -> tuple[Piece, ...]:
        return tuple(pieces(lambda size: self.sample(estimator, size), self.multiples(estimator)))

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
        self.on_progress(f"checkpointing schedules, batch {size}")
        return self.forecasts.tradeoff(1, size)[0]

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
                if exceptions := _exceptions(result, size):
                    result.exceptions[size] = exceptions
        return result

    def _schedule(self, items: Items, size: int) -> Sample:
        tradeoff = self._tradeoff(size)
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


def peak(sample: Sample) -> int:
    """Return the peak bytes of a step."""
    return sum(sample.numbers[_PEAK])


def _at(found: Sequence[Piece], size: int) -> Sample:
    piece = piece_of(found, size)
    assert piece is not None
    return piece.at(size)


def _exceptions(found: SweptSchedules, size: int) -> list[tuple[int, int | None, int]]:
    """Return the budgets for which the search does not find the last schedule that fits (`exceptions`)."""
    samples = [_at(each, size) for _, each in found.schedules]
    peaks, estimates = [peak(sample) for sample in samples], [sample.numbers[-1] for sample in samples]
    if all(low <= high for low, high in pairwise(peaks)):
        return []
    result: list[tuple[int, int | None, int]] = []
    limits = sorted({*peaks, *estimates})  # between two of these, no comparison of the search changes
    for low, high in zip(limits, [*limits[1:], None], strict=True):
        last = max((i for i, each in enumerate(peaks) if each <= low), default=-1)
        index = last_that_fits(estimates, peaks.__getitem__, low)
        if index != last:
            if result and result[-1][1:] == (low, index):
                low = result.pop()[0]
            result.append((low, high, index))
    return result


def _record(piece: Piece) -> dict[str, Any]:
    return {
        "first": piece.first,
        "last": piece.last,
        "words": list(piece.words),
        "lines": [list(line) for line in piece.lines[: len(FIGURES)]],
        "seconds": None if piece.seconds is None else list(piece.seconds),
        "computed": list(piece.computed),
    }


def _schedule_record(items: Items, found: Sequence[Piece]) -> dict[str, Any]:
    return {"write": label(Reverse(Schedule(items))), "pieces": [_record(piece) for piece in found]}
