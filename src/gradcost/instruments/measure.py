"""Measure any function with several instruments, one after the other, so that none disturbs another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.pytree import tensors
from gradcost.core.value import value
from gradcost.estimators.estimator import Estimate, Estimator, require_estimator, require_objective
from gradcost.instruments.allocator import Allocated, allocated
from gradcost.instruments.flops import Counts, OpCounter
from gradcost.instruments.memory import Memory, MemoryTracker
from gradcost.instruments.timing import Timing, time_steps
from gradcost.training.optimizers import Optimizer, require_optimizer
from gradcost.training.train_state import TrainState

Work = Callable[[], object]


class TrainingStep:
    """A function to measure: each call is one training step on one batch, and trains the model.

    `Bytes` also counts the batch and the optimizer's state of a `TrainingStep`. The optimizer makes its state in the
    warm-up of `measure`.

    Args:
        objective: the model and the loss.
        batch: any pytree; passed to the loss as it is.
        estimator: the gradient estimator.
        optimizer: the optimizer; None computes estimates and moves no weight.
    Raises:
        Unsupported: the estimator does not support this model or batch; the message names the cause.
    """

    def __init__(
        self, objective: Objective, batch: Any, estimator: Estimator, optimizer: Optimizer | None = None
    ) -> None:
        require_estimator(estimator)
        require_objective(objective)
        if optimizer is not None:
            require_optimizer(optimizer)
        objection = estimator.objection(objective, batch)
        if objection is not None:
            raise Unsupported(objection)
        self.model, self.batch = objective.model, batch
        self.train_state = TrainState(objective, estimator, optimizer)
        self.device = objective.leaves[0].parameter.device.type

    def __call__(self) -> Estimate:
        return self.train_state.step(self.batch, Key(0).fold("step", self.train_state.taken))


@dataclass(frozen=True, eq=False)
class Measurement:
    """The readings of all instruments. str() returns a table. A field is None if its instrument did not run.

    Args:
        memory: from `Bytes`: peak memory of the tensors, its breakdown by purpose, and the operator that reached it.
        standing: from `Bytes`: bytes of `memory` that were allocated before the run; 0 without `Bytes`.
        counts: from `Operations`: FLOPs, matrix products and bytes moved.
        timing: from `Seconds`: milliseconds of every run.
        allocated: from `Allocator`: peak bytes requested from torch's allocator, without those from before the run.
    """

    memory: Memory | None = None
    standing: int = 0
    counts: Counts | None = None
    timing: Timing | None = None
    allocated: Allocated | None = None

    @property
    def seen(self) -> float | None:
        """Return the tracker's peak / the allocator's, without bytes from before the run; None if one is missing."""
        if self.memory is None or self.allocated is None or not self.allocated.peak:
            return None
        return (self.memory.peak - self.standing) / self.allocated.peak

    def __str__(self) -> str:
        sections = {
            "memory": self.memory and _memory_lines(self.memory),
            "arithmetic": self.counts and _count_lines(self.counts),
            "time": self.timing and _timing_lines(self.timing),
            "allocator": self.allocated and _allocator_lines(self.allocated, self.seen),
        }
        rows = [
            (name if i == 0 else "", line) for name, lines in sections.items() for i, line in enumerate(lines or [])
        ]
        return "\n".join(f"{name:<12}{line}" for name, line in rows)


class Instrument(ABC):
    """Reads one cost of a function. It may run the function several times."""

    @abstractmethod
    def read(self, work: Work, measurement: Measurement) -> Measurement:
        """Run the work and add this instrument's reading.

        Args:
            work: the function to measure.
            measurement: the readings so far.
        Returns:
            A copy of `measurement` with this reading.
        """


@dataclass(frozen=True, eq=False)
class Bytes(Instrument):
    """Reads the peak memory of the tensors in one run (`MemoryTracker`), by purpose, and where it is reached.

    Tensors allocated before the run count only if they belong to the model, the inputs or a `TrainingStep`.

    Args:
        model: its parameters and buffers count, and the reading names its modules. None: the model of the
            `TrainingStep`; no model for another function.
        inputs: the batch, any pytree; its tensors count. The batch of a `TrainingStep` is added.
        device: the type of device whose memory is tracked. None: the device of the `TrainingStep`; "cpu" for
            another function.
    """

    model: nn.Module | None = None
    inputs: Any = ()
    device: str | None = None

    def read(self, work: Work, measurement: Measurement) -> Measurement:
        model, inputs, device = self.model, self.inputs, self.device or _device_of(work)
        if isinstance(work, TrainingStep):
            model, inputs = model or work.model, (inputs, work.batch)
        tracker = MemoryTracker(model or nn.Module(), device)
        tracker.register("inputs", tensors(inputs))
        if isinstance(work, TrainingStep):
            tracker.register("optimizer state", work.train_state.held_tensors())
        standing = tracker.standing
        with tracker.followed():
            work()
        return replace(measurement, memory=tracker.memory(), standing=standing)


@dataclass(frozen=True, eq=False)
class Operations(Instrument):
    """Reads FLOPs, matrix products and bytes moved of one run (`OpCounter`).

    Args:
        model: the reading names its modules. None: the model of the `TrainingStep`; no model for another function.
    """

    model: nn.Module | None = None

    def read(self, work: Work, measurement: Measurement) -> Measurement:
        model = self.model or (work.model if isinstance(work, TrainingStep) else nn.Module())
        with OpCounter(model).followed() as counts:
            work()
        return replace(measurement, counts=counts)


@value
class Seconds(Instrument):
    """Reads the time of a run (`time_steps`), with torch's current number of threads.

    Args:
        samples: minimum number of timed runs, 2 or more.
    """

    samples: int = 30

    def read(self, work: Work, measurement: Measurement) -> Measurement:
        return replace(measurement, timing=time_steps(work, self.samples))


@value
class Allocator(Instrument):
    """Reads the peak memory from torch's allocator (`allocated`), with the kernel workspaces that `Bytes` omits.

    Args:
        device: read the allocator of this device. None: the device of the `TrainingStep`; "cpu" for another function.
    """

    device: str | None = None

    def read(self, work: Work, measurement: Measurement) -> Measurement:
        return replace(measurement, allocated=allocated(work, self.device or _device_of(work)))


def measure(work: Work, *instruments: Instrument, warmup: int = 1) -> Measurement:
    """Measure the cost of a function: `warmup` runs, then one instrument after the other.

    Each instrument runs the function separately, because instruments disturb one another: a tracker takes time, a
    profiler takes memory. Use `TrainingStep` for a training step; it changes the model.

        print(gradcost.measure(gradcost.instruments.TrainingStep(objective, batch, backprop(), SGD(0.1))))

    Args:
        work: the function to measure.
        instruments: what to read. Default: Bytes(), Operations(), Seconds(), Allocator().
        warmup: number of runs before the first instrument.
    Returns:
        Measurement(memory, standing, counts, timing, allocated); str() of it is a table.
    Raises:
        BadInput: `work` is no function, or `Bytes` finds no tensor operation in a run.
    """
    if not callable(work):
        raise BadInput(
            f"measure takes a function, not {work!r}: for a training step, write measure(gradcost.instruments."
            "TrainingStep(objective, batch, estimator, optimizer))."
        )
    for _ in range(warmup):
        work()
    measurement = Measurement()
    for instrument in instruments or (Bytes(), Operations(), Seconds(), Allocator()):
        measurement = instrument.read(work, measurement)
    return measurement


def time_step(objective: Objective, batch: Any, estimator: Estimator, optimizer: Optimizer) -> Timing:
    """Time a training step, with torch's current number of threads. The steps train the model.

    Args:
        objective: the model and the loss.
        batch: any pytree; passed to the loss as it is.
        estimator: the gradient estimator.
        optimizer: the optimizer.
    Returns:
        Timing: the milliseconds of every step, and their median and quartiles.
    Raises:
        Unsupported: the estimator does not support this model or batch; the message names the cause.
    """
    return time_steps(TrainingStep(objective, batch, estimator, optimizer))


def _device_of(work: Work) -> str:
    return work.device if isinstance(work, TrainingStep) else "cpu"


def _memory_lines(memory: Memory) -> list[str]:
    return [
        f"{memory.peak:,} bytes at the peak, {memory.beyond:,} beyond parameters, buffers and batch",
        *(f"{size:>20,} {purpose}" for purpose, size in memory.breakdown.items() if size),
        f"at {memory.operator or 'no operator'} in {memory.module or 'no module'}",
        *([f"up to {memory.within_kernels:,} bytes more inside {memory.kernel}"] if memory.within_kernels else []),
    ]


def _count_lines(counts: Counts) -> list[str]:
    lines = [
        f"{counts.flops:,} FLOPs of products, {counts.elementwise:,} element-wise FLOPs, {counts.matmuls:,} matmuls",
        f"{counts.moved:,} bytes moved, {counts.drawn:,} random numbers added to weights",
    ]
    if counts.uncounted:
        lines.append("not counted: " + ", ".join(f"{name} ({n}x)" for name, n in counts.uncounted.most_common()))
    return lines


def _timing_lines(timing: Timing) -> list[str]:
    low, high = timing.quartiles
    lines = [f"{timing.median:.3f} ms median, quartiles {low:.3f} and {high:.3f}, {len(timing.samples)} runs"]
    return lines if timing.doubt is None else [*lines, f"doubtful: {timing.doubt}"]


def _allocator_lines(allocated: Allocated, seen: float | None) -> list[str]:
    tracked = "" if seen is None else f"; the tracker counts {100 * seen:.2f}% of these"
    lines = [f"{allocated.peak:,} bytes at the peak, beyond the bytes before the run{tracked}"]
    if allocated.reserved is not None:
        lines.append(
            f"{allocated.allocated:,} after rounding to blocks; {allocated.reserved:,} reserved on the device"
        )
    return lines + [f"{size:>20,} of them within {name}" for name, size in allocated.inside.items()]
