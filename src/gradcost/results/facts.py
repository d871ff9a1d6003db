"""What the fairness of a study hangs on, as plain facts: read from a results folder, or written down from a paper.

Each kind of fact is a small value that a rule of `gradcost.results.lint` judges. A fact names the `method` it is true
of; what is not known is not stated, so that its rule has nothing to say. Of hyperparameters the records name the
learning rate alone, so the facts of a folder speak of that one; those of a paper may speak of any.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from math import inf, isfinite, sqrt
from statistics import fmean, variance

from gradcost.core.value import value
from gradcost.results.records import Results, TrialRecord
from gradcost.results.tuning import best, scores

EVERY = "every method"


@value
class Winners:
    """Of so many searches for hyperparameters, how many were won `on_edge` of what was tried; which: those."""

    method: str
    searches: int
    on_edge: int
    which: str = ""


@value
class Effort:
    """What tuning spent: on how many points, and over all of them how many training steps and FLOPs."""

    method: str
    points: int
    steps: int | None = None
    flops: float | None = None


@value
class Regime:
    """One thing, `what`, that runs are made with: as it was while tuning, and in the runs that count."""

    method: str
    what: str
    tuned: str
    trained: str


@value
class Ranking:
    """The points that tuning compared: (name, accuracy), the best first, and how many others diverged.

    spread: the standard deviation of such an accuracy over seeds. chance: the accuracy of guessing. targets: how many
    an accuracy is the mean over.
    """

    method: str
    scores: tuple[tuple[str, float], ...]
    diverged: int = 0
    spread: float | None = None
    chance: float | None = None
    targets: int | None = None


@value
class Scored:
    """The score `what` is the mean over `seen` of the `of` targets that its split holds."""

    method: str
    what: str
    seen: int
    of: int


@value
class Settled:
    """Of so many searches, how many were overruled: trained with something else than what won; which: those."""

    method: str
    searches: int
    overruled: int
    which: str = ""


@value
class Looked:
    """How often the test split was looked at: by final runs, on so many seeds and at so many `rates`, and early, by
    runs of another phase."""

    method: str
    looks: int
    seeds: int
    rates: int = 1
    early: int = 0


@value
class Seeds:
    """On how many seeds the runs that count were made."""

    method: str
    seeds: int


@value
class Ran:
    """What the runs were made with, such as a version: all that was found, which is one where nothing changed."""

    what: str
    found: tuple[str, ...]
    method: str = EVERY


@value
class Timed:
    """Why the timing of a step is in doubt; None where it is not."""

    method: str
    doubt: str | None = None


Fact = Winners | Effort | Regime | Ranking | Scored | Settled | Looked | Seeds | Ran | Timed


def facts(results: Results) -> tuple[Fact, ...]:
    """The facts of a results folder; of runs that failed there are none."""
    ended = [run for run in results.trials if run.status in ("finished", "diverged")]
    found: list[Fact] = []
    for method in dict.fromkeys(run.method for run in ended):
        found += _of_method(results, [run for run in ended if run.method == method])
    found += _seeds([fact for fact in found if isinstance(fact, Looked)], ended)
    found += _environments(results, ended)
    found += [Timed(cost.method, cost.doubt) for cost in results.costs if cost.ms is not None]
    return tuple(found)


def _of_method(results: Results, runs: Sequence[TrialRecord]) -> Iterator[Fact]:
    method = runs[0].method
    tuned, final = _in(runs, "tune"), _in(runs, "final")
    ran = sorted({run.lr for run in final})
    choices = _choices(runs)
    grid = sorted({run.lr for run in tuned})
    if choices and grid:
        won = ran[0] if len(ran) == 1 and ran[0] in choices else choices[0]
        where = _edge(grid, won)
        yield Winners(method, 1, int(where is not None), where or "")
    if tuned:
        yield _effort(results, tuned)
        yield _ranking(results, runs, ran)
    if final:
        strange = [f"{lr:.3g}" for lr in ran if lr not in choices]
        won = f"tuning chose lr={choices[0]:.3g}" if choices else "no tuning chose any"
        yield Settled(method, 1, int(bool(strange)), f"lr={' and '.join(strange)}, where {won}" if strange else "")
    if tuned and final:
        yield from _regimes(method, tuned, final)
    if tests := [run for run in runs if run.test is not None]:
        late = _in(tests, "final")
        yield Looked(method, len(late), len({run.seed for run in late}), len(ran), len(tests) - len(late))
    elif final:
        yield Looked(method, 0, 0, len(ran))
    yield from _scored(method, runs)


def _in(runs: Iterable[TrialRecord], phase: str) -> list[TrialRecord]:
    return [run for run in runs if run.phase == phase]


def _choices(runs: Sequence[TrialRecord]) -> list[float]:
    """The learning rates that the runs speak for, the library's own choice first: the confirming runs where there
    are any, by accuracy, or by loss, which a study of one's own may go by."""
    for phase in ("confirm", "tune"):
        found = scores(_in(runs, phase), runs[0].method)
        if winner := best(found):
            top = [max(merit[i] for merit in found.values()) for i in (0, 1)]
            alike = [lr for lr, merit in found.items() if any(merit[i] == top[i] > -inf for i in (0, 1))]
            return list(dict.fromkeys([*winner, *alike]))
    return []


