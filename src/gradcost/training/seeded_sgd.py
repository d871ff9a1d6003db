"""`SeededSGD`: a torch optimizer for training loops in which no dense gradient is held."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gradcost.core.errors import BadInput
from gradcost.estimators.estimator import Estimate
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.probing import replayed
from gradcost.training.leafwise import Leafwise
from gradcost.training.optimizers import SGD
from gradcost.training.step_log import LogWriter, StepLog, require_seeded


class SeededSGD(torch.optim.Optimizer):
    """Gradient descent on seeded gradients: `add` replaces `loss.backward()`, `step` regenerates the directions.

    - Law: after `add(estimate)`, a step has the bits of a step of `gradcost.train` with `SGD(lr)`.
    - Memory: 16 bytes per probe between `add` and `step`; in `step` one parameter's gradient at a time.
    - Several calls of `add` before a step add their gradients, as gradient accumulation does.
    - Schedulers of torch change its learning rate as usual.

    Args:
        parameters: the trainable parameters of the model.
        lr: learning rate, above 0.
        log: write each step to this file (`gradcost.training.replay` reads it). It must not exist. None: no log.
    Raises:
        BadInput: lr is not above 0, a group of parameters has an option other than lr, or the file of the log exists.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, log: StepLog | None = None) -> None:
        self.optimizer = SGD(lr)
        super().__init__(parameters, {"lr": lr})
        _require_lr_alone(self.param_groups)
        if log is not None and log.path.exists():
            raise BadInput(f"{log.path} exists: rename it. A new SeededSGD begins a new log.")
        self.log = log
        self.writer: LogWriter | None = None
        self.taken = 0
        self.pending: list[Seeded] = []
        self.leafwise: Leafwise | None = None

    def add(self, estimate: Estimate, factor: float = 1.0) -> None:
        """Add factor * estimate to the gradient of the next step.

        Args:
            estimate: the result of an estimator that is `replayable`.
            factor: the factor that the loop multiplies the loss with: 1/k for k micro-batches.
        Raises:
            Unsupported: the gradient is not seeded.
            BadInput: the optimizer does not have the parameters, or earlier gradients of the same step or log are of
                others.
        """
        gradient = require_seeded(estimate.gradient)
        if not gradient.seeds:  # of a batch whose loss is not finite
            return
        own = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        other = [leaf.name for leaf in gradient.objective.leaves if id(leaf.parameter) not in own]
        if other:
            raise BadInput(
                f"SeededSGD does not have the parameter `{other[0]}`: give it those of the objective's model."
            )
        ids = {id(leaf.parameter) for leaf in gradient.objective.leaves}
        if self.leafwise is None or {id(p) for p in self.leafwise.parameters.values()} != ids:
            if self.pending or self.writer is not None:
                raise BadInput(
                    "the gradients of a step, and the steps of a log, are of the same parameters: freeze and "
                    "unfreeze between steps, and without a log."
                )
            self.leafwise = Leafwise(self.optimizer, gradient.objective)
        if self.pending and self.pending[0].directions != gradient.directions:
            raise BadInput(
                "SeededSGD adds up gradients along one distribution of directions, and those of this step are along "
                f"two: {self.pending[0].directions} and {gradient.directions}, perhaps adapted in between. Use one "
                "micro-batch per step, or a torch optimizer."
            )
        self.pending.append(gradient.scaled([factor] * len(gradient.seeds)))

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move each parameter by -lr times the sum of the gradients that were added.

        Args:
            closure: must be None.
        Raises:
            BadInput: a parameter has a `.grad`, which this optimizer would ignore; the groups have several
                rates, or an option other than lr, such as those of a loaded state.
        """
        if closure is not None:
            raise BadInput("SeededSGD takes no closure: call add(estimate) before step().")
        parameters: list[Tensor] = [parameter for group in self.param_groups for parameter in group["params"]]
        if any(parameter.grad is not None for parameter in parameters):
            raise BadInput("a parameter has a .grad, which SeededSGD ignores: call add(estimate), not backward().")
        _require_lr_alone(self.param_groups)
        rates = {float(group["lr"]) for group in self.param_groups}
        if len(rates) > 1:
            raise BadInput(f"SeededSGD has one learning rate for all parameters, not {sorted(rates)}.")
        if not self.pending:
            return
        assert self.leafwise is not None
        first = self.pending[0]
        seeds = tuple(seed for gradient in self.pending for seed in gradient.seeds)
        coefficients = tuple(c for gradient in self.pending for c in gradient.coefficients)
        total = Seeded(first.objective, first.directions, seeds, coefficients)
        self.leafwise.rate = rates.pop()
        if self.log is not None:
            self.writer = self.writer or LogWriter(self.log, first.objective, self.optimizer, {})
            self.writer.append(self.taken, self.leafwise.rate, total)
        replayed(Estimate(torch.zeros(()), total), self.leafwise)
        self.leafwise.advance()
        self.pending.clear()
        self.taken += 1
        if self.writer is not None:
            self.writer.moved(self.taken)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard the gradients that were added since the last step.

        Args:
            set_to_none: ignored; for compatibility with torch's optimizers.
        """
        self.pending.clear()


def _require_lr_alone(groups: list[dict[str, Any]]) -> None:
    """Raise if a group of parameters has an option that `SeededSGD` ignores. Schedulers add rates such as max_lr."""
    own = ("params", "param_names", "lr")
    ignored = [name for group in groups for name in group if name not in own and not name.endswith("_lr")]
    if ignored:
        raise BadInput(
            f"SeededSGD is gradient descent with one learning rate, without {ignored[0]}: leave that out of "
            "the group, or use a torch optimizer, which needs the memory of a dense gradient."
        )
