"""Which method is best at an equal budget: equal memory, FLOPs, seconds or steps.

All rankings come from one set of final runs. A method's accuracy at a budget is the value of its validation
curve at step = budget / (cost of one step).

- The curve is linear between two evaluations. It starts at step 0 with the accuracy of guessing.
- From the step of its divergence on, a diverged run has the worst value, -inf.
- Methods were tuned for complete runs only. A run tuned for a smaller budget could be more accurate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite

import numpy as np

from gradcost.results.records import Cost, Curve, Results, TrialRecord
from gradcost.results.statistics import (
    Interval,
    interval,
    probability_best,
    probability_better,
    score_difference,
)
from gradcost.results.summary import summarise
from gradcost.results.tuning import completed, final_runs
from gradcost.results.wording import count, duration, flops, size

SWEEP = 48  # number of budgets at which the leader is determined


@dataclass(frozen=True)
class Resource:
    """A resource that a budget limits.

    Args:
        name: short name.
        noun: name in a sentence.
        per_step: returns the amount that one step uses; None if it was not measured.
        text: formats an amount with its unit.
        timed: whether the amount is measured with a clock, so that it may be unreliable.
    """

    name: str
    noun: str
    per_step: Callable[[Cost], float | None]
    text: Callable[[float], str]
    timed: bool = False


STEPS = Resource("steps", "steps", lambda cost: 1.0, lambda x: count(round(x), "step"))
FLOPS = Resource("flops", "FLOPs", lambda cost: cost.flops, flops)
SECONDS = Resource("seconds", "seconds", lambda cost: None if cost.ms is None else cost.ms / 1000, duration, True)


@dataclass(frozen=True)
class FinalCurves:
    """The validation scores of a method's final runs.

    Args:
        method: label of the method.
        cost: the measured cost of one step of the method.
        runs: (steps, scores) of each seed; the score is the accuracy, or `Metric.score`.
        steps: number of steps that every finished run covers.
        first: step of the earliest evaluation.
    """

    method: str
    cost: Cost
    runs: dict[int, tuple[list[float], list[float]]]
    steps: int
    first: int

    def at(self, step: float) -> dict[int, float]:
        """Return the score of each seed after `step` steps."""
        return {seed: float(_interpolated(*run, np.array([step]))[0]) for seed, run in self.runs.items()}


def final_curves(results: Results) -> list[FinalCurves]:
    """Return the curves of each method whose final runs were all evaluated, in the study's order."""
    costs = {cost.method: cost for cost in results.costs}
    curves = []
    for row in summarise(results):
        ended = completed(final_runs(results, row.method))
        runs = [t for t in ended if t.status == "diverged" or any(x is not None for x in _scores(t.curve, results))]
        finished = [t.steps for t in runs if t.status == "finished"]
        evaluated = [t.curve.validation_step[0] for t in runs if t.curve.validation_step]
        if not runs or len(runs) < len(ended):
            continue
        points = {t.seed: _points(t, results) for t in runs}
        if not all(steps for steps, _ in points.values()):
            continue
        cost = costs.get(row.method, Cost(row.method, ""))
        steps = min(finished, default=results.study.steps)
        curves.append(FinalCurves(row.method, cost, points, steps, max(1, min(evaluated, default=1))))
    return curves


def _scores(curve: Curve, results: Results) -> tuple[float | None, ...]:
    return curve.validation_accuracy if results.study.metric.is_accuracy else curve.validation_score


def _points(run: TrialRecord, results: Results) -> tuple[list[float], list[float]]:
    """The steps and scores of a run: an accuracy starts at that of guessing at step 0; -inf from a divergence on."""
    points: dict[int, float] = {0: results.study.chance or 0.0} if results.study.metric.is_accuracy else {}
    points |= {
        step: -inf if value is None else value
        for step, value in zip(run.curve.validation_step, _scores(run.curve, results), strict=False)
    }
    if run.status == "diverged":
        points = {step: value for step, value in points.items() if step < run.steps} | {run.steps: -inf}
    return list(points), list(points.values())


