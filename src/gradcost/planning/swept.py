"""The results of a sweep: the figures of each method and of the schedules of `Within`, as pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from gradcost.checkpointing.policies import Schedule
from gradcost.checkpointing.schedules import Items
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.reverse import Reverse
from gradcost.estimators.structure import micro_batches
from gradcost.instruments.memory import PURPOSES
from gradcost.planning.affine import Piece, Sample, piece_of
from gradcost.planning.candidates import label, terse
from gradcost.planning.forecasts import offloads
from gradcost.planning.recommend import family
from gradcost.planning.row import Row
from gradcost.planning.within import last_that_fits
from gradcost.theory.moments import second_moment
from gradcost.training.customary import Customary
from gradcost.training.optimizers import Optimizer

FIGURES = ("flops", "forward", *PURPOSES, "within_kernels")  # the numbers of a sample; the purposes sum to the peak
_PEAK = slice(2, 2 + len(PURPOSES))


@dataclass(frozen=True)
class SweptMethod:
    """One method at many batch sizes.

    Args:
        estimator: the estimator.
        pieces: the figures by the number of examples in a micro-batch. The numbers of a sample are FIGURES, its words
            say where the peak is; or there is one word, the refusal.
    """

    estimator: Estimator
    pieces: tuple[Piece, ...]

    @property
    def parts(self) -> int:
        """The number of micro-batches. There are figures for its multiples only."""
        return micro_batches(self.estimator)

    def at(self, size: int) -> Sample | None:
        """Return the figures at a batch size; None if they are unknown."""
        piece = None if size % self.parts else piece_of(self.pieces, size // self.parts)
        return None if piece is None else piece.at(size // self.parts)

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
            "steps cell": row.steps_text,
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
        optimizer: the optimizer, or `Customary()`; None leaves the update out of the step.
        sizes: the batch sizes, increasing.
        methods: the methods, refused ones included.
        schedules: the schedules of `Within`, by ranges of sizes; empty if the methods were given.
        least: the nested checkpointing with the smallest peak in micro-batches of one example; the last word of a
            sample is the expression of one micro-batch.
        simulated: the number of simulated pairs of a method and a size.
    """

    weights: int
    device: str
    optimizer: Optimizer | Customary | None
    sizes: tuple[int, ...]
    methods: tuple[SweptMethod, ...]
    schedules: tuple[SweptSchedules, ...]
    least: tuple[Piece, ...]
    simulated: int

    @property
    def _optimizer_text(self) -> str | None:
        if isinstance(self.optimizer, Customary):
            return "AdamW for exact gradients, SGD for the others"
        return None if self.optimizer is None else terse(self.optimizer)

    def record(self) -> dict[str, Any]:
        """Return the sweep as plain JSON data."""
        return {
            "weights": self.weights,
            "device": self.device,
            "optimizer": self._optimizer_text,
            "sizes": list(self.sizes),
            "figures": list(FIGURES),
            "methods": [method.record(self.weights) for method in self.methods],
            "schedules": [each.record() for each in self.schedules],
            "least": [_record(piece) for piece in self.least],
            "simulated": self.simulated,
        }


def peak(sample: Sample) -> int:
    """Return the peak bytes of a step."""
    return sum(sample.numbers[_PEAK])


def _at(found: Sequence[Piece], size: int) -> Sample:
    piece = piece_of(found, size)
    assert piece is not None
    return piece.at(size)


def exceptions(found: SweptSchedules, size: int) -> list[tuple[int, int | None, int]]:
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
