"""Any work under any instruments, one after the other: none runs while another reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.pytree import tensors
from gradcost.core.value import value
from gradcost.estimators.estimator import Estimate, Estimator
from gradcost.instruments.allocator import Allocated, allocated
from gradcost.instruments.flops import Counts, OpCounter
from gradcost.instruments.memory import Memory, MemoryTracker
from gradcost.instruments.timing import Timing, time_steps
from gradcost.training.optimizers import Optimizer
from gradcost.training.train_state import TrainState

Work = Callable[[], object]


class TrainingStep:
    """Work that is one training step after another on one batch, and knows what its memory is for.

    Each call takes a step and trains the model; no optimizer: estimates alone. Run by `measure` after its
    warm-up, a step has what an optimizer keeps. Raises: ValueError with the estimator's objection.
    """

    def __init__(
        self, objective: Objective, batch: Any, estimator: Estimator, optimizer: Optimizer | None = None
    ) -> None:
        objection = estimator.objection(objective, batch)
        if objection is not None:
            raise BadInput(objection)
        self.model, self.batch = objective.model, batch
        self.train_state = TrainState(objective, estimator, optimizer)
        self.device = objective.leaves[0].parameter.device.type
        self.taken = 0

    def __call__(self) -> Estimate:
        found = self.train_state.step(self.batch, Key(0).fold("step", self.taken))
        self.taken += 1
        return found


@dataclass(frozen=True, eq=False)
class Measurement:
    """What the instruments read of some work; None where there was no instrument for it.

    memory: the peak of the tensors alive, what they were for and where it was, in bytes. standing: the bytes of
    `memory` that were there before the work. counts: FLOPs, matrix products, bytes moved. timing: milliseconds,
    every sample. allocated: bytes asked of torch's allocator beyond what was there before.
    """

    memory: Memory | None = None
    standing: int = 0
    counts: Counts | None = None
    timing: Timing | None = None
    allocated: Allocated | None = None

    @property
    def seen(self) -> float | None:
        """The tracker's peak beyond what was there before, as a share of the allocator's."""
        if self.memory is None or self.allocated is None or not self.allocated.peak:
            return None
        return (self.memory.peak - self.standing) / self.allocated.peak

    def __str__(self) -> str:
        parts = {
            "memory": self.memory and _of_memory(self.memory),
            "arithmetic": self.counts and _of_counts(self.counts),
            "time": self.timing and _of_timing(self.timing),
            "allocator": self.allocated and _of_allocated(self.allocated, self.seen),
        }
        rows = [(name if i == 0 else "", line) for name, said in parts.items() for i, line in enumerate(said or [])]
        return "\n".join(f"{name:<12}{line}" for name, line in rows)


class Instrument(ABC):
    """What reads one side of some work. An instrument may run the work several times, and alone."""

    @abstractmethod
    def read(self, work: Work, found: Measurement) -> Measurement:
        """`found`, and what this instrument reads of the work beside it."""


@dataclass(frozen=True, eq=False)
class Bytes(Instrument):
    """The bytes of the tensors alive during one run (`MemoryTracker`): the peak, what they are for, and where.

    model: whose parameters and buffers count, and whose modules are named; inputs: the batch. Of `Steps` all of
    it is known, and what the optimizer keeps. What else was there before is not counted.
    """

    model: nn.Module | None = None
    inputs: Any = ()
    device: str | None = None

    def read(self, work: Work, found: Measurement) -> Measurement:
        model, inputs, device = self.model, self.inputs, self.device or _device_of(work)
        if isinstance(work, TrainingStep):
            model, inputs = model or work.model, (inputs, work.batch)
        live = MemoryTracker(model or nn.Module(), device)
        live.register("inputs", tensors(inputs))
        if isinstance(work, TrainingStep):
            live.register("optimizer state", work.train_state.kept())
        standing = live.standing
        with live.followed():
            work()
        return replace(found, memory=live.memory(), standing=standing)


@dataclass(frozen=True, eq=False)
class Operations(Instrument):
    """FLOPs, matrix products and bytes moved of one run (`Counted`). model: whose modules are named."""

    model: nn.Module | None = None

    def read(self, work: Work, found: Measurement) -> Measurement:
        model = self.model or (work.model if isinstance(work, TrainingStep) else nn.Module())
        with OpCounter(model).followed() as counts:
            work()
        return replace(found, counts=counts)


@value
class Seconds(Instrument):
    """The time of a run, on torch's present thread count: `samples` of them or more (`time_steps`)."""

    samples: int = 30

    def read(self, work: Work, found: Measurement) -> Measurement:
        return replace(found, timing=time_steps(work, self.samples))


