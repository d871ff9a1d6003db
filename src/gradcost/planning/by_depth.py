"""Forecasts of a deep model from copies of it with fewer equal blocks, or from the whole model where that fails."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

from gradcost.checkpointing.policies import Blocks, Everything, Offloaded, Saving, Schedule, Selective
from gradcost.checkpointing.schedules import Items, schedule_length
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
from gradcost.instruments.flops import Counts
from gradcost.planning.block_profile import Profile, profile
from gradcost.planning.by_schedule import BySchedule, Growth, schedule_of
from gradcost.planning.copies import Copies, Size, size_of
from gradcost.planning.depth import SMALL, extrapolated
from gradcost.planning.fake_model import on_fakes
from gradcost.planning.forecast import Forecast, Simulation, device_type, input_bytes, rounding, simulate
from gradcost.planning.repeated_blocks import Repeated
from gradcost.training.optimizers import Optimizer

# These do the same in each block. Others depend on the number of blocks (`Segments`) or on single leaves.
_ESTIMATORS = Reverse, Probing, Accumulated, Clipped
_SAVINGS = Everything, Blocks, Selective, Offloaded
_DIRECTIONS = Gaussian, Rademacher, Sphere
_Compute: TypeAlias = Callable[[Estimator, Any], Forecast | None]


class ByDepth:
    """Computes forecasts of an objective from copies of the model with few of its equal blocks.

    Law: each figure equals that of `forecast`, to the byte; `Forecast.cuda` is None, because CUDA's allocator is
    replayed from the record of a whole step. The whole model is simulated instead if

    - it has fewer than 16 equal blocks, or the estimator may treat blocks differently;
    - the optimizer moves small leaves of several blocks at once;
    - the blocks do not run one after the other with equal allocations (`planning.depth`, `planning.by_schedule`);
    - the counts and the memory of a forward pass of the first batch, the figures of backprop on it, or the bytes of
      the parameters, are not those that the copies predict.

    Args:
        objective, optimizer, device: as in `forecast`. The batches differ in nothing but the number of examples.
        copies: the copies of the model, to share them; None for new ones.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizer | None,
        device: str | None,
        copies: Copies | None = None,
    ) -> None:
        self._objective, self._optimizer, self._device = objective, optimizer, device
        self._micro_batches = 1
        self._copies = Copies(objective, device) if copies is None else copies
        self._checked: set[tuple[Estimator, int | Size]] = set()  # estimators without an objection
        self._schedules: dict[Size, BySchedule] = {}
        self._growth = Growth()
        self.computed: list[Estimator] = []  # the estimators whose forecasts come from the copies

    def with_optimizer(self, optimizer: Optimizer | None) -> ByDepth:
        """Return one for another optimizer, with the same copies of the model."""
        other = ByDepth(self._objective, optimizer, self._device, self._copies)
        return other.in_micro_batches(self._micro_batches)

    def in_micro_batches(self, count: int) -> ByDepth:
        """Return one for batches in `count` micro-batches, which shares all that is learned."""
        result = copy.copy(self)
        result._micro_batches = count
        return result

    def evaluate(self, batch: Any) -> Counts:
        """Return the counts of one forward pass of the whole model. Arguments and errors: as `forecast`."""
        return self._copies.forward(batch, self._micro_batches)

    def forecast(self, estimator: Estimator, batch: Any) -> Forecast:
        """Return the forecast of a step. Errors: as `planning.forecast.forecast`."""
        for compute in (self._of_schedule, self._of_sweeps):
            if (result := self._from_copies(compute, estimator, batch)) is not None:
                return result
        return self.whole(estimator, batch)

    def of_schedule(self, estimator: Estimator, batch: Any) -> Forecast | None:
        """Return the forecast of backpropagation under a schedule, also in many micro-batches.

        None for another estimator, and where the forecast does not follow from the copies.
        """
        return self._from_copies(self._of_schedule, estimator, batch)

    def _from_copies(self, compute: _Compute, estimator: Estimator, batch: Any) -> Forecast | None:
        result = self._attempted(compute, estimator, batch)
        if result is not None:
            self.computed.append(estimator)
        return result

    def _attempted(self, compute: _Compute, estimator: Estimator, batch: Any) -> Forecast | None:
        try:
            return compute(estimator, batch) if self._is_regular(batch) else None
        except Exception as error:  # also one in a copy: the whole model gives the result or the right message
            raise_interrupt(error)
            return None

    def _is_regular(self, batch: Any) -> bool:
        """Return whether the copies predict a forward pass, and a step of backprop, of the whole model."""
        if self._optimizer is not None and self._copies.shares_updates:
            return False
        if not self._copies.is_regular(batch, self._micro_batches):
            return False
        if self._copies.predict_steps is None:
            self._copies.predict_steps, found = True, False  # true in this comparison
            try:
                found = self._predicts(Reverse(), batch)
            finally:
                self._copies.predict_steps = found
        return self._copies.predict_steps

    def _predicts(self, estimator: Estimator, batch: Any) -> bool:
        """Return whether the copies predict the figures of a step of the whole model."""
        computed = (self._attempted(compute, estimator, batch) for compute in (self._of_schedule, self._of_sweeps))
        found = next((result for result in computed if result is not None), None)
        if found is None:
            return False
        whole = self.whole(estimator, batch, replayed=False)
        return vars(found) == vars(replace(whole, memory=replace(whole.memory, timeline=())))

    def whole(self, estimator: Estimator, batch: Any, replayed: bool = True) -> Forecast:
        """Return the forecast of a step from a simulation of the whole model. Arguments and errors: as `simulate`."""
        objective, forward = self._objective.in_micro_batches(self._micro_batches), self.evaluate(batch)
        return simulate(
            estimator, objective, batch, self._optimizer, self._device, forward=forward, replayed=replayed
        ).forecast

    def figures(self, batch: Any) -> Profile | None:
        """Return the bytes and FLOPs of each block of the whole model (`block_profile.profile`).

        None if they do not follow from copies with 3 and 4 blocks.
        """
        where, chain = device_type(self._objective, self._device), self._copies.chain

        def of(count: int) -> Profile:
            objective, _ = self._copies.of(count, self._micro_batches)
            with on_fakes(objective, batch, where) as (fake, fake_batch):
                return profile(fake, fake_batch, rounding(where))

        try:
            if chain is None or not self._is_regular(batch):
                return None
            three, four = of(3), of(4)
        except (GradcostError, ValueError, RuntimeError, NotImplementedError, TypeError, IndexError) as error:
            raise_interrupt(error)
            return None
        (first, inner, last), others = three.stages, four.stages
        is_chain = not (three.breaks or three.shared or four.breaks or four.shared)
        if not is_chain or others != (first, inner, inner, last) or three.epilogue != four.epilogue:
            return None
        return replace(
            four,
            stages=(first, *[inner] * (chain.count - 2), last),
            base=four.base + (chain.count - 4) * (four.base - three.base),
        )

    def _of_schedule(self, estimator: Estimator, batch: Any) -> Forecast | None:
        """Return the forecast of backpropagation under a schedule; None for another estimator or model."""
        chain = self._copies.chain
        found = None if chain is None else schedule_of(estimator, chain.count)
        if chain is None or found is None:
            return None
        items, parts = found
        forward, where = self.evaluate(batch).flops, device_type(self._objective, self._device)
        count = parts * self._micro_batches
        three = self._copies.three_parts(batch, count, self._objective.parts)
        size = size_of(batch, count) if three is None else size_of(three, 3)
        short = batch if three is None else three

        def on_copy(items: Items) -> tuple[Simulation, Repeated]:
            blocks = schedule_length(items)
            simulation = self._simulated(Reverse(Schedule(items)), blocks, short, size.micro_batches, Counts())
            return simulation, self._copies.of(blocks)[1][0]

        if size not in self._schedules:
            self._schedules[size] = BySchedule(on_copy, size.micro_batches * self._objective.parts, self._growth)
        more = (count - size.micro_batches) * self._objective.parts
        result = self._schedules[size].forecast(estimator, items, chain, forward, where, more)
        block = rounding(where)
        if result is None:
            return None
        result = result.with_more("inputs", 0, input_bytes(batch, block) - input_bytes(short, block))
        return result if result.breakdown["parameters"] == self._copies.parameter_bytes else None

    def _of_sweeps(self, estimator: Estimator, batch: Any) -> Forecast | None:
        """Return the forecast of an estimator that does the same in each block; None for another estimator."""
        if not _is_uniform(estimator):
            return None

        def on_copy(count: int) -> Simulation:
            forward = self._copies.forward_of(count, batch, self._micro_batches)
            return self._simulated(estimator, count, batch, self._micro_batches, forward)

        parts = [self._copies.of(count)[1] for count in SMALL]
        result, forward = extrapolated(on_copy, parts, self._copies.parts[0].count)
        is_right = result.breakdown["parameters"] == self._copies.parameter_bytes
        return result if is_right and forward == self.evaluate(batch) else None

    def _simulated(
        self, estimator: Estimator, count: int, batch: Any, micro_batches: int, forward: Counts
    ) -> Simulation:
        """Simulate a step of the copy with `count` blocks. forward: the counts of a forward pass, if they matter."""
        # More probes, or more of the same blocks, raise no other objection. Fewer examples than parts do.
        question = replace(estimator, probes=1) if isinstance(estimator, Probing) else estimator
        size = size_of(batch, micro_batches) if find(estimator, Accumulated) else micro_batches
        result = simulate(
            estimator,
            self._copies.of(count, micro_batches)[0],
            batch,
            self._optimizer,
            self._device,
            forward=forward,
            is_checked=(question, size) in self._checked,
            replayed=False,
        )
        self._checked.add((question, size))
        return result


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