def _interpolated(steps: list[float], values: list[float], at: np.ndarray) -> np.ndarray:
    """The values at steps: linear between two points, constant after the last one and up to a divergence."""
    x, y = np.array(steps, dtype=float), np.array(values, dtype=float)
    found = np.searchsorted(x, at)
    right = np.minimum(found, len(x) - 1)
    left = np.maximum(right - 1, 0)
    with np.errstate(invalid="ignore"):  # differences of infinite values, which are replaced below
        between = y[left] + (at - x[left]) / np.maximum(x[right] - x[left], 1e-300) * (y[right] - y[left])
    between = np.where(np.isinf(y[right]) | np.isinf(y[left]), y[left], between)
    return np.where((found == len(x)) | (right == 0) | (x[right] == at), y[right], between)


@dataclass(frozen=True)
class Standing:
    """The result of one method at a budget.

    Args:
        method: label of the method.
        values: accuracy of each seed; -inf where it diverged.
        accuracy: the median of `values` with its confidence interval.
        steps: number of steps that the budget allows.
    """

    method: str
    values: dict[int, float]
    accuracy: Interval
    steps: float


@dataclass(frozen=True)
class Ranking:
    """The methods by their median accuracy at a budget, the best first.

    Args:
        name: short name of the resource.
        noun: name of the resource in a sentence.
        budget: the budget in words.
        standings: result of each method.
        best: fraction of the seeds on which each method is the best; ties are split.
        worse: P(A > B) + P(A = B) / 2 for the accuracy A of the winner and B of each other method.
        seeds: number of seeds that all methods have.
        leaders: (method, lowest budget, highest budget) of each range of budgets with one best method. The last range
            ends at the budget of the ranking.
        text: formats an amount of the resource.
        out: (method, reason) of each method that is not ranked.
        doubtful: methods whose cost comes from an unreliable timing.
    """

    name: str
    noun: str
    budget: str
    standings: tuple[Standing, ...]
    best: dict[str, float]
    worse: dict[str, float]
    seeds: int
    leaders: tuple[tuple[str, float, float], ...]
    text: Callable[[float], str]
    out: tuple[tuple[str, str], ...]
    doubtful: tuple[str, ...] = ()

    @property
    def winner(self) -> Standing:
        """The best method."""
        return self.standings[0]

    @property
    def margin(self) -> float | None:
        """The winner's median minus the runner-up's: inf if the runner-up's is -inf, None without a runner-up."""
        if len(self.standings) < 2:
            return None
        first, second = (standing.accuracy.median for standing in self.standings[:2])
        return score_difference(first, second)


def rankings(results: Results) -> list[Ranking]:
    """Return the rankings at equal memory, FLOPs, seconds and steps.

    A ranking is omitted if its resource was not measured, or if the median run of every method diverged. A
    metric other than the accuracy has none.
    """
    if not results.study.metric.is_accuracy:
        return []
    curves = final_curves(results)
    by_budget = [_by_memory(results, curves), *(_by_resource(results, curves, r) for r in (FLOPS, SECONDS, STEPS))]
    return [ranking for ranking in by_budget if ranking is not None and isfinite(ranking.winner.accuracy.median)]


def _by_resource(results: Results, curves: Sequence[FinalCurves], resource: Resource) -> Ranking | None:
    """The ranking at the largest budget for which every method has enough steps."""
    costs = {each.method: cost for each in curves if (cost := resource.per_step(each.cost))}
    measured = [each for each in curves if each.method in costs]
    if not measured:
        return None
    budget = min(each.steps * costs[each.method] for each in measured)
    smallest = min(min(each.first * costs[each.method] for each in measured), budget)
    budgets = [smallest * (budget / smallest) ** (i / (SWEEP - 1)) for i in range(SWEEP - 1)] + [budget]
    ranks = _ranks(measured, {method: [b / cost for b in budgets] for method, cost in costs.items()})
    leaders = [(max(ranks, key=lambda method: ranks[method][i]), b) for i, b in enumerate(budgets)]
    out = [
        (each.method, f"the {resource.noun} of a step were not measured") for each in curves if each not in measured
    ]
    ranking = _ranking(
        name=resource.name,
        noun=resource.noun,
        budget=f"{resource.text(budget)} each",
        standings=_standings(measured, {method: budget / cost for method, cost in costs.items()}),
        leaders=_joined(leaders),
        text=resource.text,
        out=[*out, *_not_ranked(results, curves)],
    )
    return replace(ranking, doubtful=tuple(each.method for each in measured if each.cost.doubt and resource.timed))


