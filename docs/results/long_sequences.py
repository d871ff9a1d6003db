"""A GPT on sequences of 512 characters: activations need 40 times the bytes of the weights. What fits, and learns?

    gradcost study docs/results/long_sequences.py -j 2 -o gradcost-runs/long-sequences
    python docs/results/long_sequences.py docs/results/long-sequences

The study trains with the same FLOPs for every method, tuned alike by the validation loss over seven learning rates
half a decade apart, two more and two confirming seeds, on eight seeds. Checkpointing and micro-batches give the
gradient of the whole batch, so `backprop` stands for all of these in training. The second command prints what each of
them needs.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from gradcost.core.key import Key
from gradcost.core.units import size
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import backprop, checkpointed, forward_gradient, mezo
from gradcost.planning.forecast import Forecast, forecast
from gradcost.results.records import read
from gradcost.results.targets import Target, reaches
from gradcost.results.tuning import log_grid
from gradcost.studies.phases import phases
from gradcost.studies.study import Stages, Study
from gradcost.studies.trial import Trial
from gradcost.tasks import CharLm
from gradcost.tasks.architectures import Gpt
from gradcost.training.optimizers import SGD, Adam, Optimizer

TASK = CharLm(model=Gpt(layers=4, width=64, heads=4), batch=4, length=512)
LOSSES = 3.9, 3.5, 3.2, 3.0  # targets: all reach 3.2 in at least six of eight runs
STEPS = 400  # of backprop; the other methods take as many as cost the same FLOPs
FORWARD, DIFFERENCE = Clipped(forward_gradient(), 1.0), Clipped(mezo(), 1.0)


def adam(lr: float, decay: float) -> Optimizer:
    return Adam(lr, decay=decay)


def momentum(lr: float, decay: float) -> Optimizer:
    return SGD(lr, momentum=0.9, decay=decay)


# label: estimator, optimizer of (learning rate, decay per step), the smallest and the largest learning rate
METHODS: dict[str, tuple[Estimator, Callable[[float, float], Optimizer], tuple[float, float]]] = {
    "backprop, Adam, decay": (backprop(), adam, (1e-4, 0.1)),
    "forward gradient, cap, Adam, decay": (FORWARD, adam, (1e-4, 0.1)),
    "forward gradient, cap, momentum, decay": (FORWARD, momentum, (1e-5, 0.01)),
    "MeZO, cap, Adam, decay": (DIFFERENCE, adam, (1e-4, 0.1)),
    "MeZO, cap, momentum, decay": (DIFFERENCE, momentum, (1e-5, 0.01)),
}
# Ways to get a gradient in less memory, and the method of the study that trains like it.
WAYS: dict[str, tuple[Estimator, str]] = {
    "backprop()": (backprop(), "backprop, Adam, decay"),
    "checkpointed()": (checkpointed(), "backprop, Adam, decay"),
    "backprop() in 4 micro-batches": (Accumulated(backprop(), 4), "backprop, Adam, decay"),
    "checkpointed() in 4 micro-batches": (Accumulated(checkpointed(), 4), "backprop, Adam, decay"),
    "forward_gradient()": (FORWARD, "forward gradient, cap, momentum, decay"),
    "forward_gradient() in 4 micro-batches": (Accumulated(FORWARD, 4), "forward gradient, cap, momentum, decay"),
    "mezo()": (DIFFERENCE, "MeZO, cap, momentum, decay"),
    "mezo() in 4 micro-batches": (Accumulated(DIFFERENCE, 4), "MeZO, cap, momentum, decay"),
}


def cost(estimator: Estimator, optimizer: Optimizer) -> Forecast:
    return forecast(estimator, TASK.objective(Key(0)), TASK.batch_at(Key(0), 0), optimizer)


def trials() -> Stages:
    flops = {label: cost(estimator, SGD(1e-9)).flops for label, (estimator, _, _) in METHODS.items()}
    steps = {label: STEPS * flops["backprop, Adam, decay"] // flops[label] for label in METHODS}

    def make(label: str, lr: float, phase: str, seed: int) -> Trial:
        estimator, optimizer, _ = METHODS[label]
        made = optimizer(lr, math.log(10) / steps[label])
        return Trial(TASK, label, estimator, made, steps[label], phase, seed, target=3.0)

    rates = {label: log_grid(*limits, 7) for label, (_, _, limits) in METHODS.items()}
    return (yield from phases(rates, make, more=2, confirm=2, seeds=range(1, 9)))


long_sequences = Study(f"Which gradient trains best with equal FLOPs on {TASK}?", trials)


def table(folder: str | Path) -> str:
    """Return a table: memory and FLOPs of each way, and its FLOPs to `LOSSES` as multiples of those of backprop."""
    results = read(folder)
    losses = [Target("loss", loss) for loss in LOSSES]
    ratios = {(row.method, row.target): row.ratio for row in reaches(results, losses)}
    targets = "".join(f" to loss {target.value:g} |" for target in losses)
    lines = [f"| way | beyond the weights | a step, in forwards |{targets}"]
    lines.append("|:---|---:|---:|" + "---:|" * len(losses))
    exact = cost(backprop(), SGD(1e-9)).flops
    for name, (estimator, method) in WAYS.items():
        needs = cost(estimator, METHODS[method][1](1e-9, 0.0))
        cells = []
        for target in losses:
            ratio = ratios[method, target].get("steps")
            middle = math.inf if ratio is None else ratio.median * needs.flops / exact
            cells.append(f"{middle:.2g} x" if math.isfinite(middle) else "not reached")
        lines.append(f"| {name} | {size(needs.beyond)} | {needs.forwards:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(table(sys.argv[1]))
