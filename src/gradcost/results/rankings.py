"""Which method is best when all may spend the same: equal memory, FLOPs, seconds or steps.

Every ranking is read off one set of final runs: a method's accuracy when the budget is spent, on its validation
curve at budget / price of a step, linear between two evaluations and from guessing before the first. No method was
tuned for the smaller budgets, so they tell what this training had reached, not what one made for them would.
A run that diverged is the worst result from the step on at which it did. Imports no torch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, isinf

from gradcost.results.records import Cost, Results, TrialRecord
from gradcost.results.statistics import (
    Interval,
    SignFlip,
    holm,
    interval,
    probability_best,
    probability_better,
    sign_flip,
)
from gradcost.results.summary import summarise
from gradcost.results.tuning import finals
from gradcost.results.wording import count, duration, flops, size

SWEEP = 48  # budgets that are looked at below the whole one


@dataclass(frozen=True)
class Currency:
    """What is spent alike: `price` is that of a step, None where it was not measured; `text` writes an amount."""

    name: str
    noun: str
    price: Callable[[Cost], float | None]
    text: Callable[[float], str]
    clocked: bool = False  # whether it was measured with a clock, which may be in doubt


STEPS = Currency("steps", "steps", lambda cost: 1.0, lambda x: count(round(x), "step"))
FLOPS = Currency("flops", "FLOPs", lambda cost: cost.flops, flops)
SECONDS = Currency("seconds", "seconds", lambda cost: None if cost.ms is None else cost.ms / 1000, duration, True)


@dataclass(frozen=True)
class Path:
    """The final runs of one method, each as (steps, accuracies) by seed, and what they cost."""

    method: str
    cost: Cost
    runs: dict[int, tuple[list[float], list[float]]]
    steps: int  # that every run of it covers
    first: int  # the earliest evaluation

    def at(self, step: float) -> dict[int, float]:
        """The accuracy of each seed after so many steps."""
        return {seed: _read(*run, step) for seed, run in self.runs.items()}


def paths(results: Results) -> list[Path]:
    """A path for each method with final runs that were evaluated, in the study's order."""
    costs = {cost.method: cost for cost in results.costs}
    found = []
    for row in summarise(results):
        ended = [t for t in finals(results.trials, row.method) if t.status in ("finished", "diverged")]
        runs = [t for t in ended if t.status == "diverged" or any(x is not None for x in t.curve.validation_accuracy)]
        finished = [t.steps for t in runs if t.status == "finished"]
        evaluated = [t.curve.validation_step[0] for t in runs if t.curve.validation_step]
        if not runs or len(runs) < len(ended):
            continue
        lines = {t.seed: _line(t, results.study.chance or 0.0) for t in runs}
        cost = costs.get(row.method, Cost(row.method, ""))
        steps = min(finished, default=results.study.steps)
        found.append(Path(row.method, cost, lines, steps, max(1, min(evaluated, default=1))))
    return found


def _line(run: TrialRecord, chance: float) -> tuple[list[float], list[float]]:
    curve = run.curve
    points = {0: chance}
    points |= {
        step: -inf if value is None else value
        for step, value in zip(curve.validation_step, curve.validation_accuracy, strict=False)
    }
    if run.status == "diverged":
        points = {step: value for step, value in points.items() if step < run.steps} | {run.steps: -inf}
    return list(points), list(points.values())


def _read(steps: list[float], values: list[float], at: float) -> float:
    """Linear between two points, the last one held; what leads to a divergence is not one yet."""
    right = bisect_left(steps, at)
    if right == len(steps):
        return values[-1]
    if right == 0 or steps[right] == at:
        return values[right]
    left = values[right - 1]
    if isinf(values[right]) or isinf(left):
        return left
    part = (at - steps[right - 1]) / (steps[right] - steps[right - 1])
    return left + part * (values[right] - left)


@dataclass(frozen=True)
class Standing:
    """One method when the budget is spent: the accuracy of each seed, -inf where it diverged, after `steps`."""

    method: str
    values: dict[int, float]
    accuracy: Interval
    steps: float


@dataclass(frozen=True)
class Lead:
    """The winner against one other: `better` is P(A > B) + P(A = B) / 2, `p` the sign-flip test's after Holm."""

    better: float
    test: SignFlip
    p: float


@dataclass(frozen=True)
class Ranking:
    """The methods by their median when `budget` is spent, the best first.

    best: the share of seeds on which each is the best. leads: the winner against each of the others. reigns: who
    leads from which budget to which, up to `budget`. out: who is not ranked, and why.
    """

    name: str
    noun: str
    budget: str
    standings: tuple[Standing, ...]
    best: dict[str, float]
    leads: dict[str, Lead]
    leaders: tuple[tuple[str, float, float], ...]
    text: Callable[[float], str]
    out: tuple[tuple[str, str], ...]
    doubtful: tuple[str, ...] = ()  # the methods whose price was measured in doubt

    @property
    def winner(self) -> Standing:
        return self.standings[0]

    @property
    def margin(self) -> float | None:
        """How far the winner's median is ahead of the runner-up's; None without one, inf where that diverged."""
        if len(self.standings) < 2:
            return None
        first, second = (standing.accuracy.median for standing in self.standings[:2])
        return 0.0 if first == second else first - second


