"""How much each method was tuned and trained, and the rules that all methods get equally much."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gradcost.core.units import count
from gradcost.core.value import value
from gradcost.results.comparability import Violations
from gradcost.results.records import Cost, Results, TrialRecord

EQUAL = 1.1  # budgets count as equal if their FLOPs differ by at most this factor,
EQUALLY_LONG = 1.25  # or their seconds by this one: timings differ from run to run


@value
class TuningEffort:
    """The cost of tuning a method.

    Args:
        method: the method that was tuned.
        points: number of hyperparameter settings tried.
        steps: total training steps of all points.
        flops: total FLOPs of all points.
        seconds: total time of the training steps of all points, from the timing of one step.
    """

    method: str
    points: int
    steps: int | None = None
    flops: float | None = None
    seconds: float | None = None


@value
class TrainingEffort:
    """The cost of a final run of a method.

    Args:
        method: the method that was trained.
        steps: training steps of the run.
        flops: FLOPs of these steps.
        seconds: time of these steps, from the timing of one.
    """

    method: str
    steps: int
    flops: float | None = None
    seconds: float | None = None


def tuning_effort(results: Results, tuned: Sequence[TrialRecord]) -> TuningEffort:
    """Return the cost of tuning a method. A diverged run counts with the steps of a complete one."""
    method = tuned[0].method
    lengths = [run.steps for run in tuned if run.status == "finished"]
    others = [run.steps for run in results.trials if (run.phase, run.status) == ("tune", "finished")]
    complete = max(lengths or others, default=results.study.steps)
    steps = sum(run.steps if run.status == "finished" else complete for run in tuned)
    points = len({(run.estimator, run.optimizer, run.lr) for run in tuned})
    return TuningEffort(method, points, steps, *_flops_and_seconds(results, method, steps))


def training_efforts(results: Results) -> Iterator[TrainingEffort]:
    """Yield for each method the cost of its shortest final run that finished; nothing for one that has none."""
    lengths: dict[str, int] = {}
    for run in results.trials:
        if (run.phase, run.status) == ("final", "finished"):
            lengths[run.method] = min(run.steps, lengths.get(run.method, run.steps))
    for method, steps in lengths.items():
        yield TrainingEffort(method, steps, *_flops_and_seconds(results, method, steps))


def _flops_and_seconds(results: Results, method: str, steps: int) -> tuple[float | None, float | None]:
    cost = next((cost for cost in results.costs if cost.method == method), Cost(method, ""))
    flops = None if cost.flops is None else float(cost.flops * steps)
    return flops, None if cost.ms is None else cost.ms * steps / 1000


# ---- rules


def unequal_tuning(facts: Sequence[TuningEffort]) -> Violations:
    """Tuning is equal if all methods have the same points and steps, or FLOPs, or points and seconds."""
    points, runs = {fact.points for fact in facts}, {(fact.points, fact.steps) for fact in facts}
    if len(facts) < 2 or len(runs) == 1 or _close([fact.flops for fact in facts], EQUAL):
        return
    if len(points) == 1 and _close([fact.seconds for fact in facts], EQUALLY_LONG):
        return
    most, least = max(facts, key=_spent), min(facts, key=_spent)
    yield least.method, f"tuned on {_described(least)}, but {most.method} on {_described(most)}"


def unequal_training(facts: Sequence[TrainingEffort]) -> Violations:
    """Final runs are equal if all methods have the same steps, or FLOPs, or seconds."""
    if len({fact.steps for fact in facts}) < 2 or _close([fact.flops for fact in facts], EQUAL):
        return
    if _close([fact.seconds for fact in facts], EQUALLY_LONG):
        return
    most, least = max(facts, key=lambda fact: fact.steps), min(facts, key=lambda fact: fact.steps)
    unknown = "" if all(fact.flops for fact in facts) else "; their FLOPs are not all on record"
    longer, shorter = (f"{count(fact.steps, 'step')}{_with_flops(fact)}" for fact in (most, least))
    yield least.method, f"trained for {shorter}, but {most.method} for {longer}{unknown}"


def _close(amounts: Sequence[float | None], factor: float) -> bool:
    known = [amount for amount in amounts if amount]
    return len(known) == len(amounts) and max(known) <= factor * min(known)


def _spent(fact: TuningEffort) -> tuple[int, int]:
    return fact.points, fact.steps or 0


def _described(fact: TuningEffort) -> str:
    text = count(fact.points, "point")
    text += f" of {fact.steps:,} steps in all" if fact.steps is not None else ""
    return f"{text}{_with_flops(fact)}"


def _with_flops(fact: TuningEffort | TrainingEffort) -> str:
    return "" if fact.flops is None else f" and {fact.flops:.2g} FLOPs"
