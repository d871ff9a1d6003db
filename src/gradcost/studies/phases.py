"""The phases of a fair comparison: tune on validation, confirm on new seeds, run finally on new seeds again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from gradcost.results.tuning import best, next_rate, scores
from gradcost.studies.study import Stages
from gradcost.studies.trial import Trial

MakeTrial = Callable[[str, float, str, int], Trial]  # of a method's name, a learning rate, a phase and a seed


def phases(
    rates: Mapping[str, Sequence[float]], make: MakeTrial, *, more: int, confirm: int, seeds: Sequence[int]
) -> Stages:
    """Yield the trials of each method, stage by stage. Every method gets the same number of tuning trials.

    1. "tune": one trial for each learning rate in `rates`, with seed 0.
    2. "tune": `more` further learning rates, one at a time, each chosen from the results so far.
    3. "confirm": the best three learning rates on `confirm` new seeds; their mean decides. Skipped if 0.
    4. "final": the best learning rate on `seeds`. A method whose trials all diverged has none.

    Args:
        rates: for each method, the learning rates of its grid.
        make: makes a trial of a method, a learning rate, a phase and a seed.
        more: the number of learning rates after the grid.
        confirm: the number of seeds that confirm.
        seeds: the seeds of the final runs.
    """
    tried = yield [make(name, lr, "tune", 0) for name in rates for lr in rates[name]]
    for _ in range(more):
        extra = [(name, next_rate(scores(tried, name), grid_ratio(rates[name]))) for name in rates]
        tried += yield [make(name, lr, "tune", 0) for name, lr in extra if lr is not None]
    chosen = {name: best(scores(tried, name), 3 if confirm else 1) for name in rates}
    if confirm:
        confirmed = yield [
            make(name, lr, "confirm", seed) for name in rates for lr in chosen[name] for seed in range(1, confirm + 1)
        ]
        chosen = {name: best(scores(confirmed, name)) or chosen[name] for name in rates}
    yield [make(name, lr, "final", seed) for name in rates for lr in chosen[name][:1] for seed in seeds]


def grid_ratio(rates: Sequence[float]) -> float:
    """Return the ratio of neighbours in a grid; sqrt(10) for a grid of one learning rate."""
    ends = sorted(rates)
    return (ends[-1] / ends[0]) ** (1 / (len(ends) - 1)) if len(ends) > 1 else math.sqrt(10)
