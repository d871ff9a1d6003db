"""Facts and rules about settings that methods must share to be compared: task, optimizer, seeds, grid of rates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from math import isfinite, log10

from gradcost.core.value import value
from gradcost.results.guessing import guessing_loss
from gradcost.results.records import Results, TrialRecord
from gradcost.results.summary import is_exact
from gradcost.results.tuning import chosen, completed, runs_of

CUSTOMARY = "customary"  # the optimizer in study.json if each method has the one that is customary for it
GAP = 2.0  # grids are equally dense if their gaps, in decades, differ by at most this factor
EXPLODED = 100.0  # a finished run has exploded if its loss is above so many times that of guessing


@value
class MethodDesign:
    """What the runs of one method share with those of the others, or do not.

    Args:
        method: the method.
        task: the tasks (data, model and batch) of the tuning runs; of the final runs if there was no tuning.
        optimizer: the classes of the optimizers of the same runs.
        seeds: seeds of the final runs.
        tuning_seeds: seeds of the tuning runs.
        confirming_seeds: seeds of the confirming runs.
        winner: the learning rate that tuning and confirming runs chose; None if all diverged or none ran.
        gap: the larger distance of the winner to its neighbours on the grid, in decades.
        diverged_above: the next larger rate that was tried, as a multiple of the winner, if it diverged in tuning.
        exploded: number of finished runs with a loss far above that of guessing.
        given: the learning rates of a method that was not tuned, in a study that tunes neither the exact gradient nor
            an estimated one, such as published rates; "" for any other method.
        is_customary: whether each method of the study has, by design, the optimizer that is customary for it.
    """

    method: str
    task: str = ""
    optimizer: str = ""
    seeds: tuple[int, ...] = ()
    tuning_seeds: tuple[int, ...] = ()
    confirming_seeds: tuple[int, ...] = ()
    winner: float | None = None
    gap: float | None = None
    diverged_above: float | None = None
    exploded: int = 0
    given: str = ""
    is_customary: bool = False


def designs(results: Results) -> Iterator[MethodDesign]:
    """Yield the facts of each method with runs that ended."""
    ended = completed(results.trials)
    given = at_given_rates(results)
    for method in dict.fromkeys(run.method for run in ended):
        runs = [run for run in ended if run.method == method]
        final = [run for run in runs if run.phase == "final"]
        first = [run for run in runs if run.phase == "tune"] or final
        winner = chosen(runs, method)
        gap, above = _around(winner, runs)
        rates = sorted({run.lr for run in final}) if method in given else []
        yield MethodDesign(
            method,
            " or ".join(dict.fromkeys(run.task for run in first if run.task is not None)),
            " or ".join(dict.fromkeys(run.optimizer.partition("(")[0] for run in first)),
            _seeds(final),
            _seeds(run for run in runs if run.phase == "tune"),
            _seeds(run for run in runs if run.phase == "confirm"),
            winner,
            gap,
            above,
            sum(_has_exploded(run, guessing_loss(results.study.chance)) for run in runs),
            " and ".join(f"{lr:.3g}" for lr in rates),
            results.study.optimizer == CUSTOMARY,
        )


def at_given_rates(results: Results) -> set[str]:
    """Return the untuned methods, if no method was tuned, or if some of them are exact and others estimate.

    A rival that alone is not tuned is at a disadvantage; if all or both kinds are trained at given rates, none is.
    """
    tuned = {run.method for run in results.trials if run.phase == "tune"}
    untuned = {run.method for run in results.trials if run.phase == "final"} - tuned
    kinds = {is_exact(runs_of(results, method)) for method in untuned}
    return untuned if len(kinds) == 2 or not tuned else set()


def _seeds(runs: Iterable[TrialRecord]) -> tuple[int, ...]:
    return tuple(sorted({run.seed for run in runs}))


def _around(winner: float | None, runs: Sequence[TrialRecord]) -> tuple[float | None, float | None]:
    """Return `gap` and `diverged_above` of MethodDesign."""
    tuned = [run for run in runs if run.phase == "tune"]
    grid = sorted({run.lr for run in tuned})
    if winner is None or len(grid) < 2:
        return None, None
    below, above = [rate for rate in grid if rate < winner][-1:], [rate for rate in grid if rate > winner][:1]
    gap = max(abs(log10(rate / winner)) for rate in below + above)
    diverged = all(run.status == "diverged" for run in tuned if run.lr in above)
    return gap, above[0] / winner if above and diverged else None


def _has_exploded(run: TrialRecord, guessing: float | None) -> bool:
    losses = [score.loss for score in (run.validation, run.test) if score is not None and score.loss is not None]
    if run.status != "finished" or guessing is None:
        return False
    return any(not isfinite(loss) or loss > EXPLODED * guessing for loss in losses)


# ---- rules

Violations = Iterator[tuple[str, str]]  # (method, sentence with the numbers)


def different_settings(facts: Sequence[MethodDesign]) -> Violations:
    """A setting that one method has alone, while others share one. Pairs with settings of their own are a design."""
    for what in ("task", "optimizer"):
        known = {fact.method: getattr(fact, what) for fact in facts if getattr(fact, what)}
        if what == "optimizer" and any(fact.is_customary for fact in facts):
            continue  # see customary_optimizers
        common = Counter(known.values()).most_common()
        if len(common) < 2 or (len(known) > 2 and common[0][1] == 1):
            continue
        usual = common[0][0]
        example = next(method for method, setting in known.items() if setting == usual)
        for method, setting in known.items():
            if setting != usual and list(known.values()).count(setting) == 1:
                yield method, f"{what}: {setting}, but {example} has {usual}"


def customary_optimizers(facts: Sequence[MethodDesign]) -> Violations:
    """Methods with another optimizer than the first one, in a study that gives each its customary optimizer."""
    known = [fact for fact in facts if fact.is_customary and fact.optimizer]
    for fact in known:
        if fact.optimizer != known[0].optimizer:
            yield fact.method, f"trained by {fact.optimizer}, and {known[0].method} by {known[0].optimizer}"


def different_seeds(facts: Sequence[MethodDesign]) -> Violations:
    final = {fact.method: fact.seeds for fact in facts if fact.seeds}
    if not final:
        return
    usual = Counter(final.values()).most_common(1)[0][0]
    example = next(method for method, seeds in final.items() if seeds == usual)
    for method, seeds in final.items():
        if seeds != usual:
            yield method, f"final seeds {_listed(seeds)}, but {example} has {_listed(usual)}"


def not_trained(facts: Sequence[MethodDesign]) -> Violations:
    """Methods whose tuning chose a rate, without a final run, in a study with final runs of others."""
    example = next((fact.method for fact in facts if fact.seeds), None)
    for fact in facts:
        if example is not None and fact.winner is not None and not fact.seeds:
            yield (
                fact.method,
                f"tuning chose lr={fact.winner:.3g}, and no final run has ended; {example} has final runs",
            )


def reused_seeds(facts: Sequence[MethodDesign]) -> Violations:
    for fact in facts:
        if shared := sorted({*fact.confirming_seeds} & {*fact.tuning_seeds}):
            yield fact.method, f"confirmed on seed {_listed(shared)}, on which it was tuned"


def sparser_grids(facts: Sequence[MethodDesign]) -> Violations:
    gaps = {fact.method: fact.gap for fact in facts if fact.gap}
    if len(gaps) < 2:
        return
    example = min(gaps, key=lambda method: gaps[method])
    for method, gap in gaps.items():
        if gap > GAP * gaps[example]:
            near = f"the rates next to the winner are up to {10**gap:.3g} times away"
            yield method, f"{near}, and {10 ** gaps[example]:.3g} times for {example}"


def untried_below_divergence(facts: Sequence[MethodDesign]) -> Violations:
    for fact in facts:
        if fact.diverged_above is not None and fact.diverged_above > 2:
            above = f"the next rate, {fact.diverged_above:.3g} times the winner, diverged"
            yield fact.method, f"{above}: no rate between the two was tried"


def exploded_runs(facts: Sequence[MethodDesign]) -> Violations:
    for fact in facts:
        if fact.exploded:
            yield fact.method, f"{fact.exploded} finished with a loss above {EXPLODED:g} times that of guessing"


def given_rates(facts: Sequence[MethodDesign]) -> Violations:
    for fact in facts:
        if fact.given:
            yield fact.method, f"lr={fact.given} was given, not tuned"


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
