"""What each method needs to reach a common target, as a ratio to a reference method.

A ratio to a common target does not depend on where the runs were stopped, unlike the accuracy at the end of training.

- A run reaches a target at its first evaluation whose validation accuracy is at least the target, or whose
  validation loss is at most the target.
- A run that does not reach the target has the amount inf: it needs more than the run had. A diverged run too. A
  failed run has no result and is left out.
- A ratio is taken between two final runs of one seed: these start at the same weights and see the same batches. Its
  interval is that of the median over seeds (`statistics.interval`).
- The median amount is the Kaplan-Meier estimate. All runs of a method end at the same step, so it is the smallest
  amount by which half of the runs have reached the target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, isfinite

from gradcost.results.guessing import guess_of, guessing_loss, targets_of
from gradcost.results.rankings import FLOPS, SECONDS, STEPS
from gradcost.results.records import Cost, Results, TrialRecord
from gradcost.results.statistics import Interval, interval
from gradcost.results.summary import summarise
from gradcost.results.tuning import completed, confirmed_best, final_runs, runs_of, scores

RESOURCES = (STEPS, FLOPS, SECONDS)
ACCURACIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
ALIKE = 0.02  # methods whose tuning accuracies differ by at most this are alike: the first one stands for them
LOSSES = (0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05)  # as multiples of the loss of guessing


@dataclass(frozen=True)
class Target:
    """A validation accuracy to reach, or a validation loss to fall to.

    Args:
        quantity: "accuracy" or "loss".
        value: the accuracy, 0 to 1, or the loss in nats.
    """

    quantity: str
    value: float

    def step(self, run: TrialRecord) -> float:
        """Return the first evaluated step at which the run has reached the target; inf if it never does."""
        for step, value in evaluations(run, self.quantity):
            if value >= self.value if self.quantity == "accuracy" else value <= self.value:
                return step
        return inf


def evaluations(run: TrialRecord, quantity: str) -> Iterator[tuple[int, float]]:
    """Yield (step, value) of each evaluation on the validation split, except one where the run had diverged.

    Args:
        run: the run.
        quantity: "accuracy" or "loss".
    """
    values = run.curve.validation_accuracy if quantity == "accuracy" else run.curve.validation_loss
    for step, value in zip(run.curve.validation_step, values, strict=False):
        if value is not None and not (run.status == "diverged" and step >= run.steps):
            yield step, value


@dataclass(frozen=True)
class Reach:
    """What one method needs to reach one target.

    Args:
        method: label of the method.
        target: the target.
        reached: number of final runs that reach it.
        runs: number of final runs.
        median: the Kaplan-Meier median by resource ("steps", "flops", "seconds"); inf if fewer than half reach it.
        ratio: by resource, the ratio to the reference, paired by seed. Its ends are inf if runs do not reach the
            target. Without the resource's cost, or where a run of the reference does not reach the target: missing.
    """

    method: str
    target: Target
    reached: int
    runs: int
    median: dict[str, float]
    ratio: dict[str, Interval]


def reference(results: Results) -> str | None:
    """Return the method with the exact gradient and the best tuning score; None if the study has none.

    The tuning runs choose it, so the final runs are not used twice. Of methods whose accuracies are at most 2 points
    below the best, the first one in the study is returned, so that the answer does not depend on a rounding. By
    another metric than the accuracy, the best score decides.
    """
    return _best_tuned(results, exact=True)


def best_estimated(results: Results) -> str | None:
    """Return the method with an estimated gradient and the best tuning score; None if the study has none."""
    return _best_tuned(results, exact=False)


def _best_tuned(results: Results, exact: bool) -> str | None:
    scored = {}
    for method in results.study.methods:
        runs = runs_of(results, method)
        tuned = [run for run in runs if run.phase in ("tune", "confirm")]
        rate = confirmed_best(tuned, method)
        if rate and completed(final_runs(results, method)) and _is_exact(results, method) is exact:
            scored[method] = scores((run for run in tuned if run.lr == rate[0]), method)[rate[0]][:2]
    if not scored:
        return None
    best = max(scored, key=lambda method: scored[method])
    accuracy, _ = scored[best]
    if not results.study.metric.is_accuracy or not isfinite(accuracy):
        return best
    return next(method for method, score in scored.items() if score[0] >= accuracy - ALIKE)


def _is_exact(results: Results, method: str) -> bool:
    return next((row.exact for row in summarise(results) if row.method == method), False)


def reaches(results: Results, targets: Sequence[Target] | None = None) -> list[Reach]:
    """Return what every method needs to reach each target, in the order of methods, then of targets.

    Args:
        results: from `records.read`.
        targets: the targets. None: `common_targets(results)`.
    Returns:
        One Reach per method and target; empty if no method has the exact gradient.
    """
    first = reference(results)
    targets = common_targets(results) if targets is None else targets
    if first is None:
        return []
    costs = {cost.method: cost for cost in results.costs}
    base, unit = completed(final_runs(results, first)), costs.get(first, Cost(first, ""))
    rows = []
    for method in results.study.methods:
        if runs := completed(final_runs(results, method)):
            cost = costs.get(method, Cost(method, ""))
            rows += [_reach(method, target, runs, base, cost, unit) for target in targets]
    return rows


def _reach(
    method: str, target: Target, runs: Sequence[TrialRecord], base: Sequence[TrialRecord], cost: Cost, unit: Cost
) -> Reach:
    steps = {run.seed: target.step(run) for run in runs}
    base_steps = {run.seed: target.step(run) for run in base}
    shared = [seed for seed in steps if seed in base_steps]
    half = sorted(steps.values())[(len(steps) - 1) // 2]  # the median, or the lower one of two
    median, ratio = {}, {}
    for resource in RESOURCES:
        price, base_price = resource.per_step(cost), resource.per_step(unit)
        if price is None:
            continue
        median[resource.name] = price * half
        if base_price and shared and all(isfinite(base_steps[seed]) for seed in shared):
            ratio[resource.name] = interval([price * steps[s] / (base_price * base_steps[s]) for s in shared])
    reached = sum(isfinite(step) for step in steps.values())
    return Reach(method, target, reached, len(runs), median, ratio)


def common_targets(results: Results) -> list[Target]:
    """Return targets that every run of the reference reaches: accuracies, then losses, the easier ones first.

    Of each quantity, the four hardest among those that half of the runs of another method reach, and the hardest
    target that only the reference reaches. A target that a run with an estimated gradient has after one step, as a
    pretrained model may, is left out: the model had it before the training.
    """
    first = reference(results)
    if first is None:
        return []
    base = completed(final_runs(results, first))
    guess, loss = guess_of(results.study), guessing_loss(results.study.chance)
    limit = 0.0 if guess is None else guess.limit(targets_of(base, "validation"))
    floor = max(limit, 1.5 * (results.study.chance or 0.0))
    candidates = [[Target("accuracy", value) for value in ACCURACIES if value > floor]]
    candidates.append([Target("loss", float(f"{loss * part:.2g}")) for part in LOSSES] if loss else [])
    others = [completed(final_runs(results, method)) for method in _others(results, first)]
    chosen = []
    for targets in candidates:
        possible = [t for t in targets if base and all(isfinite(t.step(run)) for run in base)]
        possible = [t for t in possible if all(t.step(run) > 1 for runs in others for run in runs)]
        shared = [t for t in possible if any(_half_reach(t, runs) for runs in others)]
        chosen += [*shared[-4:], *[t for t in possible[-1:] if t not in shared]]
    return chosen


def _others(results: Results, first: str) -> list[str]:
    """The methods with an estimated gradient."""
    return [row.method for row in summarise(results) if not row.exact and row.method != first]


def _half_reach(target: Target, runs: Sequence[TrialRecord]) -> bool:
    return bool(runs) and 2 * sum(isfinite(target.step(run)) for run in runs) >= len(runs)
