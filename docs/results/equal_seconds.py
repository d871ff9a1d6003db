"""MNIST, dense layers of 1024, 1024 and 10: equal seconds for every method, with the help that its authors give it.

    python docs/results/equal_seconds.py docs/results/equal-seconds.json
    gradcost study docs/results/equal_seconds.py:small -j 2 -o gradcost-runs/equal-seconds-12
    gradcost study docs/results/equal_seconds.py:large -j 2 -o gradcost-runs/equal-seconds-73

The methods and their learning rates are those of equal_flops.py. The first command times a training step of each
method on one thread, the methods in turn, and writes the median milliseconds. A run of a study takes as many steps as
its seconds divided by that time, so its number of steps does not depend on the load of the machine while it trains.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from equal_flops import METHODS, TASK, trial

from gradcost.core.key import Key
from gradcost.instruments.measure import TrainingStep
from gradcost.instruments.timing import time_in_turn
from gradcost.results.tuning import log_grid
from gradcost.studies.environment import describe, fingerprint
from gradcost.studies.phases import phases
from gradcost.studies.study import Stages, Study
from gradcost.studies.trial import Trial

TIMES = Path(__file__).with_name("equal-seconds.json")
ROUNDS, CONSECUTIVE = 20, 5  # of the timing: in each round every method takes five steps
POINTS = 50  # scores of each run: at 200, scoring would take longer than 12 s of training


def main(file: str) -> None:
    """Time a training step of every method, in turn, and write the milliseconds."""
    torch.set_num_threads(1)
    steps = {}
    for label, method in METHODS.items():
        optimizer = method.optimizer(1e-9, 0.0)
        steps[label] = TrainingStep(TASK.objective(Key(0)), TASK.batch_at(Key(0), 0), method.estimator, optimizer)
    timings = time_in_turn({label: partial(several, step) for label, step in steps.items()}, ROUNDS)
    milliseconds = {label: round(timing.median / CONSECUTIVE, 3) for label, timing in timings.items()}
    spreads = {label: round(timing.spread, 3) for label, timing in timings.items()}
    environment = describe(torch.get_num_threads(), fingerprint())
    record = {"task": repr(TASK), "rounds": ROUNDS, "ms": milliseconds, "spread": spreads, "environment": environment}
    Path(file).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(Path(file).read_text("utf-8"))


def several(step: TrainingStep) -> None:
    for _ in range(CONSECUTIVE):
        step()


def study(seconds: float) -> Study:
    """Return the study in which every run takes this many seconds of training steps."""

    def trials() -> Stages:
        milliseconds = json.loads(TIMES.read_text("utf-8"))["ms"]
        steps = {label: int(1000 * seconds / milliseconds[label]) for label in METHODS}

        def make(label: str, lr: float, phase: str, seed: int) -> Trial:
            return replace(trial(steps, label, lr, phase, seed), points=POINTS)

        rates = {label: log_grid(*method.rates, 9) for label, method in METHODS.items()}
        return (yield from phases(rates, make, more=2, confirm=2, seeds=range(1, 9)))

    return Study(f"Which gradient trains best in {seconds:g} s on {TASK}?", trials)


small, large = study(12), study(73)

if __name__ == "__main__":
    main(*sys.argv[1:])
