"""The three headline claims of Panchal et al. 2025, and the values of their quantities in the records of the study.

The abstract states each number as "up to", so each quantity is that of the forward-mode or zero-order method that
lost most in the tuning runs. It does not state the unit of the percentages, or the method and task of each number:

- "31.1% higher accuracy" is taken as percentage points.
- "34.8% faster convergence" is taken as the fraction of steps that is saved until the target accuracy.
- "3.8 times fewer computations" is taken as the ratio of FLOPs until the target accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from gradcost.papers.claims import Claim, Published
from gradcost.papers.intervals import Between, Measured
from gradcost.papers.panchal2025.study import AS_CODED, Length
from gradcost.results.records import TrialRecord
from gradcost.results.tuning import chosen, completed_finals

CHECKPOINTED = "BP-Checkpointing"
VANILLA = "BP-Vanilla"  # the same gradient as CHECKPOINTED, and the same steps at an equal learning rate
_FORWARD_ONLY = ("FmAD-", "ZO-", "MeZO")  # how the names of the compared methods begin

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


# why a method is compared, where no method reached the target in its tuning run
_MOST = {
    CONVERGENCE.name: "took the most steps in the tuning runs, of which none without backprop reached the target",
    COMPUTATIONS.name: "spent the most FLOPs in the tuning runs, of which none without backprop reached the target",
}


def is_compared(name: str) -> bool:
    """Return whether a method of the study is one that the claims compare with BP-Checkpointing."""
    return name.startswith(_FORWARD_ONLY) and not name.endswith(AS_CODED)


@dataclass(frozen=True)
class Found:
    """The values of a claim, one per seed, and the method that they compare with BP-Checkpointing, or None.

    choice: why this method, such as "lost most in the tuning runs".
    """

    values: tuple[Measured, ...]
    rival: str | None
    choice: str = ""


def compared(trials: Sequence[TrialRecord], lengths: Sequence[Length]) -> dict[str, Found]:
    """Return the values of the three quantities by the name of the claim.

    - "Largest over methods" is one method: that for which the quantity is largest in the tuning runs at the chosen
      learning rates. The largest of ten noisy differences would be above 0 even if no method differed.
    - A run that diverged has accuracy 0.
    - A run that does not reach the target would need more than its steps, so the quantity has bounds only. If no run
      of BP-Checkpointing reaches the target, there are no values.

    Args:
        trials: the records of the study.
        lengths: the cost of a step of every method.
    """
    by_name = {each.name: each for each in lengths}
    runs = {name: {run.seed: run for run in completed_finals(trials, name)} for name in by_name}
    rivals = [name for name in by_name if is_compared(name) and runs[name]]
    base = runs.get(CHECKPOINTED, {})
    if not rivals or not base:
        return {claim.name: Found((), None) for claim in (ACCURACY, CONVERGENCE, COMPUTATIONS)}
    tuned = {name: _tuning_run(trials, name) for name in rivals}
    own = by_name[CHECKPOINTED]
    found = {}
    for claim in (ACCURACY, CONVERGENCE, COMPUTATIONS):
        rival = max(rivals, key=lambda name: _loss_in_tuning(claim, by_name[name], tuned[name]))
        pairs = [(run, runs[rival][seed]) for seed, run in base.items() if seed in runs[rival]]
        if claim is not ACCURACY and all(run.reached is None for run, _ in pairs):
            pairs = []
        values = [_value(claim, (own, run), (by_name[rival], other)) for run, other in pairs]
        missed = claim is not ACCURACY and all(_unfinished(tuned[name]) for name in rivals)
        choice = _MOST[claim.name] if missed else "lost most in the tuning runs"
        found[claim.name] = Found(tuple(values), rival, choice) if pairs else Found((), None)
    return found


def flops_ratio(own: tuple[Length, TrialRecord], other: tuple[Length, TrialRecord]) -> Measured:
    """Return the FLOPs of `other` to the target as a ratio to those of `own`, or bounds of it.

    Args:
        own: the cost of a step of BP-Checkpointing, and one of its runs.
        other: those of another method, with the same seed.
    """
    return _value(COMPUTATIONS, own, other)


def _unfinished(run: TrialRecord | None) -> bool:
    """Whether a tuning run took all its steps without reaching the target."""
    return run is not None and run.reached is None and run.status != "diverged"


def _tuning_run(trials: Sequence[TrialRecord], name: str) -> TrialRecord | None:
    """Return the tuning run at the chosen learning rate; None if every one diverged."""
    lr = chosen(trials, name)
    return next((run for run in trials if (run.method, run.phase, run.lr) == (name, "tune", lr)), None)


def _loss_in_tuning(claim: Claim, length: Length, run: TrialRecord | None) -> tuple[float, float, float]:
    """Return what a method lost in its tuning run by the claim's quantity, as a sort key.

    Among methods that did not reach the target, it is the one with the most steps or FLOPs without it; where these
    are equal, the one with the lowest accuracy.
    """
    behind = -(run.validation.accuracy or 0.0) if run is not None and run.validation is not None else 0.0
    if claim is ACCURACY:
        return behind, 0.0, 0.0
    if run is None or (run.status == "diverged" and run.reached is None):
        return inf, inf, behind
    steps = run.steps if run.reached is None else run.reached
    spent = float(steps) if claim is CONVERGENCE else length.until(steps)
    return (inf if run.reached is None else spent), spent, behind


def _value(claim: Claim, own: tuple[Length, TrialRecord], other: tuple[Length, TrialRecord]) -> Measured:
    if claim is ACCURACY:
        return 100 * (_accuracy(own[1]) - _accuracy(other[1]))
    if claim is CONVERGENCE:
        (low, high), (least, most) = (_steps(run) for _, run in (own, other))
        ends = (-inf if high == inf else 100 * (1 - high / least), 100.0 if most == inf else 100 * (1 - low / most))
    else:
        (low, high), (least, most) = (_flops(length, run) for length, run in (own, other))
        ends = (0.0 if high == inf else least / high, inf if most == inf else most / low)
    return ends[0] if ends[0] == ends[1] else Between(*ends)


def _steps(run: TrialRecord) -> tuple[float, float]:
    """Return bounds of the steps to the target: equal if the run reached it, also one that diverged later."""
    if run.reached is not None:
        return run.reached, run.reached
    return (inf if run.status == "diverged" else run.steps), inf  # after a divergence, more steps would not help


def _flops(length: Length, run: TrialRecord) -> tuple[float, float]:
    low, high = _steps(run)
    return (inf if low == inf else length.until(int(low))), (inf if high == inf else length.until(int(high)))


def _accuracy(run: TrialRecord) -> float:
    return (run.test.accuracy or 0.0) if run.test is not None else 0.0
