"""MNIST, dense layers of width 16 to 1024: how the cost of a target grows with the number of weights.

    gradcost study docs/results/size_scaling.py:width_16 -j 2 -o gradcost-runs/size-16
    gradcost study docs/results/size_scaling.py:width_64 -j 2 -o gradcost-runs/size-64
    gradcost study docs/results/size_scaling.py:width_256 -j 2 -o gradcost-runs/size-256
    gradcost study docs/results/size_scaling.py:width_1024 -j 2 -o gradcost-runs/size-1024

Backprop, and the forward gradient along 1, 4 and 16 directions with a cap of 1 on each slope and a learning rate that
decays to a tenth. Each is tuned over seven learning rates half a decade apart and one more, and trains on five seeds.
"""

from __future__ import annotations

import math

from gradcost.estimators.clipped import Clipped
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import backprop, forward_gradient
from gradcost.results.tuning import log_grid
from gradcost.studies.phases import phases
from gradcost.studies.study import Stages, Study
from gradcost.studies.trial import Trial
from gradcost.tasks import Mnist
from gradcost.tasks.architectures import Mlp
from gradcost.training.optimizers import SGD

WIDTHS = (16, 64, 256, 1024)
# label: estimator, steps, the smallest and the largest learning rate of the grid
METHODS: dict[str, tuple[Estimator, int, tuple[float, float]]] = {
    "backprop": (backprop(), 2000, (1e-3, 1.0)),
    "forward gradient 1": (Clipped(forward_gradient(1), 1.0), 2000, (1e-4, 0.1)),
    "forward gradient 4": (Clipped(forward_gradient(4), 1.0), 1000, (3.2e-4, 0.32)),
    "forward gradient 16": (Clipped(forward_gradient(16), 1.0), 500, (1e-3, 1.0)),
}


def study(width: int) -> Study:
    """Return the study of one width."""
    task = Mnist(model=Mlp((width, width)))

    def make(label: str, lr: float, phase: str, seed: int) -> Trial:
        estimator, steps, _ = METHODS[label]
        return Trial(task, label, estimator, SGD(lr, decay=math.log(10) / steps), steps, phase, seed, target=0.6)

    def trials() -> Stages:
        rates = {label: log_grid(*limits, 7) for label, (_, _, limits) in METHODS.items()}
        return (yield from phases(rates, make, more=1, confirm=0, seeds=range(1, 6)))

    return Study(f"What does a target cost at width {width}?", trials)


width_16, width_64, width_256, width_1024 = map(study, WIDTHS)
