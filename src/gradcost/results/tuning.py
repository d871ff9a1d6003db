"""Learning rates: the score of each, the one that tuning chooses, and the next one to try.

Every method gets the same number of learning rates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import inf, isfinite, log, sqrt

from gradcost.core.errors import BadInput
from gradcost.core.units import count
from gradcost.results.records import Results, TrialRecord
from gradcost.results.wording import DASH, rate

Score = tuple[float, float, float]  # (score of the metric, -loss, -lr): the greatest is the best


def scores(runs: Iterable[TrialRecord], method: str) -> dict[float, Score]:
    """Return the score of each learning rate: the mean over its runs, or the worst score if one of them diverged.

    Scores are ordered as follows, so the choice does not depend on which run finished first:

    1. the higher validation accuracy, or the better value of the study's metric (`Metric.score`),
    2. the lower validation loss,
    3. the smaller learning rate.
    """
    by_rate: dict[float, list[TrialRecord]] = {}
    for run in completed(runs):
        if run.method == method:
            by_rate.setdefault(run.lr, []).append(run)
    return {lr: _score(lr, runs) for lr, runs in by_rate.items()}


def _score(lr: float, runs: list[TrialRecord]) -> Score:
    scores = [run.validation for run in runs if run.status == "finished" and run.validation is not None]
    if len(scores) < len(runs):
        return (-inf, -inf, -lr)
    metric = [-inf if score.score is None else score.score for score in scores]
    loss = [-inf if score.loss is None else -score.loss for score in scores]
    return (sum(metric) / len(runs), sum(loss) / len(runs), -lr)


def best(tried: Mapping[float, Score], count: int = 1) -> list[float]:
    """Return the `count` best learning rates of those that did not diverge, the best first."""
    converged = [lr for lr, score in tried.items() if isfinite(score[0]) or isfinite(score[1])]
    return sorted(converged, key=lambda lr: tried[lr], reverse=True)[:count]


def confirmed_scores(runs: Iterable[TrialRecord], method: str) -> dict[float, Score]:
    """Return the score of each learning rate that has confirming runs: the mean over its tuning and confirming runs.

    The tuning run counts, because a choice by fewer seeds is worse.
    """
    runs = [run for run in runs if run.method == method]
    confirmed = {run.lr for run in runs if run.phase == "confirm"}
    return scores((run for run in runs if run.phase in ("tune", "confirm") and run.lr in confirmed), method)


def confirmed_best(runs: Iterable[TrialRecord], method: str) -> list[float]:
    """Return the best learning rate by `confirmed_scores`; by the tuning runs if no confirmed rate converged.

    Returns:
        A list of one rate; empty if every run diverged.
    """
    runs = list(runs)
    return best(confirmed_scores(runs, method)) or best(scores((r for r in runs if r.phase == "tune"), method))


def chosen(runs: Iterable[TrialRecord], method: str) -> float | None:
    """Return the learning rate that tuning and confirming runs chose (`confirmed_best`); None if all diverged."""
    return next(iter(confirmed_best(runs, method)), None)


def possible_choices(runs: Sequence[TrialRecord]) -> list[float]:
    """Return the learning rates that tuning may have chosen: first the library's choice, then other possible winners.

    A user's study may rank by loss alone, so the rate with the best accuracy and the rate with the best loss are both
    possible winners. Confirming runs decide, unless all of them diverged: with the tuning runs, or alone, as in
    records of older versions.

    Args:
        runs: all runs of one method, at least one.
    """
    method = runs[0].method
    confirmed = [confirmed_scores(runs, method), scores((run for run in runs if run.phase == "confirm"), method)]
    return _winners(confirmed) or _winners([scores((run for run in runs if run.phase == "tune"), method)])


def _winners(choices: Sequence[dict[float, Score]]) -> list[float]:
    """The best rate by each set of scores; then those with the best accuracy or the best loss."""
    winners = [lr for tried in choices for lr in best(tried)]
    for tried in choices if winners else ():
        top = [max(score[i] for score in tried.values()) for i in (0, 1)]  # the metric's score, -loss
        winners += [lr for lr, score in tried.items() if any(score[i] == top[i] > -inf for i in (0, 1))]
    return list(dict.fromkeys(winners))


def finals(trials: Iterable[TrialRecord], method: str) -> list[TrialRecord]:
    """Return the final runs of `method` at one learning rate, one per seed.

    This is the learning rate that tuning chose. If no final run has it, it is the rate of the last final run.
    """
    trials = list(trials)
    runs = [t for t in trials if t.method == method and t.phase == "final"]
    lr = chosen(trials, method)
    if runs and lr not in {t.lr for t in runs}:
        lr = runs[-1].lr
    return sorted({t.seed: t for t in runs if t.lr == lr}.values(), key=lambda t: t.seed)


def completed(runs: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Return the runs that finished or diverged. A run that failed has no result, and runs again."""
    return [run for run in runs if run.status in ("finished", "diverged")]


def completed_finals(trials: Iterable[TrialRecord], method: str) -> list[TrialRecord]:
    """Return the `finals` of `method` that finished or diverged."""
    return completed(finals(trials, method))


