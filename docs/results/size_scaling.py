"""MNIST, dense layers of width 16 to 1024: how the cost of a target grows with the number of weights.

    gradcost study docs/results/size_scaling.py:width_16 -j 2 -o gradcost-runs/size-16
    gradcost study docs/results/size_scaling.py:width_64 -j 2 -o gradcost-runs/size-64
    gradcost study docs/results/size_scaling.py:width_256 -j 2 -o gradcost-runs/size-256
    gradcost study docs/results/size_scaling.py:width_1024 -j 2 -o gradcost-runs/size-1024
    python docs/results/size_scaling.py docs/results

Backprop, and the forward gradient along 1, 4 and 16 directions with a cap of 1 on each slope and a learning rate that
decays to a tenth. Each is tuned over seven learning rates half a decade apart and one more, and trains on five seeds.
The last command prints the tables of size_scaling.md.
"""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path

from gradcost.estimators.clipped import Clipped
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import backprop, forward_gradient
from gradcost.papers.claims import markdown_table
from gradcost.results.records import Results, read
from gradcost.results.statistics import Interval
from gradcost.results.targets import Target, reaches
from gradcost.results.tuning import final_runs, log_grid
from gradcost.studies.phases import phases
from gradcost.studies.study import Stages, Study
from gradcost.studies.trial import Trial
from gradcost.tasks import Mnist
from gradcost.tasks.architectures import Mlp
from gradcost.training.optimizers import SGD

WIDTHS = (16, 64, 256, 1024)
TARGET = Target("accuracy", 0.6)  # of the validation examples
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
        optimizer = SGD(lr, decay=math.log(10) / steps)
        return Trial(task, label, estimator, optimizer, steps, phase, seed, target=TARGET.value)

    def trials() -> Stages:
        rates = {label: log_grid(*limits, 7) for label, (_, _, limits) in METHODS.items()}
        return (yield from phases(rates, make, more=1, confirm=0, seeds=range(1, 6)))

    return Study(f"What does a target cost at width {width}?", trials)


width_16, width_64, width_256, width_1024 = map(study, WIDTHS)


def weights(width: int) -> int:
    """Return the number of weights of the network."""
    return 784 * width + width + width * width + width + width * 10 + 10


def ratios(folders: Path) -> str:
    """Return a table: what each method needs to reach the target, as multiples of what backprop needs."""
    rows = []
    for width in WIDTHS:
        results = read(folders / f"size-{width}")
        found = {reach.method: reach for reach in reaches(results, [TARGET])}
        for method in list(METHODS)[1:]:
            reach = found[method]
            row = [f"{weights(width):,}", method, f"{reach.reached} of {reach.runs}"]
            for resource in ("steps", "flops"):
                row.append(_shown(reach.ratio[resource]))
            rows.append(row)
    return markdown_table(["weights d", "method", "runs at 60%", "steps / backprop's", "FLOPs / backprop's"], rows)


def _shown(ratio: Interval) -> str:
    middle, *ends = (f"{x:.3g}" if math.isfinite(x) else "not reached" for x in (ratio.median, ratio.low, ratio.high))
    return middle if middle == "not reached" else f"{middle} [{', '.join(ends)}]"


def flops_to_target(results: Results, method: str) -> list[float]:
    """Return the FLOPs of each final run up to the target; inf for a run that does not reach it."""
    price = next(cost.flops for cost in results.costs if cost.method == method)
    return [price * TARGET.step(run) for run in final_runs(results, method)]


def slope(folders: Path, method: str, divisor: str | None = None) -> tuple[float, float, int]:
    """Return the slope of log(FLOPs to the target) against log d, half of its 95% interval, and the number of runs.

    By least squares over all runs of the widths at which every run reaches the target. The interval is Student's.

    Args:
        folders: has a results folder for each width.
        method: the method.
        divisor: a method by whose median FLOPs at the same width each run is divided.
    """
    from scipy import stats

    x, y = [], []
    for width in WIDTHS:
        results = read(folders / f"size-{width}")
        flops = flops_to_target(results, method)
        unit = sorted(flops_to_target(results, divisor)) if divisor else [1.0]
        if all(map(math.isfinite, flops)):
            x += [math.log(weights(width))] * len(flops)
            y += [math.log(value / unit[len(unit) // 2]) for value in flops]
    fit = stats.linregress(x, y)
    return fit.slope, fit.stderr * stats.t.ppf(0.975, len(x) - 2), len(x)


def slopes(folders: Path) -> str:
    """Return a table of the slopes of each method, of its FLOPs and of their ratio to backprop's."""
    rows = []
    for method in METHODS:
        row = [method]
        for divisor in (None, "backprop"):
            value, half, count = slope(folders, method, divisor)
            row.append("" if method == divisor else f"{value:.2f} [{value - half:.2f}, {value + half:.2f}]")
        rows.append([*row, str(count)])
    return markdown_table(["method", "slope of FLOPs", "slope of the ratio to backprop's", "runs"], rows)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(ratios(Path(sys.argv[1])), slopes(Path(sys.argv[1])), sep="\n\n")