@value
class Allocator(Instrument):
    """The truth meter beside `Bytes`: what the allocator was asked for, with what kernels need inside."""

    device: str | None = None

    def read(self, work: Work, found: Measurement) -> Measurement:
        return replace(found, allocated=allocated(work, self.device or _device_of(work)))


def measure(work: Work, *instruments: Instrument, warmup: int = 1) -> Measurement:
    """What some work costs: `warmup` runs that nobody reads, then one instrument after the other.

    Each instrument runs the work on its own, for they disturb one another: a tracker takes time, a profiler
    memory. Without instruments: all four. Take `Steps` for a training step; its work changes the model.

        print(gradcost.measure(gradcost.instruments.TrainingStep(objective, batch, backprop(), SGD(0.1))))

    Raises: ValueError when a run makes no tensor that `Bytes` could follow.
    """
    for _ in range(warmup):
        work()
    found = Measurement()
    for instrument in instruments or (Bytes(), Operations(), Seconds(), Allocator()):
        found = instrument.read(work, found)
    return found


@dataclass(frozen=True)
class StepCost:
    """What one training step takes.

    peak_bytes: the most bytes alive at once beyond the weights, the buffers and the batch: activations, noise,
    gradients, the optimizer's state. flops: of matrix products and convolutions. forwards: flops in units of
    one forward of the same batch. matmuls: how many matrix products.
    """

    peak_bytes: int
    flops: int
    forwards: float
    matmuls: int


def measure_step(objective: Objective, batch: Any, estimator: Estimator, optimizer: Optimizer) -> StepCost:
    """Bytes and FLOPs of a step: not the first of a run, so that the optimizer has its state.

    Raises: ValueError with the estimator's objection. The model is trained by a few steps meanwhile.
    """
    steps = TrainingStep(objective, batch, estimator, optimizer)
    forward = measure(lambda: objective.evaluate(batch, Key(0)), Operations(), warmup=0).counts
    found = measure(steps, Bytes(), Operations())
    assert forward is not None
    assert found.counts is not None
    assert found.memory is not None
    flops = found.counts.flops
    return StepCost(found.memory.beyond, flops, flops / forward.flops if forward.flops else 0.0, found.counts.matmuls)


def time_step(objective: Objective, batch: Any, estimator: Estimator, optimizer: Optimizer) -> Timing:
    """Milliseconds of a step, on torch's present thread count; the model is trained meanwhile.

    Raises: ValueError with the estimator's objection.
    """
    return time_steps(TrainingStep(objective, batch, estimator, optimizer))


def _device_of(work: Work) -> str:
    return work.device if isinstance(work, TrainingStep) else "cpu"


def _of_memory(memory: Memory) -> list[str]:
    return [
        f"{memory.peak:,} bytes at the peak, {memory.beyond:,} beyond the weights, the buffers and the batch",
        *(f"{size:>20,} {purpose}" for purpose, size in memory.breakdown.items() if size),
        f"at {memory.operator or 'no operator'} in {memory.module or 'no module'}",
    ]


def _of_counts(counts: Counts) -> list[str]:
    lines = [
        f"{counts.flops:,} FLOPs of products and {counts.elementwise:,} element-wise, {counts.matmuls:,} matmuls",
        f"{counts.moved:,} bytes moved, {counts.drawn:,} random numbers added to weights",
    ]
    if counts.uncounted:
        lines.append("not counted: " + ", ".join(f"{name} ({n}x)" for name, n in counts.uncounted.most_common()))
    return lines


def _of_timing(timing: Timing) -> list[str]:
    low, high = timing.quartiles
    lines = [f"{timing.median:.3f} ms, the middle half {low:.3f} to {high:.3f}, of {len(timing.samples)} runs"]
    return lines if timing.doubt is None else [*lines, f"doubtful: {timing.doubt}"]


def _of_allocated(found: Allocated, seen: float | None) -> list[str]:
    share = "" if seen is None else f"; the tracker saw {100 * seen:.2f}% of them"
    lines = [f"{found.peak:,} bytes at the peak beyond what was there before{share}"]
    if found.reserved is not None:
        lines.append(f"{found.allocated:,} as rounded up; {found.reserved:,} of the device held in all")
    return lines + [f"{size:>20,} of them within {name}" for name, size in found.inside.items()]
