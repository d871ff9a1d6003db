"""Forecasts of a deep model from copies of it with fewer equal blocks, or from the whole model where that fails."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from gradcost.checkpointing.policies import Blocks, Everything, Saving, Schedule, Selective
from gradcost.checkpointing.replay import not_recomputed
from gradcost.checkpointing.schedules import Items
from gradcost.core.blocks import find_blocks
from gradcost.core.errors import GradcostError
from gradcost.core.interrupts import raise_interrupt
from gradcost.core.objective import Objective
from gradcost.directions import Directions, Gaussian, Rademacher, Sphere, StatefulDirections
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.estimators.structure import find
from gradcost.instruments.cuda_allocator import round_up
from gradcost.instruments.flops import Counts
from gradcost.planning.block_profile import Profile, profile
from gradcost.planning.by_schedule import BySchedule, schedule_of
from gradcost.planning.depth import SMALL, extrapolated, extrapolated_counts
from gradcost.planning.fake_model import on_fakes
from gradcost.planning.forecast import Forecast, Simulation, device_type, forward_counts, rounding, simulate
from gradcost.planning.repeated_blocks import Repeated, find_repeated, with_fewer
from gradcost.training.optimizers import Optimizer

_LEAST_BLOCKS = 16  # a model with fewer blocks is simulated as it is
# These do the same in each block. Others depend on the number of blocks (`Segments`) or on single leaves.
_ESTIMATORS = Reverse, Probing, Accumulated, Clipped
_SAVINGS = Everything, Blocks, Selective
_DIRECTIONS = Gaussian, Rademacher, Sphere


@dataclass(frozen=True)
class _Small:
    """A copy of the objective with fewer blocks. forward: the counts of its forward pass, by batch size."""

    objective: Objective
    parts: tuple[Repeated, ...]
    forward: dict[int | None, Counts]


class ByDepth:
    """Computes forecasts of an objective from copies of the model with few of its equal blocks.

    Law: each figure equals that of `forecast`, to the byte. The whole model is simulated instead if

    - it has fewer than 16 equal blocks, or the estimator may treat blocks differently;
    - the step is for CUDA, whose allocator is replayed from the log of a whole step;
    - the blocks do not run one after the other with equal allocations (`planning.depth`, `planning.by_schedule`);
    - the counts of one forward pass or the bytes of the parameters are not those that the copies predict.

    objective, optimizer, device: as in `forecast`.
    """

    def __init__(self, objective: Objective, optimizer: Optimizer | None, device: str | None) -> None:
        self._objective, self._optimizer, self._device = objective, optimizer, device
        self._whole: dict[int | None, Counts] = {}
        self._small: dict[int, _Small] = {}
        self._checked: set[Estimator] = set()  # estimators without an objection
        self._regular: dict[int | None, bool] = {}
        self._schedules: dict[tuple[int, int | None], BySchedule] = {}
        self.computed: list[Estimator] = []  # the estimators whose forecasts come from the copies

    def evaluate(self, batch: Any, size: int | None = None) -> Counts:
        """Return the counts of one forward pass of the whole model. Arguments and errors: as `forecast`."""
        if size not in self._whole:
            self._whole[size] = forward_counts(self._objective, batch, self._device)
        return self._whole[size]

    def forecast(self, estimator: Estimator, batch: Any, size: int | None = None) -> Forecast:
        """Return the forecast of a step. Errors: as `planning.forecast.forecast`.

        Args:
            estimator: the estimator.
            batch: the batch.
            size: a name of this batch: calls with equal sizes have equal batches.
        """
        for compute in (self._of_schedule, self._of_sweeps):
            try:
                result = compute(estimator, batch, size) if self._is_regular(batch, size) else None
            except Exception:  # also an error in a copy: the whole model gives the result or the right message
                result = None
            if result is not None:
                self.computed.append(estimator)
                return result
        simulation = simulate(
            estimator, self._objective, batch, self._optimizer, self._device, forward=self._whole.get(size)
        )
        self._whole[size] = simulation.forward
        return simulation.forecast

    def figures(self, batch: Any) -> Profile | None:
        """Return the bytes and FLOPs of each block of the whole model (`block_profile.profile`).

        None if they do not follow from copies with 3 and 4 blocks.
        """
        where = device_type(self._objective, self._device)

        def of(count: int) -> Profile:
            with on_fakes(self._copy(count).objective, batch, where) as (fake, fake_batch):
                return profile(fake, fake_batch, rounding(where))

        try:
            if self._chain is None or not self._is_regular(batch, None):
                return None
            three, four = of(3), of(4)
        except (GradcostError, ValueError, RuntimeError, NotImplementedError, TypeError, IndexError) as error:
            raise_interrupt(error)
            return None
        (first, inner, last), others = three.stages, four.stages
        is_chain = not (three.breaks or three.shared or four.breaks or four.shared)
        if not is_chain or others != (first, inner, inner, last) or three.epilogue != four.epilogue:
            return None
        count = self._chain.count
        return replace(
            four,
            stages=(first, *[inner] * (count - 2), last),
            base=four.base + (count - 4) * (four.base - three.base),
        )

    def _of_schedule(self, estimator: Estimator, batch: Any, size: int | None) -> Forecast | None:
        """Return the forecast of backpropagation under a schedule; None for another estimator or model."""
        chain = self._chain
        found = None if chain is None else schedule_of(estimator, chain.count)
        if chain is None or found is None:
            return None
        items, parts = found

        def on_copy(estimator: Estimator, count: int) -> tuple[Simulation, Repeated]:
            return self._simulated(estimator, count, batch, size, Counts()), self._copy(count).parts[0]

        def wrap(items: Items) -> Estimator:
            return Reverse(Schedule(items)) if parts == 1 else Accumulated(Reverse(Schedule(items)), parts)

        if (parts, size) not in self._schedules:
            self._schedules[parts, size] = BySchedule(on_copy, parts * self._objective.parts, wrap)
        forward, where = self.evaluate(batch, size).flops, device_type(self._objective, self._device)
        result = self._schedules[parts, size].forecast(estimator, items, chain, forward, where)
        return result if result.breakdown["parameters"] == self._parameter_bytes() else None

    def _of_sweeps(self, estimator: Estimator, batch: Any, size: int | None) -> Forecast | None:
        """Return the forecast of an estimator that does the same in each block; None for another estimator."""
        if not _is_uniform(estimator) or not self._parts:
            return None
        copies = [self._copy(count).parts for count in SMALL]
        count = self._parts[0].count
        result, forward = extrapolated(lambda n: self._simulated(estimator, n, batch, size), copies, count)
        whole = self.evaluate(batch, size)
        return result if forward == whole and result.breakdown["parameters"] == self._parameter_bytes() else None

    def _simulated(
        self, estimator: Estimator, count: int, batch: Any, size: int | None, forward: Counts | None = None
    ) -> Simulation:
        """Simulate a step of the copy with `count` blocks. forward: instead of the counts of a forward pass."""
        small = self._copy(count)
        known = small.forward.get(size, forward)
        # More probes, or more of the same blocks, raise no other objection.
        question = replace(estimator, probes=1) if isinstance(estimator, Probing) else estimator
        is_checked = question in self._checked
        result = simulate(
            estimator,
            small.objective,
            batch,
            self._optimizer,
            self._device,
            forward=known,
            is_checked=is_checked,
        )
        self._checked.add(question)
        if forward is None:
            small.forward[size] = result.forward
        return result

    def _copy(self, count: int) -> _Small:
        if count not in self._small:
            self._small[count] = _Small(*with_fewer(self._objective, self._parts, count), {})
        return self._small[count]

    def _is_regular(self, batch: Any, size: int | None) -> bool:
        """Return whether the counts of a forward pass are those that copies with 3 and 4 blocks predict."""
        if not self._parts or device_type(self._objective, self._device) == "cuda":
            return False  # CUDA's allocator is replayed from the log of a whole step
        if size not in self._regular:
            small = [self._copy(count) for count in SMALL[:2]]
            for each in small:
                if size not in each.forward:
                    each.forward[size] = forward_counts(each.objective, batch, self._device)
            three, four = (each.forward[size] for each in small)
            whole, count = self.evaluate(batch, size), self._parts[0].count
            self._regular[size] = whole == extrapolated_counts(three, four, [each.parts for each in small], count)
        return self._regular[size]

    def _parameter_bytes(self) -> int:
        """Return the bytes of the parameters of the whole model; tied ones count once."""
        block = rounding(device_type(self._objective, self._device))
        storages = {p.untyped_storage()._cdata: p.untyped_storage() for p in self._objective.model.parameters()}
        return sum(round_up(storage.nbytes(), block) for storage in storages.values())

    @cached_property
    def _parts(self) -> tuple[Repeated, ...]:
        parts = find_repeated(self._objective)
        if not parts or parts[0].count < _LEAST_BLOCKS or not_recomputed(self._objective):
            return ()
        return parts

    @cached_property
    def _chain(self) -> Repeated | None:
        """The repeated part if its units are the blocks of schedules; None if they are not."""
        if len(self._parts) != 1 or self._parts[0].period != 1:
            return None
        part, names = self._parts[0], {module: name for name, module in self._objective.model.named_modules()}
        blocks = [[names.get(module) for module in block] for block in find_blocks(self._objective.model)]
        return part if blocks == [[part.module(unit, "0")] for unit in range(part.count)] else None


def _is_uniform(estimator: Estimator) -> bool:
    """Return whether an estimator does the same in each block of equal blocks."""
    return (
        all(isinstance(part, _ESTIMATORS) for part in find(estimator, Estimator))
        and all(isinstance(part, _SAVINGS) for part in find(estimator, Saving))
        and all(
            isinstance(part, _DIRECTIONS)
            for kind in (Directions, StatefulDirections)
            for part in find(estimator, kind)
        )
    )