def final_steps(results: Results) -> str:
    """Return the steps of the final runs that finished: "600 steps", or "20 to 600 steps" if they differ."""
    steps = {run.steps for run in results.trials if run.phase == "final" and run.status == "finished"}
    least, most = min(steps, default=results.study.steps), max(steps, default=results.study.steps)
    return count(most, "step") if least == most else f"{least:,} to {count(most, 'step')}"


@lru_cache(maxsize=4)
def _grouped(results: Results) -> dict[str, tuple[list[TrialRecord], list[TrialRecord]]]:
    """The runs and the `finals` of each method. Results are compared by identity."""
    runs: dict[str, list[TrialRecord]] = {}
    for run in results.trials:
        runs.setdefault(run.method, []).append(run)
    return {method: (of_method, finals(of_method, method)) for method, of_method in runs.items()}


def runs_of(results: Results, method: str) -> list[TrialRecord]:
    """Return the runs of a method, in the order of the records.

    Args:
        results: from `records.read`. The runs of all methods are cached per object.
        method: label of the method.
    """
    return list(_grouped(results).get(method, ((), ()))[0])


def final_runs(results: Results, method: str) -> list[TrialRecord]:
    """Return `finals` of a method; cached as in `runs_of`.

    Args:
        results: from `records.read`.
        method: label of the method.
    """
    return list(_grouped(results).get(method, ((), ()))[1])


def edge(grid: Sequence[float], lr: float | None) -> str | None:
    """Return "smallest" or "largest" if `lr` is that edge of an ascending grid; a better rate may lie beyond it.

    None if `lr` lies inside the grid, or the grid has fewer than two points.
    """
    if lr is None or len(grid) < 2 or grid[0] < lr < grid[-1]:
        return None
    return "smallest" if lr <= grid[0] else "largest"


def final_rate(results: Results, method: str) -> str:
    """Write the learning rate of the final runs, with an asterisk if it is an edge of the tried ones: "0.01 *"."""
    ended = final_runs(results, method)
    if not ended:
        return DASH
    grid = sorted({run.lr for run in runs_of(results, method) if run.phase == "tune"})
    return rate(ended[0].lr) + ("" if edge(grid, ended[0].lr) is None else " *")


def next_rate(tried: Mapping[float, Score], ratio: float) -> float | None:
    """Return the learning rate to try next.

    - If every rate diverged: one grid step below the smallest.
    - If the best rate is an edge of the grid: one grid step beyond it.
    - Otherwise: the geometric mean of the best rate and one of its neighbours. This is the better neighbour, or the
      other one if its distance in log(lr) is more than 1.25 times as large.
    - If that mean, to two digits, was tried already: the mean with the other neighbour, then one grid step below the
      smallest rate, then one grid step above the largest.

    So each method uses the same number of points, whether its grid grows or not. A diverged neighbour is used
    like any other, because the best rate is often the largest one that does not diverge.

    Args:
        tried: the score of each learning rate tried.
        ratio: the ratio of neighbours in the grid, above 1.
    Returns:
        The rate, to two digits; None if all candidates were tried.
    """
    rates = sorted(tried)
    winner = best(tried)
    if not winner:
        return _untried(rates[0] / ratio, rates)
    index = rates.index(winner[0])
    if index == 0:
        return _untried(rates[0] / ratio, rates)
    if index == len(rates) - 1:
        return _untried(rates[-1] * ratio, rates)
    neighbours = sorted((rates[index - 1], rates[index + 1]), key=lambda lr: tried[lr], reverse=True)
    gaps = [abs(log(neighbour / winner[0])) for neighbour in neighbours]
    if gaps[1] > 1.25 * gaps[0]:  # an earlier call has halved the gap to the better neighbour
        neighbours.reverse()
    between = [_untried(sqrt(winner[0] * neighbour), rates) for neighbour in neighbours]
    beyond = [_untried(rates[0] / ratio, rates), _untried(rates[-1] * ratio, rates)]
    return next((lr for lr in between + beyond if lr is not None), None)


def _untried(lr: float, tried: Iterable[float]) -> float | None:
    rounded = float(f"{lr:.2g}")
    return None if rounded in tried else rounded


MOST_RATES = 60_000  # more than there are floats with two digits


def log_grid(low: float, high: float, points: int) -> tuple[float, ...]:
    """Return `points` learning rates from `low` to `high`, evenly spaced in their logarithm, to two digits.

    Args:
        low: the smallest rate.
        high: the largest rate.
        points: number of rates. If it is 1, the rate is the geometric mean of `low` and `high`.
    Returns:
        The rates in ascending order.
    Raises:
        BadInput: the range is not 0 < low <= high < inf, or the rates are not distinct to two digits.
    """
    if not 0 < low <= high < inf:
        raise BadInput(f"a range of learning rates is LOW:HIGH with 0 < LOW <= HIGH, not {low!r}:{high!r}.")
    if points < 1:
        raise BadInput(f"a grid has 1 point or more, not {points}.")
    if points > MOST_RATES:
        raise BadInput(f"{points:,} points are not distinct to two digits: use fewer points.")
    ratio = high / low
    rates = [low * ratio ** (i / (points - 1)) for i in range(points)] if points > 1 else [sqrt(low * high)]
    rounded = tuple(float(f"{rate:.2g}") for rate in rates)
    if len(set(rounded)) < points:
        raise BadInput(
            f"{points} points between {low:g} and {high:g} are not distinct to two digits: use fewer points or a "
            "wider range."
        )
    return rounded
