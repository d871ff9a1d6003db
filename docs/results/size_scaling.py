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
from statistics import fmean

from gradcost.estimators.clipped import Clipped
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import backprop, forward_gradient
from gradcost.papers.claims import markdown_table
from gradcost.papers.intervals import format_ratio
from gradcost.results.records import Results, read
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
                row.append(format_ratio(reach.ratio[resource]))
            rows.append(row)
    return markdown_table(["weights d", "method", "runs at 60%", "steps / backprop's", "FLOPs / backprop's"], rows)


def flops_to_target(results: Results, method: str) -> dict[int, float]:
    """Return the FLOPs of each final run up to the target, by seed; inf for a run that does not reach it."""
    price = next(cost.flops for cost in results.costs if cost.method == method)
    return {run.seed: price * TARGET.step(run) for run in final_runs(results, method)}


def slope(found: dict[int, list[float]]) -> str:
    """Return the least-squares slope against log d of the means at each width, with Student's 95% interval.

    The runs of a width share one tuned learning rate and one architecture. So each width is one point, and the
    interval has (number of widths - 2) degrees of freedom.

    Args:
        found: a logarithm of each run, by width. At least three widths.
    """
    from scipy import stats

    points = [(math.log(weights(width)), fmean(values)) for width, values in found.items()]
    line = stats.linregress(*zip(*points, strict=True))
    half = line.stderr * float(stats.t.ppf(0.975, len(points) - 2))
    return f"{line.slope:.2f} [{line.slope - half:.2f}, {line.slope + half:.2f}]"


def slopes(folders: Path) -> str:
    """Return a table of the slopes of each method, and of the slopes of its ratio to backprop, paired by seed.

    Only widths count at which every run of the method reaches the target.
    """
    results = {width: read(folders / f"size-{width}") for width in WIDTHS}
    needed = {method: {width: flops_to_target(results[width], method) for width in WIDTHS} for method in METHODS}
    rows = []
    for method, by_width in needed.items():
        reached = {width: flops for width, flops in by_width.items() if all(map(math.isfinite, flops.values()))}
        own = {width: [math.log(value) for value in flops.values()] for width, flops in reached.items()}
        ratio = {
            width: [math.log(value / needed["backprop"][width][seed]) for seed, value in flops.items()]
            for width, flops in reached.items()
        }
        less = "" if method == "backprop" else slope(ratio)
        rows.append([method, slope(own), less, str(len(reached))])
    return markdown_table(["method", "slope of FLOPs", "less that of backprop", "widths"], rows)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(ratios(Path(sys.argv[1])), slopes(Path(sys.argv[1])), sep="\n\n")
