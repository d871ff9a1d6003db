"""MNIST, dense layers of 1024, 1024 and 10: what each way of getting a gradient is worth a step, all tuned alike.

    gradcost study docs/results/mnist_mlp.py -j 2 -o gradcost-runs/mnist-mlp

Plain gradient descent for all. Each method is tuned over five learning rates a decade apart, then over two more
that depend on what came of those (beyond the edge, or beside the winner), on validation; the best three are confirmed
on a fresh seed, and the winner is run on five fresh seeds, whose end alone sees the test set. A step is one batch of
64 for every method, whatever it costs: the costs are measured beside.
"""

from __future__ import annotations

from gradcost.directions import Gaussian, Orthogonal, Rademacher
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import backprop, checkpointed
from gradcost.estimators.probing import Probing
from gradcost.slopes.slope import CentralDifference, Jvp
from gradcost.studies.comparison import Comparison
from gradcost.tasks import Mnist

STEPS = 400
PROBES = (1, 4, 16)

METHODS: dict[str, Estimator] = {
    "backprop": backprop(),
    "checkpointed": checkpointed(),
    **{
        f"forward {type(directions).__name__} {probes}": Probing(Jvp(), directions, probes)
        for directions in (Gaussian(), Rademacher(), Orthogonal())
        for probes in PROBES
    },
    **{f"difference Gaussian {probes}": Probing(CentralDifference(1e-3), Gaussian(), probes) for probes in PROBES},
}

COMPARISON = Comparison(
    Mnist(),
    tuple(METHODS.items()),
    rates=(1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    steps=STEPS,
    seeds=(1, 2, 3, 4, 5),
    target=0.9,
    more=2,
    confirm=1,
)

mnist_mlp = COMPARISON.study(METHODS)
