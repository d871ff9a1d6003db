"""Facts that the fairness of a study depends on, from a results folder or from a publication.

One or more rules of `gradcost.results.lint` check each class of facts. A rule without facts is not checked.
Facts from a results folder concern one hyperparameter, the learning rate, because the records name no other. Facts
from a publication may concern any hyperparameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from math import isfinite, sqrt
from statistics import fmean, variance

from gradcost.core.metric import ACCURACY, Metric
from gradcost.core.value import value
from gradcost.results.comparability import MethodDesign, at_given_rates, designs
from gradcost.results.effort import TrainingEffort, TuningEffort, training_efforts, tuning_effort
from gradcost.results.guessing import Guess, guess_of, targets_of
from gradcost.results.records import Results, TrialRecord
from gradcost.results.tuning import best, completed, confirmed_scores, edge, possible_choices, scores

EVERY = "every method"


@value
class TuningWinners:
    """For one method: the number of tuning searches whose best value is an edge of the grid.

    Args:
        method: the method that was tuned.
        searches: number of searches.
        on_edge: number of searches whose winner is an edge of the grid.
        which: the winners on an edge, as a sentence.
    """

    method: str
    searches: int
    on_edge: int
    which: str = ""


@value
class Setting:
    """One setting of a method, such as its optimizer, in the tuning runs and in the final runs.

    Args:
        method: the method that ran.
        what: name of the setting.
        tuned: its value in the tuning runs.
        trained: its value in the final runs.
    """

    method: str
    what: str
    tuned: str
    trained: str


@value
class TuningScores:
    """The accuracies of the points that tuning compared.

    Args:
        method: the method that was tuned.
        scores: (name, accuracy) of each point that finished, the best first.
        diverged: number of points that diverged.
        spread: standard deviation of the accuracy between seeds.
        guess: accuracy of guessing. None: not known.
        targets: number of examples or tokens over which each accuracy is averaged.
        metric: what ranks the points. The accuracies are scores of this metric (`Metric.score`).
    """

    method: str
    scores: tuple[tuple[str, float], ...]
    diverged: int = 0
    spread: float | None = None
    guess: Guess | None = None
    targets: int | None = None
    metric: Metric = ACCURACY


@value
class ScoreCoverage:
    """The part of a split over which a score is averaged.

    Args:
        method: the method that was scored.
        what: name of the score.
        targets: number of examples or tokens over which the score is averaged.
        of: number of examples or tokens in the split.
    """

    method: str
    what: str
    targets: int
    of: int


@value
class OverriddenWinners:
    """For one method: the number of tuning searches whose winner was not used in the final runs.

    Args:
        method: the method that was tuned.
        searches: number of searches.
        overruled: number of winners that were replaced.
        which: the replacements, as a sentence.
    """

    method: str
    searches: int
    overruled: int
    which: str = ""


@value
class UseOfTestSet:
    """How often the test split was scored.

    Args:
        method: the method that was scored.
        final: number of test scores of final runs.
        seeds: number of different seeds in these final runs.
        rates: number of learning rates of the final runs.
        early: number of test scores of tuning runs and confirming runs.
    """

    method: str
    final: int
    seeds: int
    rates: int = 1
    early: int = 0


@value
class SeedCount:
    """The number of seeds of a method's final runs."""

    method: str
    seeds: int


@value
class Environment:
    """One property of the machine or software that the runs used, such as a version.

    Args:
        what: name of the property.
        values: its different values; only one if all runs have the same.
        method: the method whose runs used it.
    """

    what: str
    values: tuple[str, ...]
    method: str = EVERY


@value
class Timing:
    """Whether the timing of a method's step is reliable. doubt: the reason if it is unreliable, else None."""

    method: str
    doubt: str | None = None


Fact = (
    TuningWinners
    | TuningEffort
    | TrainingEffort
    | Setting
    | TuningScores
    | ScoreCoverage
    | OverriddenWinners
    | UseOfTestSet
    | SeedCount
    | Environment
    | Timing
)


def facts(results: Results) -> tuple[Fact | MethodDesign, ...]:
    """Return the facts of a results folder. Failed runs contribute none."""
    ended = completed(results.trials)
    known: list[Fact | MethodDesign] = [*designs(results)]
    given = at_given_rates(results)
    for method in dict.fromkeys(run.method for run in ended):
        of_method = _facts_of_method(results, [run for run in ended if run.method == method])
        known += [fact for fact in of_method if method not in given or not isinstance(fact, OverriddenWinners)]
    known += training_efforts(results)
    known += _seeds([fact for fact in known if isinstance(fact, UseOfTestSet)], ended)
    known += _environments(results, ended)
    known += [Timing(cost.method, cost.doubt) for cost in results.costs if cost.ms is not None]
    return tuple(known)


