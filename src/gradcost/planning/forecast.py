"""Predict the cost of a training step: run the method's own code on fake tensors (shapes without numbers)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from gradcost.core.errors import Unsupported
from gradcost.core.evaluation.autograd_use import examine, known_use
from gradcost.core.evaluation.purity import examining_attributes
from gradcost.core.fake import is_fake, stands_for
from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective
from gradcost.core.pytree import tensors
from gradcost.estimators.estimator import Estimator, require_estimator, require_objective
from gradcost.instruments.cuda_allocator import (
    BLOCK,
    CONTEXT,
    SMALL,
    SMALL_SEGMENT,
    WORKSPACES,
    Reserved,
    replay_step,
    round_up,
)
from gradcost.instruments.flops import Counts, OpCounter, Operation
from gradcost.instruments.memory import Change, Memory, MemoryTracker, Purpose, strided_parts
from gradcost.instruments.workspaces import Workspace
from gradcost.planning.fake_model import on_fakes
from gradcost.planning.first_step import after_first_step
from gradcost.planning.refusals import simulation_errors
from gradcost.training.leafwise import Leafwise
from gradcost.training.optimizers import Optimizer, require_optimizer
from gradcost.training.train_state import TrainState


@dataclass(frozen=True, eq=False)
class Forecast:
    """The cost of one training step after the first: model, optimizer and estimator already have their states.

    Args:
        estimator: the estimator.
        device: the type of device that the forecast is for, "cpu" or "cuda".
        memory: the peak, its breakdown by purpose, and the operator and module that reach it.
        counts: FLOPs, matrix products and bytes moved.
        forward: FLOPs of one forward pass of the batch.
        kept: bytes of the states of optimizer and estimator, which stay allocated between steps.
        message: bytes of a message that transmits the gradient.
        cuda: requested, allocated and reserved bytes of training, by a model of CUDA's allocator. The CUDA context
            comes on top: about 0.4 to 0.6 GiB per process, by card and driver. None on a CPU, and in a plan of a deep
            model for the methods that are not chosen.
        spread: FLOPs of passes over the data, divided by the steps between two passes. `forecast` leaves them out: 0.
    """

    estimator: Estimator
    device: str
    memory: Memory
    counts: Counts
    forward: int
    kept: int
    message: int
    cuda: Reserved | None = None
    spread: int = 0

    @property
    def peak(self) -> int:
        """Peak memory of the step, in bytes, everything included."""
        return self.memory.peak

    @property
    def beyond(self) -> int:
        """Peak memory beyond the weights: without parameters, buffers and batch, in bytes."""
        return self.memory.beyond

    @property
    def within_kernels(self) -> int:
        """Upper bound of the bytes by which workspaces inside CPU kernels raise the peak.

        Convolutions, LSTM layers and products in bfloat16 and float16 have workspaces. 0 without workspaces, and on
        CUDA, where they are unknown.
        """
        return self.memory.within_kernels if self.device == "cpu" else 0

    @property
    def breakdown(self) -> Mapping[Purpose, int]:
        """Bytes at the peak by purpose; they sum to the peak."""
        return self.memory.breakdown

    @property
    def flops(self) -> int:
        """FLOPs of matrix products and convolutions."""
        return self.counts.flops + self.spread

    @property
    def matmuls(self) -> int:
        """The number of matrix products and convolutions."""
        return self.counts.matmuls

    @property
    def moved(self) -> int:
        """Bytes read and written by all operators."""
        return self.counts.moved

    @property
    def forwards(self) -> float:
        """FLOPs in units of one forward pass."""
        return self.flops / self.forward if self.forward else 0.0

    def with_more(self, purpose: Purpose, requested: int, rounded: int) -> Forecast:
        """Return the forecast with more bytes at the peak.

        Args:
            purpose: their purpose.
            requested: the bytes as tensors request them.
            rounded: the bytes as the allocator rounds them up.
        """
        memory, cuda = self.memory, self.cuda
        breakdown = {**memory.breakdown, purpose: memory.breakdown[purpose] + rounded}
        if cuda is not None:
            segments = round_up(rounded, SMALL_SEGMENT) if rounded > SMALL else 0  # few bytes fit where others are
            cuda = Reserved(
                cuda.requested + requested, cuda.allocated + rounded, cuda.reserved + segments, cuda.snapshot
            )
        return replace(self, memory=replace(memory, peak=memory.peak + rounded, breakdown=breakdown), cuda=cuda)

    def __str__(self) -> str:
        lines = [
            f"{self.estimator!r}: {self.peak:,} bytes at the peak ({self.beyond:,} beyond the weights and the batch)"
        ]
        lines += [f"    {purpose:<20}{size:>20,}" for purpose, size in self.breakdown.items() if size]
        lines.append(f"    at {self.memory.operator} in {self.memory.module or 'no module'}")
        if self.within_kernels:
            lines.append(f"    and up to {self.within_kernels:,} bytes more inside {self.memory.kernel}")
        if self.cuda is not None:
            low, high = (sum(sizes) >> 20 for sizes in zip(CONTEXT, WORKSPACES, strict=True))
            lines += [
                f"    requested {self.cuda.requested:,}, allocated {self.cuda.allocated:,}",
                f"    reserved by CUDA's allocator up to {self.cuda.reserved:,}",
                f"    and {low} to {high} MiB of context and cuBLAS",
            ]
        lines.append(
            f"{self.flops:,} FLOPs ({self.forwards:.2f} forwards), {self.matmuls} matmuls, {self.moved:,} bytes moved"
        )
        return "\n".join(lines)


def forecast(
    estimator: Estimator,
    objective: Objective,
    batch: Any,
    optimizer: Optimizer | None = None,
    device: str | torch.device | None = None,
    *,
    held: bool = False,
) -> Forecast:
    """Predict the cost of a training step without computing its numbers or moving data.

    Law: on a CPU, the peak bytes and the FLOPs equal those that MemoryTracker and OpCounter measure in the real step.
    The allocator also sees workspaces inside kernels: on a CPU, `Forecast.within_kernels` bounds them. For a CUDA
    device sizes are rounded up to 512 bytes and gradcost's GPU code runs, noise by Triton. Workspaces inside kernels
    and those of cuBLAS are not included. On an H200 a small network requested exactly the forecast bytes beside them.

    The forecast is for a step after the first; for an estimator with state, for the second step. In the second step
    VarianceReduced(every=n) takes no snapshot. Forecast VarianceReduced(every=1) for the cost of a snapshot. With an
    exact gradient, the optimizer has no state for the parameters that the loss does not use, as in torch.

    Args:
        estimator: the estimator.
        objective: the model and the loss. The model may be on the `meta` device.
        batch: a typical training batch.
        optimizer: the optimizer; None leaves the update out of the step.
        device: where the step would run; None for the device of the model.
        held: whether all gradients are held until one step of the optimizer, as in a loop of `loss.backward();
            optimizer.step()` or in a Trainer. False: each parameter moves as soon as its gradient is complete, as in
            `train`.
    Returns:
        The peak memory with its breakdown, FLOPs and matrix products.
    Raises:
        BadInput: the loss cannot be evaluated on this batch.
        Unsupported: the estimator cannot be used with this model and batch, or the model cannot be simulated, for
            example because it reads values of tensors. The message names the module and an alternative. Or several
            processes train the model.
    """
    require_estimator(estimator)
    require_objective(objective)
    if optimizer is not None:
        require_optimizer(optimizer)
    return simulate(estimator, objective, batch, optimizer, device, held=held).forecast


class Simulation(NamedTuple):
    """A forecast with the record that it was computed from.

    Args:
        forecast: the forecast.
        forward: the counts of one forward pass.
        events: the allocations and frees of the step.
        start: the number of events before the step.
        workspaces: bounds of the workspaces inside kernels.
        operations: what each operator of the step adds to the counts.
    """

    forecast: Forecast
    forward: Counts
    events: list[Change]
    start: int
    workspaces: list[Workspace]
    operations: list[Operation]


class Evaluation(NamedTuple):
    """The counts and memory of a forward pass, and its record: events, start and workspaces as in `Simulation`."""

    counts: Counts
    memory: Memory
    events: list[Change]
    start: int
    workspaces: list[Workspace]


def simulate(
    estimator: Estimator,
    objective: Objective,
    batch: Any,
    optimizer: Optimizer | None = None,
    device: str | torch.device | None = None,
    *,
    forward: Counts | None = None,
    is_checked: bool = False,
    held: bool = False,
    replayed: bool = True,
    unused: Set[str] = frozenset(),
) -> Simulation:
    """Return the forecast of a step with its record. Arguments and errors: as `forecast`.

    Args:
        forward: the counts of one forward pass, if they are known.
        is_checked: whether the estimator is known to have no objection, whose search may cost a forward pass.
        held: as in `forecast`.
        replayed: whether to compute `Forecast.cuda`, by replaying CUDA's allocator.
        unused: names of the parameters without a state of the optimizer, because the loss does not use them. They are
            found by a first simulation.
    """
    if objective.structure.processes_message() is not None:
        raise Unsupported(
            "a forecast simulates one process, and several train this model. Make the Objective of the model before "
            "DistributedDataParallel or fully_shard; DistributedDataParallel holds all gradients and a copy of them."
        )
    where = device_type(objective, device)
    with _on_fakes(objective, batch, where) as (fake, fake_batch):
        _examine(fake, fake_batch)
        forward = _forward_counts(fake, fake_batch) if forward is None else forward
        objection = None if is_checked else estimator.objection(fake, fake_batch)
        if objection is not None:
            raise Unsupported(objection)
        train_state = TrainState(fake, estimator, optimizer)
        if held and optimizer is not None:
            train_state.leafwise = Leafwise(optimizer, fake, at_once=True)
        train_state = after_first_step(train_state, fake_batch, unused)
        tracker = MemoryTracker(fake.model, block=rounding(where))
        tracker.register("inputs", tensors(fake_batch))
        counter = OpCounter(fake.model, tracker)
        tracker.register("optimizer state", train_state.held_tensors())
        start = tracker.moment
        with counter.followed(), tracker.followed():
            estimate = train_state.step(fake_batch, Key(0))
        log = tracker.log() if where == "cuda" and replayed else []
        changes, kept = tracker.changes(), sum(tensor.nbytes for tensor in train_state.held_tensors())
    skipped = set() if train_state.leafwise is None else train_state.leafwise.skipped
    if kept and skipped and not unused:
        options = {"forward": forward, "is_checked": is_checked, "held": held, "replayed": replayed}
        return simulate(estimator, objective, batch, optimizer, device, **options, unused=skipped)
    message = estimate.gradient.message_nbytes
    cuda = replay_step(log[:start], log[start:]) if log else None
    result = Forecast(estimator, where, tracker.memory(), counter.counts, forward.flops, kept, message, cuda)
    return Simulation(result, forward, changes, start, tracker.workspaces, counter.operations)


def evaluation(objective: Objective, batch: Any, device: str | torch.device | None = None) -> Evaluation:
    """Simulate one forward pass of the batch without gradients. Raises: as `forecast`."""
    where = device_type(objective, device)
    with _on_fakes(objective, batch, where) as (fake, fake_batch):
        _examine(fake, fake_batch)
        tracker = MemoryTracker(fake.model, block=rounding(where))
        tracker.register("inputs", tensors(fake_batch))
        counter, start = OpCounter(fake.model, tracker), tracker.moment
        with counter.followed(), tracker.followed():
            fake.evaluate(fake_batch, Key(0))
        return Evaluation(counter.counts, tracker.memory(), tracker.changes(), start, tracker.workspaces)


def _examine(fake: Objective, fake_batch: Any) -> None:
    """Find out how the loss uses autograd and what it changes in place, unless that is known."""
    if known_use(fake) is None:
        with examining_attributes(fake.isolation):
            examine(fake, fake_batch, Key(0))


def _forward_counts(fake: Objective, fake_batch: Any) -> Counts:
    counter = OpCounter(fake.model)
    with counter.followed():
        fake.evaluate(fake_batch, Key(0))
    return counter.counts


@contextmanager
def _on_fakes(objective: Objective, batch: Any, where: str) -> Iterator[tuple[Objective, Any]]:
    """Replace tensors by fakes, without Notes and with the errors of a simulation."""
    with (
        warnings.catch_warnings(),
        simulation_errors(objective, batch),
        on_fakes(objective, batch, where) as fakes,
    ):
        warnings.simplefilter("ignore", Note)
        yield fakes


def device_type(objective: Objective, device: str | torch.device | None) -> str:
    """Return the device type that a forecast is for; "cpu" if `device` is None and the model is on `meta`."""
    parameter = objective.leaves[0].parameter
    if device is None and is_fake(parameter):
        return stands_for()
    resolved = torch.device(device) if device is not None else parameter.device
    return "cpu" if resolved.type == "meta" else resolved.type


def rounding(device: str) -> int:
    """Return the block size of a device's allocator, in bytes: it rounds sizes up to multiples of this."""
    return BLOCK if device == "cuda" else 1


def input_bytes(batch: Any, block: int = 1) -> int:
    """Return the bytes of the storages of a batch, each rounded up to a multiple of `block` bytes."""
    parts = [part.untyped_storage() for tensor in tensors(batch) for part in strided_parts(tensor)]
    return sum(round_up(storage.nbytes(), block) for storage in {part._cdata: part for part in parts}.values())
