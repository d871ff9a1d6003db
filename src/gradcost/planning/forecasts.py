"""Forecasts of many estimators at many batch sizes, each computed once, and the largest batch that fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from gradcost.checkpointing.policies import Offloaded, Schedule
from gradcost.core.errors import BadInput, GradcostError, Unsupported, brief
from gradcost.core.objective import Objective
from gradcost.core.pytree import batch_size
from gradcost.directions import Rademacher
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.estimators.structure import find, micro_batches, unwrapped
from gradcost.instruments.memory import STANDING, Purpose
from gradcost.noise.philox import Signs, Stream
from gradcost.planning.batch import largest, resized
from gradcost.planning.by_depth import ByDepth
from gradcost.planning.copies import Copies
from gradcost.planning.forecast import Forecast, device_type, input_bytes, rounding
from gradcost.planning.within import MemoryTradeoff, Within
from gradcost.slopes.slope import Jvp
from gradcost.training.optimizers import Optimizer

_MOST_PASSES = 64  # along directions; more of them are extrapolated


class Forecasts:
    """Computes the forecasts of one objective and caches them; a failed forecast is cached as its reason.

    - A model of at least 16 equal blocks is simulated with few of them (`ByDepth`).
    - Each micro-batch after the third costs as much as the third.
    - Each forward pass after the 64th, along further directions, adds the FLOPs and the bytes of the 64th.
      On CUDA the peak can then be wrong by one block of the allocator, 512 bytes.

    Args:
        objective, batch, optimizer, device: as in `forecast`.
        copies: the copies of the model with few of its blocks, to share them; None for new ones.
        is_whole: whether the whole model is simulated, also if it has many equal blocks.
    """

    def __init__(
        self,
        objective: Objective,
        batch: Any,
        optimizer: Optimizer | None,
        device: str | None,
        copies: Copies | None = None,
        is_whole: bool = False,
    ) -> None:
        self.objective, self.batch, self.optimizer, self.device = objective, batch, optimizer, device
        self._known: dict[tuple[Estimator, int | None], Forecast | str] = {}
        self._least: dict[tuple[int, int | None], int | None] = {}
        self._schedules: dict[Estimator, Estimator] = {}  # of `Within`, with micro-batches or without
        self._copies = Copies(objective, device) if copies is None else copies
        self._by_depth = ByDepth(objective, optimizer, device, self._copies)
        self._is_whole = is_whole

    def evaluate(self) -> None:
        """Simulate one forward pass of the batch.

        Raises:
            BadInput: the loss raises on this batch, or is not a scalar.
            Unsupported: the loss cannot be simulated.
        """
        self._by_depth.evaluate(self.batch)

    def of(self, estimator: Estimator, size: int | None = None) -> Forecast | str:
        """Return the forecast for `size` examples (None: the size of `batch`), or the reason why it fails."""
        if (estimator, size) not in self._known:
            try:
                self._known[estimator, size] = self._forecast(estimator, size)
            except GradcostError as error:
                self._known[estimator, size] = str(error)
            except (ValueError, RuntimeError, NotImplementedError, TypeError, IndexError) as error:
                self._known[estimator, size] = f"it fails on this model: {brief(error)}"
        return self._known[estimator, size]

    @property
    def standing(self) -> int:
        """Return the bytes that every step needs: parameters, buffers, batch and the optimizer's state; 0 if unknown.

        The estimators so far that keep no state have the smallest of these sums.
        """
        purposes: tuple[Purpose, ...] = (*STANDING, "optimizer state")
        known = [result for result in self._known.values() if isinstance(result, Forecast)]
        return min((sum(result.breakdown[purpose] for purpose in purposes) for result in known), default=0)

    def peak(self, estimator: Estimator, size: int, budget: int) -> int | None:
        """Return the peak bytes of a step with `size` examples; None if the step is impossible.

        For `Within(budget)`: the smallest peak of any schedule, because the step fits exactly if that schedule fits.
        """
        if any(saving.bytes == budget for saving in find(estimator, Within)):
            return self.least(micro_batches(estimator), size)
        result = self.of(estimator, size)
        return None if isinstance(result, str) else result.peak

    def least(self, parts: int, size: int | None = None) -> int | None:
        """Return the smallest peak of any schedule with `parts` micro-batches; None if there is no schedule."""
        if (parts, size) not in self._least:
            try:
                tradeoff, omitted_bytes = self.tradeoff(parts, size)
                least = tradeoff.least()
                self._least[parts, size] = omitted_bytes + least.peak
                if parts == 1:
                    self._known[Reverse(Schedule(least.items)), size] = tradeoff.forecast(least.items)
            except (GradcostError, RuntimeError):
                self._least[parts, size] = None
        return self._least[parts, size]

    def tradeoff(self, parts: int = 1, size: int | None = None) -> tuple[MemoryTradeoff, int]:
        """Return the schedules for `parts` micro-batches, and the bytes to add to their peaks.

        The schedules are simulated on a shorter batch (`fewer`). The bytes are those of the rest of the batch.
        """
        objective, batch, omitted_bytes = self.fewer(parts, size)
        by_depth = self._in_micro_batches_of(objective)
        return MemoryTradeoff(objective, batch, self.optimizer, self.device, by_depth), omitted_bytes

    def _in_micro_batches_of(self, objective: Objective) -> ByDepth:
        return self._by_depth.in_micro_batches(objective.parts // self.objective.parts)

    def within(self, budget: int, parts: int = 1) -> tuple[Estimator, Forecast | str]:
        """Return `Within(budget, beside)` with `parts` micro-batches, and its forecast or why the forecast fails."""
        try:
            schedule = self._cheapest(budget, parts)
            objective, batch, omitted_bytes = self.fewer(parts)
            bare = self._in_micro_batches_of(objective).with_optimizer(None).forecast(schedule, batch)
            without_optimizer = omitted_bytes + bare.peak
        except (GradcostError, RuntimeError) as error:
            return _in_parts(Reverse(Within(budget)), parts), str(error)
        estimator = _in_parts(Reverse(Within(budget, budget - without_optimizer)), parts)
        self._schedules[estimator] = _in_parts(schedule, parts)
        result = self.of(self._schedules[estimator])
        return estimator, result if isinstance(result, str) else replace(result, estimator=estimator)

    def with_reserved(self, result: Forecast) -> Forecast:
        """Return a forecast of `of` or `within` with `Forecast.cuda`, which takes a simulation of the whole model."""
        if result.device != "cuda" or result.cuda is not None:
            return result
        whole = Forecasts(self.objective, self.batch, self.optimizer, self.device, self._copies, is_whole=True)
        found = whole.of(self._schedules.get(result.estimator, result.estimator))
        return result if isinstance(found, str) else replace(result, cuda=found.cuda)

    def cost_within(self, budget: int, parts: int = 1) -> Forecast | str:
        """Return the forecast of `within`, at less cost: its estimator is the schedule itself."""
        try:
            return self.of(_in_parts(self._cheapest(budget, parts), parts))
        except (GradcostError, RuntimeError) as error:
            return str(error)

    def _cheapest(self, budget: int, parts: int) -> Reverse:
        """Return the schedule with the fewest FLOPs that fits with `parts` micro-batches."""
        tradeoff, omitted_bytes = self.tradeoff(parts)
        items = tradeoff.cheapest(budget - omitted_bytes).items
        schedule = Reverse(Schedule(items))
        if parts == 1:
            self._known[schedule, None] = tradeoff.forecast(items)
        return schedule

    @property
    def examples(self) -> int | None:
        """The number of examples in the batch; None if the first dimensions of its tensors differ."""
        try:
            return batch_size(self.batch)
        except BadInput:
            return None

    def fewest_parts(self, budget: int) -> int | None:
        """Return the fewest micro-batches (2, 4, 8, ... or all examples) with which `Within(budget)` fits.

        None if none fits, or if the first dimensions of the batch's tensors differ.
        """
        examples = self.examples
        if examples is None:
            return None
        counts = [*(1 << power for power in range(1, examples.bit_length()) if 1 << power < examples), examples]
        if examples < 2 or self.standing > budget or not self._fits(counts[-1], budget):
            return None
        return next(parts for parts in counts if self._fits(parts, budget))

    def _fits(self, parts: int, budget: int) -> bool:
        least = self.least(parts)
        return least is not None and least <= budget

    def fewer(self, parts: int, size: int | None = None) -> tuple[Objective, Any, int]:
        """Return what to simulate instead of `parts` micro-batches of the same size: 3 of them, if there are more.

        Returns:
            The objective in at most 3 micro-batches, the shortened batch, and the bytes by which it was shortened. If
            the batch cannot be cut into equal parts: all micro-batches, the whole batch, and 0.
        """
        full_batch = self._batch(size)
        short = self._copies.three_parts(full_batch, parts)
        if short is None:
            return (self.objective if parts == 1 else self.objective.in_micro_batches(parts)), full_batch, 0
        return self.objective.in_micro_batches(3), short, self._bytes(full_batch) - self._bytes(short)

    def largest(self, estimator: Estimator, budget: int) -> int:
        """Return the largest batch whose step fits; 0 if no size fits, MOST if every size fits.

        Raises:
            BadInput: the first dimensions of the batch's tensors differ.
        """
        size, parts = batch_size(self.batch), micro_batches(estimator)

        def peak(examples: int) -> int | None:
            return self.peak(estimator, examples, budget)

        return largest(peak, budget, size, parts)

    def _forecast(self, estimator: Estimator, size: int | None) -> Forecast:
        by_schedule = None if self._is_whole else self._by_depth.of_schedule(estimator, self._batch(size))
        found = self._extrapolated_parts(estimator, size) if by_schedule is None else by_schedule
        if found is not None:
            return found
        if (found := self._extrapolated_passes(estimator, size)) is not None:
            return found
        compute = self._by_depth.whole if self._is_whole else self._by_depth.forecast
        return compute(estimator, self._batch(size))

    def _extrapolated_passes(self, estimator: Estimator, size: int | None) -> Forecast | None:
        """Extrapolate from 63 and 64 forward passes; None for an estimator with at most 64."""
        more = _passes(estimator) - _MOST_PASSES
        if more < 1:
            return None
        before, last = (
            self._forecast_or_raise(_with_fewer_passes(estimator, fewer), size) for fewer in (more + 1, more)
        )
        result = replace(_extrapolate(before, last, more), estimator=estimator)
        for purpose, size_of_last in last.breakdown.items():
            growth = more * (size_of_last - before.breakdown[purpose])
            result = result.with_more(purpose, growth, growth)
        return result

    def _extrapolated_parts(self, estimator: Estimator, size: int | None) -> Forecast | None:
        """Extrapolate from two and three micro-batches of the same size; None if that is impossible."""
        if not isinstance(estimator, Accumulated) or _depends_on_bytes(estimator.estimator):
            return None
        full_batch = self._batch(size)
        short = self._copies.three_parts(full_batch, estimator.parts)
        if short is None:
            return None
        each = batch_size(short) // 3
        two, three = (self._forecast_or_raise(replace(estimator, parts=n), each * n) for n in (2, 3))
        result = replace(_extrapolate(two, three, estimator.parts - 3), estimator=estimator)
        if min(result.counts.work.values(), default=0) < 0:  # BatchNorm's operators depend on the size of the batch
            return None
        requested = input_bytes(full_batch) - input_bytes(short)
        return result.with_more("inputs", requested, self._bytes(full_batch) - self._bytes(short))

    def _forecast_or_raise(self, estimator: Estimator, size: int | None) -> Forecast:
        result = self.of(estimator, size)
        if isinstance(result, str):
            raise Unsupported(result)
        return result

    def _bytes(self, batch: Any) -> int:
        return input_bytes(batch, rounding(device_type(self.objective, self.device)))

    def _batch(self, size: int | None) -> Any:
        return self.batch if size is None else resized(self.batch, size)


def _in_parts(estimator: Estimator, parts: int) -> Estimator:
    return estimator if parts == 1 else Accumulated(estimator, parts)


def offloads(estimator: Estimator) -> bool:
    """Return whether the estimator moves activations to other memory and back. Forecasts omit these transfers."""
    return bool(find(estimator, Offloaded))


def stream(estimator: Estimator) -> Stream | None:
    """Return Signs() if the estimator draws random signs, which are cheaper than normal numbers; None otherwise."""
    return Signs() if find(estimator, Rademacher) else None


def _depends_on_bytes(estimator: Estimator) -> bool:
    """Whether the estimator chooses its schedule by the bytes of a step, which depend on the batch size."""
    return bool(find(estimator, Within))


def _passes(estimator: Estimator) -> int:
    """Return the number of forward passes along directions; 0 for other estimators."""
    probing = unwrapped(estimator)
    return -(-probing.probes // _together(probing)) if isinstance(probing, Probing) else 0


def _with_fewer_passes(estimator: Estimator, fewer: int) -> Estimator:
    """Return the estimator with fewer forward passes."""
    if not isinstance(estimator, Probing):  # a wrapper with the cost of `inner`
        inner = _with_fewer_passes(cast(Estimator, estimator.inner), fewer)
        return replace(cast(Any, estimator), estimator=inner)
    return replace(estimator, probes=estimator.probes - fewer * _together(estimator))


def _together(probing: Probing) -> int:
    """Return the number of directions that share a forward pass."""
    return probing.slope.together if isinstance(probing.slope, Jvp) else 1


def _extrapolate(before: Forecast, last: Forecast, more: int) -> Forecast:
    """Add the counts, the message and the forward FLOPs by which `last` exceeds `before`, `more` times, to `last`."""
    counts = last.counts.extrapolated(before.counts, more)
    message = last.message + more * (last.message - before.message)
    forward = last.forward + more * (last.forward - before.forward)
    return replace(last, counts=counts, message=message, forward=forward)