def _edge(grid: Sequence[float], lr: float) -> str | None:
    if len(grid) == 1:
        return f"lr={lr:.3g} is the only one that was tried"
    if grid[0] < lr < grid[-1]:
        return None
    return f"lr={lr:.3g} is the {'smallest' if lr <= grid[0] else 'largest'} of the {len(grid)} that were tried"


def _effort(results: Results, tuned: Sequence[TrialRecord]) -> Effort:
    """A run that diverged stopped early; it counts as the whole run that it was to be."""
    method = tuned[0].method
    mine = [run.steps for run in tuned if run.status == "finished"]
    others = [run.steps for run in _in(results.trials, "tune") if run.status == "finished"]
    whole = max(mine or others, default=results.study.steps)
    steps = sum(run.steps if run.status == "finished" else whole for run in tuned)
    flops = next((cost.flops for cost in results.costs if cost.method == method), None)
    points = len({(run.estimator, run.optimizer, run.lr) for run in tuned})
    return Effort(method, points, steps, None if flops is None else float(flops * steps))


def _ranking(results: Results, runs: Sequence[TrialRecord], final: Sequence[float]) -> Ranking:
    method = runs[0].method
    phase = "confirm" if _in(runs, "confirm") else "tune"
    found = scores(_in(runs, phase), method)
    alive = [lr for lr in best(found, len(found)) if isfinite(found[lr][0])]
    again = _in(runs, "confirm") or [run for run in _in(runs, "final") if run.lr in final[:1]]
    seen = [run.validation.targets for run in runs if run.validation is not None]
    return Ranking(
        method,
        tuple((f"lr={lr:.3g}", found[lr][0]) for lr in alive),
        len(found) - len(best(found, len(found))),
        _spread(again),
        results.study.chance,
        next((targets for targets in seen if targets is not None), None),
    )


def _spread(runs: Iterable[TrialRecord]) -> float | None:
    """The standard deviation of the validation accuracy over seeds, pooled over the learning rates."""
    by_rate: dict[float, list[float]] = {}
    for run in runs:
        if run.validation is not None and run.validation.accuracy is not None:
            by_rate.setdefault(run.lr, []).append(run.validation.accuracy)
    variances = [variance(scores) for scores in by_rate.values() if len(scores) > 1]
    return sqrt(fmean(variances)) if variances else None


def _regimes(method: str, tuned: Sequence[TrialRecord], final: Sequence[TrialRecord]) -> Iterator[Regime]:
    """Each thing of the final runs beside what it was while tuning; where some tuning run had it, as it was there."""
    for what in ("estimator", "optimizer", "steps", "task"):
        before, after = _said(tuned, what), _said(final, what)
        if before and after:
            yield Regime(
                method, what, " or ".join(after if set(after) <= set(before) else before), " or ".join(after)
            )


def _said(runs: Sequence[TrialRecord], what: str) -> list[str]:
    """What runs were made with, in words. How many steps were to be taken only a run that finished tells."""
    if what == "steps":
        return list(dict.fromkeys(f"{run.steps:,}" for run in runs if run.status == "finished"))
    said = [getattr(run, what) for run in runs]
    return list(dict.fromkeys(re.sub(r"\blr=[^,)]*", "lr", text) for text in said if text is not None))


def _scored(method: str, runs: Sequence[TrialRecord]) -> Iterator[Scored]:
    """The score of each split that the smallest part of it is behind."""
    for what in ("validation", "test"):
        scores = [score for run in runs if (score := getattr(run, what)) is not None]
        known = [(score.targets, score.of) for score in scores if score.targets is not None and score.of]
        if known:
            yield Scored(method, f"{what} score", *min(known, key=lambda pair: pair[0] / pair[1]))


def _seeds(tested: Sequence[Looked], ended: Sequence[TrialRecord]) -> list[Seeds]:
    """A run that diverged is the worst result and a result. One fact where all methods have as many seeds."""
    final = _in(ended, "final")
    counts = {fact.method: len({run.seed for run in final if run.method == fact.method}) for fact in tested}
    counts = {method: count for method, count in counts.items() if count}
    if len(counts) > 1 and len(set(counts.values())) == 1:
        counts = {EVERY: next(iter(counts.values()))}
    return [Seeds(method, count) for method, count in counts.items()]


def _environments(results: Results, ended: Sequence[TrialRecord]) -> Iterator[Ran]:
    """What changed between runs, or between the folder's making and a run; trials have one thread, timings more."""
    recorded = [run.environment for run in ended if run.environment is not None]
    if not recorded:
        return
    started = {what: told for what, told in results.environment.items() if what != "threads"}
    told = [started, *recorded]
    for what in dict.fromkeys(what for one in told for what in one):
        yield Ran(what, tuple(dict.fromkeys(str(one[what]) for one in told if what in one)))
