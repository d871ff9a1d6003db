"""MNIST, dense layers of 1024, 1024 and 10: every method gets the same FLOPs, and the help that its authors give it.

    gradcost study docs/results/equal_flops.py:small -j 2 -o gradcost-runs/equal-flops-1
    gradcost study docs/results/equal_flops.py:contrast -j 2 -o gradcost-runs/equal-flops-6
    gradcost study docs/results/equal_flops.py:large -j 2 -o gradcost-runs/equal-flops-6-all

A run of `small` takes 1 TFLOP of matrix products, a run of `large` 6 TFLOP. `contrast` is the part of `large` with
plain backprop and the best method that avoids it at 1 TFLOP. `large` takes two methods at a time: a folder that
stopped early holds complete methods. Each method is tuned at the budget that is ranked: nine learning rates half a
decade apart, two more next to the best or beyond the edge, and the best three again on two fresh seeds. The rate
with the best mean over the three seeds trains on eight fresh seeds.

The help: a cap of 1 on each slope, a learning rate that decays to a tenth of its first value, momentum, Adam, many
directions in shared passes, one-sided differences, perturbed activities. "decay" in a label means that decay.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from gradcost.core.key import Key
from gradcost.directions import Rademacher
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import activity_perturbation, backprop, forward_gradient, mezo
from gradcost.estimators.probing import Probing
from gradcost.planning.forecast import forecast
from gradcost.results.tuning import log_grid
from gradcost.slopes.slope import ForwardDifference
from gradcost.studies.phases import phases
from gradcost.studies.study import Stages, Study
from gradcost.studies.trial import Trial
from gradcost.tasks import Mnist
from gradcost.training.optimizers import SGD, Adam, Optimizer

TASK = Mnist()
Rate = Callable[[float, float], Optimizer]  # (learning rate, decay per step) -> optimizer


class Method(NamedTuple):
    estimator: Estimator
    optimizer: Rate
    rates: tuple[float, float]  # the smallest and the largest of the grid


def sgd(lr: float, decay: float) -> Optimizer:
    return SGD(lr, decay=decay)


def constant(lr: float, decay: float) -> Optimizer:
    return SGD(lr)


def momentum(lr: float, decay: float) -> Optimizer:
    return SGD(lr, momentum=0.9, decay=decay)


def adam(lr: float, decay: float) -> Optimizer:
    return Adam(lr, decay=decay)


METHODS: dict[str, Method] = {
    "backprop, SGD": Method(backprop(), constant, (1e-3, 10.0)),
    "backprop, Adam, decay": Method(backprop(), adam, (1e-5, 0.1)),
    "forward gradient, SGD": Method(forward_gradient(), constant, (1e-5, 0.1)),
    "forward gradient, cap, SGD, decay": Method(Clipped(forward_gradient(), 1.0), sgd, (1e-5, 0.1)),
    "forward gradient, cap, Adam, decay": Method(Clipped(forward_gradient(), 1.0), adam, (1e-6, 0.01)),
    "forward gradient 16, cap, SGD, decay": Method(Clipped(forward_gradient(16), 1.0), sgd, (1e-4, 1.0)),
    "MeZO, SGD, decay": Method(mezo(), sgd, (1e-5, 0.1)),
    "MeZO, cap, momentum, decay": Method(Clipped(mezo(), 1.0), momentum, (1e-6, 0.01)),
    "one-sided 16, cap, SGD, decay": Method(
        Clipped(Probing(ForwardDifference(1e-3), Rademacher(), 16), 1.0), sgd, (1e-4, 1.0)
    ),
    "activity perturbation, SGD, decay": Method(activity_perturbation(), sgd, (1e-4, 1.0)),
}

CONTRAST = ("backprop, SGD", "one-sided 16, cap, SGD, decay")
PAIRS = [
    ("backprop, SGD", "backprop, Adam, decay"),
    ("MeZO, SGD, decay", "forward gradient, cap, SGD, decay"),
    ("forward gradient 16, cap, SGD, decay", "one-sided 16, cap, SGD, decay"),
    ("MeZO, cap, momentum, decay", "forward gradient, cap, Adam, decay"),
    ("forward gradient, SGD", "activity perturbation, SGD, decay"),
]


def steps_of(method: Method, budget: float) -> int:
    """Return the number of steps that the budget of FLOPs pays for."""
    objective, batch = TASK.objective(Key(0)), TASK.batch_at(Key(0), 0)
    return int(budget // forecast(method.estimator, objective, batch, method.optimizer(1e-9, 0.0)).flops)


def trial(steps: Mapping[str, int], label: str, lr: float, phase: str, seed: int) -> Trial:
    """Return a run of a method, whose learning rate decays over its number of steps."""
    method = METHODS[label]
    optimizer = method.optimizer(lr, math.log(10) / steps[label])
    return Trial(TASK, label, method.estimator, optimizer, steps[label], phase, seed)


def study(budget: float, groups: Sequence[Sequence[str]]) -> Study:
    """Return the study in which every run takes this many FLOPs. The groups of methods run one after another."""

    def trials() -> Stages:
        for labels in groups:
            steps = {label: steps_of(METHODS[label], budget) for label in labels}
            rates = {label: log_grid(*METHODS[label].rates, 9) for label in labels}
            yield from phases(rates, functools.partial(trial, steps), more=2, confirm=2, seeds=range(1, 9))

    return Study(f"Which gradient trains best with {budget / 1e12:g} TFLOP on {TASK}?", trials)


small = study(1e12, [list(METHODS)])
large = study(6e12, PAIRS)
contrast = study(6e12, [CONTRAST])
