"""One training step of an estimator, under each instrument in turn: none runs while another reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gradcost.cost.clock import Timing, time_steps
from gradcost.cost.flops import CountedFlops
from gradcost.cost.storage import LiveBytes
from gradcost.estimators.estimator import Estimator
from gradcost.key import Key
from gradcost.objective import Objective
from gradcost.training.loop import Step, train
from gradcost.training.optimizers import Optimizer


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


@dataclass(frozen=True, eq=False)
class _OneBatch:
    """A model in the state that it is in, and one batch for every step."""

    held: Objective
    batch: Any

    def objective(self, key: Key) -> Objective:
        return self.held

    def batch_at(self, key: Key, step: int) -> Any:
        return self.batch


def measure_step(objective: Objective, batch: Any, estimator: Estimator, optimizer: Optimizer) -> StepCost:
    """Bytes and FLOPs of a step: the second of a run, when the optimizer has its state.

    Raises: ValueError with the estimator's objection. The model is trained by a few steps meanwhile.
    """
    with CountedFlops() as forward:
        objective.evaluate(batch, Key(0))
    live = LiveBytes()
    live.ignore(*objective.model.parameters(), *objective.model.buffers())
    with live:
        for _ in _steps(objective, batch, estimator, optimizer, 2):
            pass
    run = _steps(objective, batch, estimator, optimizer, 2)
    next(run)
    with CountedFlops() as counted:
        next(run)
    return StepCost(live.peak, counted.flops, counted.flops / forward.flops, counted.matmuls)


def time_step(objective: Objective, batch: Any, estimator: Estimator, optimizer: Optimizer) -> Timing:
    """Milliseconds of a step, on torch's present thread count; the model is trained meanwhile."""
    run = _steps(objective, batch, estimator, optimizer, None)
    return time_steps(lambda: next(run))


def _steps(
    objective: Objective, batch: Any, estimator: Estimator, optimizer: Optimizer, steps: int | None
) -> Iterator[Step]:
    return train(_OneBatch(objective, batch), estimator, optimizer, Key(0), steps)