def _facts_of_method(results: Results, runs: Sequence[TrialRecord]) -> Iterator[Fact]:
    method = runs[0].method
    tuned, final = _in_phase(runs, "tune"), _in_phase(runs, "final")
    trained = sorted({run.lr for run in final})
    choices = possible_choices(runs)
    grid = sorted({run.lr for run in tuned})
    if choices and grid:
        winner = trained[0] if len(trained) == 1 and trained[0] in choices else choices[0]
        which = _on_edge(grid, winner)
        yield TuningWinners(method, 1, int(which is not None), which or "")
    if tuned:
        yield tuning_effort(results, tuned)
        yield _tuning_scores(results, runs, trained)
    if final:
        others = [f"{lr:.3g}" for lr in trained if lr not in choices]
        choice = f"but tuning chose lr={choices[0]:.3g}" if choices else "but tuning chose none"
        which = f"lr={' and '.join(others)}, {choice}" if others else ""
        yield OverriddenWinners(method, 1, int(bool(others)), which)
    if tuned and final:
        yield from _settings(method, tuned, final)
    if tests := [run for run in runs if run.test is not None]:
        finals = _in_phase(tests, "final")
        yield UseOfTestSet(
            method, len(finals), len({run.seed for run in finals}), len(trained), len(tests) - len(finals)
        )
    elif final:
        yield UseOfTestSet(method, 0, 0, len(trained))
    yield from _coverage(method, runs)


def _in_phase(runs: Iterable[TrialRecord], phase: str) -> list[TrialRecord]:
    return [run for run in runs if run.phase == phase]


def _on_edge(grid: Sequence[float], lr: float) -> str | None:
    """A sentence if `lr` is an edge of the grid; None otherwise."""
    if len(grid) == 1:
        return f"lr={lr:.3g} is the only one that was tried"
    end = edge(grid, lr)
    return None if end is None else f"lr={lr:.3g} is the {end} of the {len(grid)} that were tried"


def _tuning_scores(results: Results, runs: Sequence[TrialRecord], trained: Sequence[float]) -> TuningScores:
    method = runs[0].method
    tried = confirmed_scores(runs, method) or scores(_in_phase(runs, "tune"), method)
    converged = best(tried, len(tried))
    confirmed = _spread(_in_phase(runs, "confirm"))
    spread = _spread([run for run in _in_phase(runs, "final") if run.lr in trained[:1]])
    return TuningScores(
        method,
        tuple((f"lr={lr:.3g}", tried[lr][0]) for lr in converged if isfinite(tried[lr][0])),
        len(tried) - len(converged),
        spread if confirmed is None else confirmed,
        guess_of(results.study) if results.study.metric.is_accuracy else None,
        targets_of(runs, "validation"),
        results.study.metric,
    )


def _spread(runs: Iterable[TrialRecord]) -> float | None:
    """The standard deviation of the score over seeds, pooled over the learning rates."""
    by_rate: dict[float, list[float]] = {}
    for run in runs:
        score = run.validation or run.test  # final runs may have a test score only
        if score is not None and score.score is not None:
            by_rate.setdefault(run.lr, []).append(score.score)
    variances = [variance(scores) for scores in by_rate.values() if len(scores) > 1]
    return sqrt(fmean(variances)) if variances else None


def _settings(method: str, tuned: Sequence[TrialRecord], final: Sequence[TrialRecord]) -> Iterator[Setting]:
    """The settings of a method. `tuned` is set to `trained` if tuning used every value of the final runs."""
    for what in ("estimator", "optimizer", "steps", "task"):
        before, after = _values(tuned, what), _values(final, what)
        if before and after:
            tuned_with = after if set(after) <= set(before) else before
            yield Setting(method, what, " or ".join(tuned_with), " or ".join(after))


def _values(runs: Sequence[TrialRecord], what: str) -> list[str]:
    """The different values of a setting, without learning rates. Steps come from finished runs; others stop early."""
    if what == "steps":
        return list(dict.fromkeys(f"{run.steps:,}" for run in runs if run.status == "finished"))
    texts = [getattr(run, what) for run in runs]
    return list(dict.fromkeys(re.sub(r"\blr=[^,)]*", "lr", text) for text in texts if text is not None))


def _coverage(method: str, runs: Sequence[TrialRecord]) -> Iterator[ScoreCoverage]:
    """For each split, the score that is averaged over the smallest part of the split."""
    for what in ("validation", "test"):
        scores = [score for run in runs if (score := getattr(run, what)) is not None]
        known = [(score.targets, score.of) for score in scores if score.targets is not None and score.of]
        if known:
            yield ScoreCoverage(method, f"{what} score", *min(known, key=lambda pair: pair[0] / pair[1]))


def _seeds(tested: Sequence[UseOfTestSet], ended: Sequence[TrialRecord]) -> list[SeedCount]:
    """The number of seeds per method, diverged runs included; one fact if the number is the same for all methods."""
    final = _in_phase(ended, "final")
    counts = {fact.method: len({run.seed for run in final if run.method == fact.method}) for fact in tested}
    counts = {method: count for method, count in counts.items() if count}
    if len(counts) > 1 and len(set(counts.values())) == 1:
        counts = {EVERY: next(iter(counts.values()))}
    return [SeedCount(method, count) for method, count in counts.items()]


def _environments(results: Results, ended: Sequence[TrialRecord]) -> Iterator[Environment]:
    """The properties of the folder and of each run. The folder's `threads` are left out: they apply to timings."""
    recorded = [run.environment for run in ended if run.environment is not None]
    if not recorded:
        return
    folder = {what: content for what, content in results.environment.items() if what != "threads"}
    every = [folder, *recorded]
    for what in dict.fromkeys(what for each in every for what in each):
        yield Environment(what, tuple(dict.fromkeys(str(each[what]) for each in every if what in each)))
