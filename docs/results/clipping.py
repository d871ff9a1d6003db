"""Do forward gradients explode without a cap on their slopes? Rike and Foerland's network, data and learning rates.

    gradcost study docs/results/clipping.py -j 2 -o gradcost-runs/clipping
    python docs/results/clipping.py docs/results/clipping

Their MNIST network with SGD at the published learning rate, with caps of 0.3, 1 and 3 and without one, and with Adam
without a cap, as their notebooks ran it. In the notebook, the loss without a cap exploded after 15 to 18 epochs. Each
has three seeds and 18 epochs. The second command prints the table of clipping.md.
"""

from __future__ import annotations

import sys
import warnings
from itertools import product
from pathlib import Path

from gradcost.estimators.clipped import Clipped
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import forward_gradient
from gradcost.papers.claims import markdown_table
from gradcost.papers.rike2022.protocols import AsRun
from gradcost.papers.rike2022.study import task_of
from gradcost.papers.rike2022.table import rows
from gradcost.papers.rike2022.tasks import LastBatch
from gradcost.results.records import read
from gradcost.studies.study import Stages, Study
from gradcost.studies.trial import Trial

EPOCHS, SEEDS, PROTOCOL = 18, (1, 2, 3), AsRun()
EXPLODED = 2.5  # a training loss above that of guessing, 2.303, by more than noise
DATA = PROTOCOL.task(task_of("nn"))
TASK = LastBatch(DATA)
ROWS = {row.optimizer: row for row in rows("nn") if row.gradient == "forward"}
# label: optimizer of the row, cap
CAPS: dict[str, tuple[str, float | None]] = {
    "SGD, no cap": ("sgd", None),
    "SGD, cap 3": ("sgd", 3.0),
    "SGD, cap 1": ("sgd", 1.0),
    "SGD, cap 0.3": ("sgd", 0.3),
    "Adam, no cap": ("adam", None),
}


def capped(cap: float | None) -> Estimator:
    return forward_gradient() if cap is None else Clipped(forward_gradient(), cap)


def trials() -> Stages:
    steps = EPOCHS * DATA.steps_per_epoch
    yield [
        Trial(TASK, label, capped(cap), PROTOCOL.optimizer(ROWS[optimizer]), steps, "final", seed)
        for seed, (label, (optimizer, cap)) in product(SEEDS, CAPS.items())
    ]


clipping = Study(f"Do forward gradients explode without a cap on {TASK}?", trials)


def table(folder: str | Path) -> str:
    """Return a table: how each run ends, its largest slope and its spikes."""
    found = []
    for run in sorted(read(folder).trials, key=lambda run: (list(CAPS).index(run.method), run.seed)):
        slopes = run.slopes or {}
        end = f"diverged at step {run.steps:,}" if run.status == "diverged" else f"{run.test.accuracy:.1%}"
        losses = [loss for loss in run.curve.validation_loss if loss is not None]
        points = zip(run.curve.step, run.curve.loss, strict=True)
        exploded = next((step for step, loss in points if loss is not None and loss > EXPLODED), None)
        found.append(
            [run.method, str(run.seed), end, f"{losses[-1]:.3g}", f"{slopes['largest']:.3g}", f"{slopes['spikes']:,}"]
            + ["never" if exploded is None else f"{exploded / DATA.steps_per_epoch:.1f}"]
        )
    names = (
        "slopes",
        "seed",
        "test accuracy",
        "last validation loss",
        "largest slope",
        "spikes",
        "explodes in epoch",
    )
    return markdown_table(names, found)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(table(sys.argv[1]))
