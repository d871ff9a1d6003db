"""Evaluate a loss as in training, but without dropout and other draws, so that two evaluations can be compared."""

from __future__ import annotations

import enum
import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from gradcost.core.batching.candidate_weights import Evaluate
from gradcost.core.batching.denominators import Observed, observed
from gradcost.core.evaluation.autograd_use import known_use
from gradcost.core.interrupts import raise_interrupt
from gradcost.core.isolation import eval_mode, seeded_generators


class _Mode(enum.Enum):
    """Which modules are in eval mode while the loss is tested."""

    QUIET = "torch's random layers, and those that use statistics of the batch"
    EVAL = "all"
    CURRENT = "those that are now"


def loss_without_draws(objective: Any, key: Any) -> Evaluate:
    """Return a function that evaluates the loss as in training, but for dropout and statistics of the batch.

    Torch's random layers and batch norm are in eval mode. If the loss still draws random numbers, or fails, the whole
    model is in eval mode; if it fails there, in the current mode.

    Args:
        objective: the Objective. Its number of micro-batches does not matter.
        key: seeds the random layers.
    Returns:
        A function of (batch, number, gradients=False). number: part of the random key. gradients: whether
        autograd records the evaluation.
    """
    mode: _Mode | None = None

    def evaluate_in(mode: _Mode, batch: Any, number: int, gradients: bool) -> Observed:
        test_key = key.fold("test", number)
        with (
            torch.set_grad_enabled(gradients or _needs_gradients(objective)),
            eval_mode(objective.model) if mode is _Mode.EVAL else nullcontext(),
            objective.isolation.entered(test_key),
            seeded_generators(test_key, objective.devices),
        ):
            for module in objective.modules if mode is _Mode.QUIET else ():
                if type(module).__module__ in _NOT_QUIET or isinstance(module, nn.RReLU):
                    module.training = False
            return observed(lambda: objective.scalar_loss(batch))

    def chosen(batch: Any) -> _Mode:
        try:
            one, other = (float(evaluate_in(_Mode.QUIET, batch, number, False).loss) for number in range(2))
        except Exception as error:
            raise_interrupt(error)
            one, other = 0.0, 1.0
        if one == other or (math.isnan(one) and math.isnan(other)):
            return _Mode.QUIET
        try:
            with eval_mode(objective.model):
                objective.prepare(batch, key)
            evaluate_in(_Mode.EVAL, batch, 0, False)
        except Exception as error:
            raise_interrupt(error)
            return _Mode.CURRENT
        return _Mode.EVAL

    def evaluate(batch: Any, number: int, gradients: bool = False) -> Observed:
        nonlocal mode
        mode = mode or chosen(batch)
        return evaluate_in(mode, batch, number, gradients)

    return evaluate


_NOT_QUIET = tuple(f"torch.nn.modules.{name}" for name in ("dropout", "batchnorm", "instancenorm"))


def _needs_gradients(objective: Any) -> bool:
    use = known_use(objective)
    return use is not None and use.needs_gradients
