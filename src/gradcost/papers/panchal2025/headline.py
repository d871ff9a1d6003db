"""The three headline claims of Panchal et al. 2025, and the values of their quantities in the records of the study.

The abstract states each number as "up to", so each quantity is the largest value over the forward-mode and
zero-order methods of the study. It does not state the unit of the percentages, or the method and task of each number:

- "31.1% higher accuracy" is taken as percentage points.
- "34.8% faster convergence" is taken as the fraction of steps that is saved until the target accuracy.
- "3.8 times fewer computations" is taken as the ratio of FLOPs until the target accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

from gradcost.papers.claims import Claim, Published
from gradcost.results.records import TrialRecord
from gradcost.results.tuning import finals

CHECKPOINTED = "BP-Checkpointing"
FORWARD_ONLY = ("FmAD-", "ZO-", "MeZO")  # how the names of the compared methods begin

ACCURACY = Claim(
    name="accuracy",
    words="Checkpointed backprop is up to 31.1% more accurate than forward mode and zero-order.",
    location="abstract",
    quantity="test accuracy of BP-Checkpointing less that of a method, largest over methods, in percentage points",
    published=Published(31.1, rounding=0.05),
    reference=0.0,
    bounds=(-100.0, 100.0),
)
CONVERGENCE = Claim(
    name="convergence",
    words="Checkpointed backprop converges up to 34.8% faster than forward mode and zero-order.",
    location="abstract",
    quantity="steps to the target accuracy that BP-Checkpointing saves against a method, largest over methods, in %",
    published=Published(34.8, rounding=0.05),
    reference=0.0,
    bounds=(-inf, 100.0),
)
COMPUTATIONS = Claim(
    name="computations",
    words="Checkpointed backprop needs up to 3.8 times fewer computations than forward mode and zero-order.",
    location="abstract",
    quantity="FLOPs to the target accuracy, ratio of a method to BP-Checkpointing, largest over methods",
    published=Published(3.8, rounding=0.05),
    reference=1.0,
    is_ratio=True,
)


def values(trials: Sequence[TrialRecord], forwards: Mapping[str, float]) -> dict[str, tuple[float, ...]]:
    """Return the values of the three quantities, one per seed for which BP-Checkpointing reached the target.

    A method that diverged has accuracy 0. One that did not reach the target saves 100% of its steps to
    BP-Checkpointing, and has an infinite ratio.

    Args:
        trials: the records of the study.
        forwards: FLOPs per step of each method, in forward passes; its names that begin as in FORWARD_ONLY are the
            compared methods.
    Returns:
        By the name of the claim. The accuracy has a value for every seed of BP-Checkpointing.
    """
    runs = {name: {run.seed: run for run in finals(trials, name)} for name in forwards}
    methods = [name for name in forwards if name.startswith(FORWARD_ONLY) and runs[name]]
    found: dict[str, list[float]] = {claim.name: [] for claim in (ACCURACY, CONVERGENCE, COMPUTATIONS)}
    for seed, base in runs.get(CHECKPOINTED, {}).items():
        rivals = [(forwards[name], runs[name][seed]) for name in methods if seed in runs[name]]
        if not rivals:
            continue
        found[ACCURACY.name].append(max(100 * (_accuracy(base) - _accuracy(run)) for _, run in rivals))
        if base.reached is None:
            continue
        steps = [(cost, inf if run.reached is None else run.reached) for cost, run in rivals]
        found[CONVERGENCE.name].append(max(100 * (1 - base.reached / count) for _, count in steps))
        flops = base.reached * forwards[CHECKPOINTED]
        found[COMPUTATIONS.name].append(max(cost * count / flops for cost, count in steps))
    return {name: tuple(numbers) for name, numbers in found.items()}


def _accuracy(run: TrialRecord) -> float:
    return (run.test.accuracy or 0.0) if run.test is not None else 0.0
