"""The phases of a comparison: tune on validation, confirm the best rates on new seeds, train on new seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from gradcost.results.tuning import best, confirmed_best, next_rate, scores
from gradcost.studies.study import Stages
from gradcost.studies.trial import Trial

MakeTrial = Callable[[str, float, str, int], Trial]  # (method, learning rate, phase, seed) -> trial


def phases(
    rates: Mapping[str, Sequence[float]], make: MakeTrial, *, more: int, confirm: int, seeds: Sequence[int]
) -> Stages:
    """Yield the trials of all methods, stage by stage, and receive the records of each stage.

    Every method gets the same number of tuning trials.

    1. "tune": one trial for each learning rate in `rates`, with seed 0.
    2. "tune": `more` further learning rates, one at a time, each chosen from the results so far.
    3. "confirm": the best three learning rates, on `confirm` new seeds each. The best mean score over the tuning seed
       and these seeds wins. Skipped if `confirm` is 0.
    4. "final": the best learning rate on `seeds`. A method whose trials all diverged has no final trial.

    Args:
        rates: for each method, the learning rates of its grid.
        make: returns the trial for a method, a learning rate, a phase and a seed.
        more: the number of learning rates that follow the grid.
        confirm: the number of seeds in the "confirm" phase; 0 skips it.
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
        chosen = {name: confirmed_best([*tried, *confirmed], name) for name in rates}
    yield [make(name, lr, "final", seed) for name in rates for lr in chosen[name][:1] for seed in seeds]


def grid_ratio(rates: Sequence[float]) -> float:
    """Return the ratio of neighbouring rates in an evenly log-spaced grid; sqrt(10) for a grid of one rate."""
    ascending = sorted(rates)
    return (ascending[-1] / ascending[0]) ** (1 / (len(ascending) - 1)) if len(ascending) > 1 else math.sqrt(10)
