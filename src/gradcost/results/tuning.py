"""Which learning rate to try next, and which one tuning chose: the same number of points for every method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, isfinite, log, sqrt

from gradcost.core.errors import BadInput
from gradcost.results.records import TrialRecord

Score = tuple[float, float, float]


def scores(runs: Iterable[TrialRecord], method: str) -> dict[float, Score]:
    """For each learning rate that was tried, how good it was: the mean over its runs; one that diverged is the worst.

    The better validation accuracy wins, then the lower validation loss, then the smaller learning rate: so the
    choice does not depend on the order in which the runs finished.
    """
    by_rate: dict[float, list[TrialRecord]] = {}
    for run in runs:
        if run.method == method and run.status in ("finished", "diverged"):
            by_rate.setdefault(run.lr, []).append(run)
    return {lr: _score(lr, runs) for lr, runs in by_rate.items()}


def _score(lr: float, runs: list[TrialRecord]) -> Score:
    scores = [run.validation for run in runs if run.status == "finished" and run.validation is not None]
    if len(scores) < len(runs):
        return (-inf, -inf, -lr)
    accuracy = [-inf if score.accuracy is None else score.accuracy for score in scores]
    loss = [-inf if score.loss is None else -score.loss for score in scores]
    return (sum(accuracy) / len(runs), sum(loss) / len(runs), -lr)


def best(found: Mapping[float, Score], count: int = 1) -> list[float]:
    """The `count` best learning rates that did not diverge, the best first."""
    alive = [lr for lr, score in found.items() if isfinite(score[0]) or isfinite(score[1])]
    return sorted(alive, key=lambda lr: found[lr], reverse=True)[:count]


def chosen(runs: Iterable[TrialRecord], method: str) -> float | None:
    """The learning rate that tuning chose: by the confirming runs where there are any; None where all diverged."""
    runs = list(runs)
    for phase in ("confirm", "tune"):
        winner = best(scores((run for run in runs if run.phase == phase), method))
        if winner:
            return winner[0]
    return None


def finals(trials: Iterable[TrialRecord], method: str) -> list[TrialRecord]:
    """The final runs of `method` at one learning rate, one a seed: the chosen rate, or the last one run."""
    trials = list(trials)
    runs = [t for t in trials if t.method == method and t.phase == "final"]
    lr = chosen(trials, method)
    if runs and lr not in {t.lr for t in runs}:
        lr = runs[-1].lr
    return sorted({t.seed: t for t in runs if t.lr == lr}.values(), key=lambda t: t.seed)


def next_rate(found: Mapping[float, Score], ratio: float) -> float | None:
    """The learning rate to try next: beyond the edge where the winner lies on one, else in the wider of the two gaps
    beside it, of equal ones on the side of the better neighbour; beyond an edge where two digits leave nothing
    between. So each method spends as many points, whether its grid has to grow or not. A neighbour that diverged
    says nothing against the rates before it: the best is often the last one that does not diverge.

    ratio: the step of the grid, above 1. None where two digits leave nothing to try there either.
    """
    tried = sorted(found)
    winner = best(found)
    if not winner:
        return _new(tried[0] / ratio, tried)
    at = tried.index(winner[0])
    if at == 0:
        return _new(tried[0] / ratio, tried)
    if at == len(tried) - 1:
        return _new(tried[-1] * ratio, tried)
    beside = sorted((tried[at - 1], tried[at + 1]), key=lambda lr: found[lr], reverse=True)
    gaps = [abs(log(neighbour / winner[0])) for neighbour in beside]
    if gaps[1] > 1.25 * gaps[0]:  # the better neighbour's side has been looked at already
        beside.reverse()
    between = [_new(sqrt(winner[0] * neighbour), tried) for neighbour in beside]
    beyond = [_new(tried[0] / ratio, tried), _new(tried[-1] * ratio, tried)]
    return next((lr for lr in between + beyond if lr is not None), None)


def _new(lr: float, tried: Iterable[float]) -> float | None:
    rounded = float(f"{lr:.2g}")
    return None if rounded in tried else rounded


def log_grid(low: float, high: float, points: int) -> tuple[float, ...]:
    """Return `points` learning rates from `low` to `high`, evenly spaced in their logarithm, to two digits.

    Raises:
        BadInput: the range is not 0 < low <= high < inf, or two digits cannot separate that many points.
    """
    if not 0 < low <= high < inf:
        raise BadInput(f"a range of learning rates is LOW:HIGH with 0 < LOW <= HIGH, not {low!r}:{high!r}.")
    if points < 1:
        raise BadInput(f"a grid has 1 point or more, not {points}.")
    ratio = high / low
    rates = [low * ratio ** (i / (points - 1)) for i in range(points)] if points > 1 else [sqrt(low * high)]
    rounded = tuple(float(f"{rate:.2g}") for rate in rates)
    if len(set(rounded)) < points:
        raise BadInput(
            f"{points} points between {low:g} and {high:g} are not distinct to two digits: use fewer points or a "
            "wider range."
        )
    return rounded