def _by_memory(results: Results, curves: Sequence[FinalCurves]) -> Ranking | None:
    """The ranking at the end of training. Methods whose peak exceeds the study's budget (if any) are excluded."""
    peaks = {each.method: each.cost.peak_bytes for each in curves if each.cost.peak_bytes is not None}
    if not peaks:
        return None
    budget = results.study.memory or max(peaks.values())
    within = [each for each in curves if peaks.get(each.method, inf) <= budget]
    if not within:
        return None
    steps: dict[str, float] = {each.method: each.steps for each in within}
    ranks = _ranks(within, {method: [taken] for method, taken in steps.items()})
    leaders = [
        (max((method for method in ranks if peaks[method] <= limit), key=ranks.__getitem__), float(limit))
        for limit in sorted({peaks[each.method] for each in within})
    ]
    leaders.append((leaders[-1][0], float(budget)))
    out = [
        (
            each.method,
            f"needs {size(peaks[each.method])}, more than {size(budget)}"
            if each.method in peaks
            else "its peak was not measured",
        )
        for each in curves
        if each not in within
    ]
    return _ranking(
        name="memory",
        noun="memory",
        budget=f"at most {size(budget)} beyond the weights",
        standings=_standings(within, steps),
        leaders=_joined(leaders),
        text=size,
        out=[*out, *_not_ranked(results, curves)],
    )


def _standings(curves: Sequence[FinalCurves], steps: dict[str, float]) -> list[Standing]:
    """Standings, sorted by median, then by the sum over seeds; tied methods stay in the study's order."""
    standings = []
    for each in curves:
        values = each.at(steps[each.method])
        standings.append(Standing(each.method, values, interval(list(values.values())), steps[each.method]))
    return sorted(
        standings, key=lambda s: (s.accuracy.median, sum(max(v, 0.0) for v in s.values.values())), reverse=True
    )


def _ranks(curves: Sequence[FinalCurves], steps: dict[str, list[float]]) -> dict[str, list[tuple[float, float]]]:
    """The values that `_standings` sorts by, of each method, for each of several numbers of steps."""
    ranks = {}
    for each in curves:
        at = np.array(steps[each.method])
        values = np.array([_interpolated(*run, at) for run in each.runs.values()])
        medians, sums = np.median(values, axis=0), np.maximum(values, 0.0).sum(axis=0)
        ranks[each.method] = list(zip(medians.tolist(), sums.tolist(), strict=True))
    return ranks


def _ranking(
    *,
    name: str,
    noun: str,
    budget: str,
    standings: Sequence[Standing],
    leaders: tuple[tuple[str, float, float], ...],
    text: Callable[[float], str],
    out: Sequence[tuple[str, str]],
) -> Ranking:
    """The ranking. Methods are compared on the seeds that all of them have."""
    shared = sorted(set.intersection(*(set(standing.values) for standing in standings)))
    values = {standing.method: [standing.values[seed] for seed in shared] for standing in standings}
    first, *others = values
    worse, best = {}, {}
    if shared:
        best = probability_best(values)
        worse = {other: probability_better(values[first], values[other]) for other in others}
    return Ranking(name, noun, budget, tuple(standings), best, worse, len(shared), leaders, text, tuple(out))


def _joined(leaders: Sequence[tuple[str, float]]) -> tuple[tuple[str, float, float], ...]:
    """Join consecutive budgets with the same leader; each range ends where the next begins."""
    ranges: list[tuple[str, float, float]] = []
    for method, budget in leaders:
        if ranges:
            last, low, _ = ranges[-1]
            ranges[-1] = (last, low, budget)
        if not ranges or ranges[-1][0] != method:
            ranges.append((method, budget, budget))
    return tuple(ranges)


def _not_ranked(results: Results, curves: Sequence[FinalCurves]) -> list[tuple[str, str]]:
    """The refused methods, and those with a final run that was not evaluated."""
    refused = {refusal.method: refusal.reason for refusal in results.refused}
    ranked = {each.method for each in curves}
    unevaluated = [(row.method, "not every final run was evaluated") for row in summarise(results)]
    return [*refused.items(), *(pair for pair in unevaluated if pair[0] not in ranked)]
