"""MNIST, dense layers of 1024, 1024 and 10: equal seconds for every method, with the help that its authors give it.

    python docs/results/equal_seconds.py docs/results/equal-seconds-73.json
    gradcost study docs/results/equal_seconds.py:large -j 2 -o gradcost-runs/equal-seconds-73

The methods and their learning rates are those of equal_flops.py. The first command times a training step of each
method on one thread, in a process of its own, and writes the median milliseconds. A run of a study takes as many
steps as its seconds divided by that time, so its number of steps does not depend on the load of the machine.

`small`, with 12 s a run, took the times of equal-seconds.json, for which one process timed all methods in turn: that
made steps 1.1 to 2.2 times slower than alone. `large` takes two methods at a time, as in equal_flops.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from equal_flops import METHODS, PAIRS, TASK, trial

from gradcost.core.key import Key
from gradcost.instruments.measure import time_step
from gradcost.instruments.timing import Timing
from gradcost.results.tuning import log_grid
from gradcost.studies.environment import describe, fingerprint
from gradcost.studies.phases import phases
from gradcost.studies.study import Stages, Study
from gradcost.studies.trial import Trial

POINTS = 50  # scores of each run: at 200, scoring would take longer than 12 s of training


def main(file: str) -> None:
    """Time a training step of every method alone, and write the milliseconds."""
    timings = {}
    for label in METHODS:
        with get_context("spawn").Pool(1) as process:
            timings[label] = process.apply(timed, (label,))
    record = {
        "task": repr(TASK),
        "ms": {label: round(timing.median, 3) for label, timing in timings.items()},
        "spread": {label: round(timing.spread, 3) for label, timing in timings.items()},
        "doubt": {label: timing.doubt for label, timing in timings.items() if timing.doubt},
        "environment": describe(1, fingerprint()),
    }
    Path(file).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(Path(file).read_text("utf-8"))


def timed(label: str) -> Timing:
    torch.set_num_threads(1)
    method = METHODS[label]
    return time_step(TASK.objective(Key(0)), TASK.batch_at(Key(0), 0), method.estimator, method.optimizer(1e-9, 0.0))


def study(seconds: float, times: str, groups: Sequence[Sequence[str]]) -> Study:
    """Return the study in which every run takes this many seconds of training steps. Groups run one after another."""

    def trials() -> Stages:
        milliseconds = json.loads(Path(__file__).with_name(times).read_text("utf-8"))["ms"]
        steps = {label: int(1000 * seconds / milliseconds[label]) for label in METHODS}

        def make(label: str, lr: float, phase: str, seed: int) -> Trial:
            return replace(trial(steps, label, lr, phase, seed), points=POINTS)

        for labels in groups:
            rates = {label: log_grid(*METHODS[label].rates, 9) for label in labels}
            yield from phases(rates, make, more=2, confirm=2, seeds=range(1, 9))

    return Study(f"Which gradient trains best in {seconds:g} s on {TASK}?", trials)


small = study(12, "equal-seconds.json", [list(METHODS)])
large = study(73, "equal-seconds-73.json", PAIRS)

if __name__ == "__main__":
    main(*sys.argv[1:])
