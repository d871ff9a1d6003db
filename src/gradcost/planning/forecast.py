"""What a step would cost, told without running it: the method's own code on tensors without numbers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)

from gradcost.core.errors import Unsupported
from gradcost.core.fake import is_fake, stands_for
from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective
from gradcost.core.pytree import tensors
from gradcost.estimators.estimator import Estimate, Estimator
from gradcost.instruments.flops import Counts, OpCounter
from gradcost.instruments.memory import Memory, MemoryTracker, Purpose
from gradcost.planning.fake_model import on_fakes
from gradcost.training.optimizers import Optimizer
from gradcost.training.train_state import TrainState

CUDA_BLOCK = 512  # bytes: what CUDA's caching allocator rounds every request up to


@dataclass(frozen=True, eq=False)
class Forecast:
    """What one training step takes, when the optimizer has its state.

    peak: the most bytes alive at once, with the weights, the buffers and the batch; breakdown: what they are
    for, at that moment, summing to the peak; operator, module: where it is reached. counts: FLOPs, matrix
    products, bytes moved. forward: FLOPs of one forward of the batch. kept: bytes that stay between steps beside
    the weights. message: bytes of the gradient, if it were sent. device: the type of device it is told for.
    """

    estimator: Estimator
    device: str
    memory: Memory
    counts: Counts
    forward: int
    kept: int
    message: int

    @property
    def peak(self) -> int:
        return self.memory.peak

    @property
    def beyond(self) -> int:
        """The peak without the weights, the buffers and the batch."""
        return self.memory.beyond

    @property
    def breakdown(self) -> Mapping[Purpose, int]:
        return self.memory.breakdown

    @property
    def flops(self) -> int:
        return self.counts.flops

    @property
    def matmuls(self) -> int:
        return self.counts.matmuls

    @property
    def moved(self) -> int:
        return self.counts.moved

    @property
    def forwards(self) -> float:
        """FLOPs in units of one forward."""
        return self.counts.flops / self.forward if self.forward else 0.0

    def __str__(self) -> str:
        lines = [
            f"{self.estimator!r}: {self.peak:,} bytes at the peak ({self.beyond:,} beyond the weights and the batch)"
        ]
        lines += [f"    {purpose:<20}{size:>20,}" for purpose, size in self.breakdown.items() if size]
        lines.append(f"    at {self.memory.operator} in {self.memory.module or 'no module'}")
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
) -> Forecast:
    """What a step of the estimator costs, without running it: nothing is computed and no data is moved.

    Law: on a CPU the peak is that of the real run, byte for byte, as `MemoryTracker` follows it, and so are the
    FLOPs. For a CUDA device it is a model on top: sizes rounded to 512 bytes and the paths of our own code that
    a GPU takes; what a kernel needs inside is not in it.

    A step is one after the first: of an estimator that remembers, the second one. So of VarianceReduced(every=n) it
    is one without a snapshot; VarianceReduced(every=1) tells what making one takes.

    optimizer: None for an estimate alone. device: where the step would run; the model's own if None.

    Raises: ValueError with the estimator's objection, or with the operation that cannot be followed without
    numbers, and what to do instead.
    """
    where = device_type(objective, device)
    with on_fakes(objective, batch, where) as (fake, fake_batch), warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        live = MemoryTracker(fake.model, block=rounding(where))
        live.register("inputs", tensors(fake_batch))
        counted, forward = OpCounter(fake.model), OpCounter(fake.model)
        try:
            with forward.followed():
                fake.evaluate(fake_batch, Key(0))
            objection = estimator.objection(fake, fake_batch)
            if objection is not None:
                raise Unsupported(objection)
            train_state = _primed(TrainState(fake, estimator, optimizer), fake_batch)
            live.register("optimizer state", train_state.kept())
            with counted.followed(), live.followed():
                found = train_state.step(fake_batch, Key(0))
        except UNFOLLOWED as error:
            raise Unsupported(unfollowed(objective, error)) from error
        kept = sum(tensor.nbytes for tensor in train_state.kept())
    return Forecast(estimator, where, live.memory(), counted.counts, forward.counts.flops, kept, _message(found))


UNFOLLOWED = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


def device_type(objective: Objective, device: str | torch.device | None) -> str:
    """The type of device that a step is told for: "cpu" where the model has no data, on `meta`."""
    parameter = objective.leaves[0].parameter
    if device is None and is_fake(parameter):
        return stands_for()
    found = torch.device(device) if device is not None else parameter.device
    return "cpu" if found.type == "meta" else found.type


def rounding(device: str) -> int:
    """What the allocator of a type of device rounds sizes up to, in bytes."""
    return CUDA_BLOCK if device == "cuda" else 1


def _primed(train_state: TrainState, batch: Any) -> TrainState:
    """As after a first step: with the optimizer's state, and the estimator's."""
    if train_state.state is not None:
        # What a first step leaves is as large whatever it passed over: of the data one batch is enough.
        first = replace(train_state.objective, data=lambda: [batch])
        train_state.state = train_state.estimator.stream(
            first, batch, Key(0), lambda *_: None, train_state.state
        ).state
    if train_state.leafwise is not None:
        for leaf in train_state.objective.leaves:
            train_state.leafwise.use(leaf.name, torch.zeros_like(leaf.parameter))
        train_state.leafwise.advance()
    return train_state


def _message(found: Estimate) -> int:
    return getattr(found.gradient, "message", found.gradient.nbytes)


def unfollowed(objective: Objective, error: Exception) -> str:
    return (
        f"{type(objective.model).__name__} cannot be followed without numbers: {str(error).splitlines()[0]}: what it "
        "does depends on the values of a tensor. Run a small batch with `gradcost.measure` instead."
    )