def rankings(results: Results) -> list[Ranking]:
    """Equal memory, FLOPs, seconds and steps, as far as the records tell them and there is a winner: a method whose
    median run diverged is none."""
    found = paths(results)
    made = [_by_memory(results, found), *(_by_currency(results, found, what) for what in (FLOPS, SECONDS, STEPS))]
    return [ranking for ranking in made if ranking is not None and isfinite(ranking.winner.accuracy.median)]


def _by_currency(results: Results, found: Sequence[Path], what: Currency) -> Ranking | None:
    """The largest budget that the runs of every method cover."""
    prices = {path.method: price for path in found if (price := what.price(path.cost))}
    priced = [path for path in found if path.method in prices]
    if not priced:
        return None
    budget = min(path.steps * prices[path.method] for path in priced)
    least = min(min(path.first * prices[path.method] for path in priced), budget)
    budgets = [least * (budget / least) ** (i / (SWEEP - 1)) for i in range(SWEEP - 1)] + [budget]
    leaders = [(_standings(priced, {m: b / p for m, p in prices.items()})[0].method, b) for b in budgets]
    standings = _standings(priced, {method: budget / price for method, price in prices.items()})
    out = [(path.method, f"the {what.noun} of a step were not measured") for path in found if path not in priced]
    told = f"{what.text(budget)} each"
    made = _ranking(
        what.name, what.noun, told, standings, _leaders(leaders), what.text, [*out, *_out(results, found)]
    )
    return replace(made, doubtful=tuple(path.method for path in priced if path.cost.doubt and what.clocked))


def _by_memory(results: Results, found: Sequence[Path]) -> Ranking | None:
    """Those whose peak is within the study's budget, or all where it has none, each after its whole runs."""
    peaks = {path.method: path.cost.peak_bytes for path in found if path.cost.peak_bytes is not None}
    if not peaks:
        return None
    budget = results.study.memory or max(peaks.values())
    within = [path for path in found if peaks.get(path.method, inf) <= budget]
    if not within:
        return None
    steps: dict[str, float] = {path.method: path.steps for path in within}
    leaders = []
    for limit in sorted({peaks[path.method] for path in within}):
        fit = [path for path in within if peaks[path.method] <= limit]
        leaders.append((_standings(fit, steps)[0].method, float(limit)))
    leaders.append((leaders[-1][0], float(budget)))
    out = [
        (
            path.method,
            f"needs {size(peaks[path.method])}, more than {size(budget)}"
            if path.method in peaks
            else "its peak was not measured",
        )
        for path in found
        if path not in within
    ]
    told = f"at most {size(budget)} beyond the weights"
    leaders = _leaders(leaders)
    return _ranking("memory", "memory", told, _standings(within, steps), leaders, size, [*out, *_out(results, found)])


def _standings(found: Sequence[Path], steps: dict[str, float]) -> list[Standing]:
    """By the median, then the sum of what was reached; equal ones stay in the study's order."""
    made = []
    for path in found:
        values = path.at(steps[path.method])
        made.append(Standing(path.method, values, interval(list(values.values())), steps[path.method]))
    return sorted(made, key=lambda s: (s.accuracy.median, sum(max(v, 0.0) for v in s.values.values())), reverse=True)


def _ranking(name: str, noun: str, budget: str, standings: list[Standing], leaders: tuple, text: Callable, out: list):
    """The ranking, with the comparisons over the seeds that every method has."""
    shared = sorted(set.intersection(*(set(standing.values) for standing in standings)))
    values = {standing.method: [standing.values[seed] for seed in shared] for standing in standings}
    first, *others = values
    leads, best = {}, {}
    if shared:
        best = probability_best(values)
        tests = {other: sign_flip(values[first], values[other]) for other in others}
        adjusted = holm({other: test.p for other, test in tests.items()})
        better = {other: probability_better(values[first], values[other]) for other in others}
        leads = {other: Lead(better[other], tests[other], adjusted[other]) for other in others}
    return Ranking(name, noun, budget, tuple(standings), best, leads, leaders, text, tuple(out))


def _leaders(leaders: Sequence[tuple[str, float]]) -> tuple[tuple[str, float, float], ...]:
    """Neighbours with one leader, joined; each reign ends where the next one begins."""
    made: list[list] = []
    for method, budget in leaders:
        if made and made[-1][0] == method:
            made[-1][2] = budget
        else:
            if made:
                made[-1][2] = budget
            made.append([method, budget, budget])
    return tuple((method, low, high) for method, low, high in made)


def _out(results: Results, found: Sequence[Path]) -> list[tuple[str, str]]:
    """The methods that were refused, and those of which a final run was not evaluated."""
    refused = {refusal.method: refusal.reason for refusal in results.refused}
    ranked = {path.method for path in found}
    waiting = [(row.method, "not every final run of it was evaluated") for row in summarise(results)]
    return [*refused.items(), *(pair for pair in waiting if pair[0] not in ranked)]
