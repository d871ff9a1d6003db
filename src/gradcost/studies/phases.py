"""The phases of a fair comparison: tuned alike on validation, confirmed on fresh seeds, run on fresh seeds again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from gradcost.results.tuning import best, next_rate, scores
from gradcost.studies.study import Plan
from gradcost.studies.trial import Trial

Make = Callable[[str, float, str, int], Trial]  # of a method's name, a learning rate, a phase and a seed


def phases(
    rates: Mapping[str, Sequence[float]], make: Make, *, more: int, confirm: int, seeds: Sequence[int]
) -> Plan:
    """Trials of each method: over its `rates` first, then over `more` points that depend on what came of those, the
    best three again on `confirm` fresh seeds where there are any, and the winner on `seeds`, fresh ones again.

    Every method spends as many trials on its tuning; one whose every point diverged has no final run.
    """
    tried = yield [make(name, lr, "tune", 0) for name in rates for lr in rates[name]]
    for _ in range(more):
        extra = [(name, next_rate(scores(tried, name), ratio(rates[name]))) for name in rates]
        tried += yield [make(name, lr, "tune", 0) for name, lr in extra if lr is not None]
    chosen = {name: best(scores(tried, name), 3 if confirm else 1) for name in rates}
    if confirm:
        again = yield [
            make(name, lr, "confirm", seed) for name in rates for lr in chosen[name] for seed in range(1, confirm + 1)
        ]
        chosen = {name: best(scores(again, name)) or chosen[name] for name in rates}
    yield [make(name, lr, "final", seed) for name in rates for lr in chosen[name][:1] for seed in seeds]


def ratio(rates: Sequence[float]) -> float:
    """The step of a grid; half a decade where there is but one rate."""
    ends = sorted(rates)
    return (ends[-1] / ends[0]) ** (1 / (len(ends) - 1)) if len(ends) > 1 else math.sqrt(10)
