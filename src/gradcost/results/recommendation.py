"""Which method to use, what is known about the alternatives, and whether the evidence allows a recommendation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf, isfinite
from statistics import median

from gradcost.results.contrast import Contrast, planned_contrast
from gradcost.results.guessing import guess_of, targets_of
from gradcost.results.rankings import FLOPS
from gradcost.results.records import Results, StudyRecord
from gradcost.results.so_far import so_far
from gradcost.results.statistics import interval
from gradcost.results.summary import MethodSummary, span, summarise
from gradcost.results.targets import reaches
from gradcost.results.tuning import final_runs
from gradcost.results.wording import alike, bare, chance, count, listed, number, percent, points, rate, size, times

ALPHA = 0.05
_LEARNED = 0.99  # where the loss is the metric: the share of the first loss below which something was learned
_SHOWN = 0.0005  # a smaller difference of accuracies is not shown in points with one decimal
_NOISE = 1.1  # a test loss so many times the loss of the first batch is above it by more than the batch explains


@dataclass(frozen=True)
class Recommendation:
    """The method to use, and the other methods whose accuracy is within the interval of the most accurate one.

    Args:
        row: the method to use.
        alike: the others within the interval of `best`, which is one of them or `row`.
        best: the most accurate method, by `penalized_accuracy`.
    """

    row: MethodSummary
    alike: tuple[MethodSummary, ...]
    best: MethodSummary


def candidates(rows: Iterable[MethodSummary]) -> list[MethodSummary]:
    """Return the methods that may be recommended: the median is finite, and `fits` is True or unknown."""
    return [row for row in rows if row.accuracy and isfinite(row.accuracy.median) and row.fits is not False]


def _finished(row: MethodSummary) -> list[float]:
    return [x for x in row.accuracies if isfinite(x)]


def penalized_accuracy(row: MethodSummary, study: StudyRecord) -> float:
    """Return the accuracy by which methods are compared.

    Formula: (finished * median accuracy of finished runs + diverged * accuracy of guessing) / runs, with the numbers
    of finished runs, diverged runs and all runs. So a method that sometimes
    diverges is not recommended for its good runs alone.
    """
    finished = _finished(row)
    typical = median(finished) if finished else 0.0
    diverged = len(row.accuracies) - len(finished)
    return (len(finished) * typical + diverged * (study.chance or 0.0)) / max(len(row.accuracies), 1)


def choose(rows: Iterable[MethodSummary], study: StudyRecord) -> Recommendation | None:
    """Return the method with the least memory, then the shortest step, among those as accurate as the best.

    Rule: let b be the best penalized accuracy, and [low, high] the interval of the median of that method's finished
    runs. A method is as accurate as the best if its penalized accuracy is at least b - (median - low).
    If a timing of a method with the least memory is unreliable, the step with the fewest FLOPs is taken instead.
    """
    pool = candidates(rows)
    if not pool:
        return None
    best = max(pool, key=lambda row: penalized_accuracy(row, study))
    near = _alike(pool, best, study)
    pick = _cheapest(near, study)
    is_best = pick.accuracies == best.accuracies  # a tie: not which of them is first in the study
    return Recommendation(pick, tuple(row for row in near if row is not pick), pick if is_best else best)


def _cheapest(near: list[MethodSummary], study: StudyRecord) -> MethodSummary:
    """The method of `near` with the least peak, then the fewest milliseconds if all are reliable, then FLOPs."""
    least = min(map(_peak, near))
    rows = [row for row in near if _peak(row) == least]
    is_reliable = not any(row.doubt for row in rows)

    def cost(row: MethodSummary) -> tuple[float, ...]:
        ms = _if_none(row.ms, inf) if is_reliable else 0.0
        return ms, _if_none(row.flops, inf), -penalized_accuracy(row, study)

    return min(rows, key=cost)


def _alike(pool: Iterable[MethodSummary], best: MethodSummary, study: StudyRecord) -> list[MethodSummary]:
    """The methods of `pool` that are as accurate as its best one, by the rule of `choose`."""
    known = interval(_finished(best))
    below = max(known.median - known.low, 0.0)  # rounding puts the low end of equal accuracies above their median
    limit = penalized_accuracy(best, study) - below
    return [row for row in pool if penalized_accuracy(row, study) >= limit]


def _peak(row: MethodSummary) -> float:
    """Peak bytes of a step; inf if not measured."""
    return _if_none(row.peak_bytes, inf)


def sentences(results: Results) -> list[str]:
    """Return the sentences of the verdict."""
    rows, study = summarise(results), results.study
    choice = choose(rows, study)
    if choice is None:
        return [_no_choice(rows, results)]
    guess = guess_of(study)
    targets = targets_of(final_runs(results, choice.best.method), "test")
    if guess is not None and penalized_accuracy(choice.best, study) <= guess.limit(targets):
        return [f"Nothing learned: the best method, {choice.best.method}, has {_result(choice.best)}; {guess.text}."]
    second = _other_kind(choice, rows, study)
    contrast = planned_contrast(results)
    tests = [tested(contrast), _to_target(contrast, results)]
    doubt = nothing_yet(choice, rows, results)
    edges = at_edge(row for row in rows if doubt is None or row is not choice.row)
    known = [doubt, _use(choice, results, is_sure=doubt is None), second, *tests, edges]
    return [sentence for sentence in known if sentence is not None]


def nothing_yet(choice: Recommendation, rows: list[MethodSummary], results: Results) -> str | None:
    """A sentence on why the evidence allows no recommendation, and what would settle it; None if it allows one."""
    row, reasons = choice.row, list[str]()
    if row.seeds + row.diverged < 2 and len(rows) > 1:
        reasons.append("each method has one seed, and six can show a difference (--seeds 6)")
    if row.edge is not None:
        reasons.append(
            f"the best learning rate of {row.method}, {rate(row.lr)}, is the {row.edge} that was tried, so a better "
            "one may lie beyond it (compare: --lr-range, --extra-points)"
        )
    runs = final_runs(results, row.method)
    starts = [run.curve.loss[0] for run in runs if run.curve is not None and run.curve.loss]
    start = max((x for x in starts if x is not None), default=inf)
    if row.loss is not None and row.loss.median > _NOISE * start:
        after, before = alike(row.loss.median)[0], alike(start)[0]
        reasons.append(f"the test loss of {row.method}, {after}, is above its training loss at the start, {before}")
    elif row.loss is not None and results.study.metric.name == "loss" and row.loss.median > _LEARNED * start:
        after, before = number(row.loss.median, 4), number(start, 4)
        reasons.append(
            f"the test loss of {row.method}, {after}, is less than 1% below its training loss at the start, {before} "
            "(--steps)"
        )
    return f"Nothing can be said yet: {'; '.join(reasons)}." if reasons else None


def at_edge(rows: Iterable[MethodSummary]) -> str | None:
    """A sentence on the methods whose best learning rate is the smallest or largest of those tried, or None."""
    names = [row.method for row in rows if row.edge is not None]
    if not names:
        return None
    more = [count(len(names) - 3, "other")] if len(names) > 3 else []
    return (
        f"Tuning is not complete: the best learning rate of {listed(names[:3] + more)} is at the edge of those "
        "that were tried, so a better one may lie beyond it."
    )


def tested(contrast: Contrast | None) -> str | None:
    """Return a sentence on the planned comparison: is the difference on the test split more than chance?

    Args:
        contrast: from `planned_contrast`.
    """
    if contrast is None or contrast.test.n < 2:
        return None
    pair = f"{contrast.exact} against {contrast.estimated}"
    test = f"p {chance(contrast.test.p)}, {count(contrast.test.n, 'seed')}"
    if contrast.test.p < ALPHA:
        return f"The planned comparison, {pair}, is significant ({test})."
    enough = contrast.test.enough(ALPHA)
    more = f"; {enough} can show a difference" if enough > contrast.test.n else ""
    return f"The planned comparison, {pair}, is not significant ({test}{more})."


def _to_target(contrast: Contrast | None, results: Results) -> str | None:
    """A sentence on the FLOPs of the best estimated gradient to the hardest accuracy that half of its runs reach."""
    if contrast is None:
        return None
    rows = [row for row in reaches(results) if row.method == contrast.estimated and row.target.quantity == "accuracy"]
    found = [row for row in rows if "flops" in row.ratio and isfinite(row.ratio["flops"].median)]
    if not found:
        return None
    row = max(found, key=lambda row: row.target.value)
    ratio = row.ratio["flops"]
    span = "" if ratio.n == 1 else f" [{times(ratio.low)}, {times(ratio.high)}]"
    return (
        f"To {percent(row.target.value)} validation accuracy {contrast.estimated} takes {times(ratio.median)}{span} "
        f"times the {FLOPS.noun} of {contrast.exact}."
    )


def _use(choice: Recommendation, results: Results, is_sure: bool) -> str:
    """The sentence that recommends a method and names those within the interval of the most accurate one."""
    row, alike = choice.row, choice.alike
    steps = max((run.steps for run in final_runs(results, row.method)), default=0)
    first = f"{advice(row, is_sure)}: {_result(row)} after {count(steps, 'step')}{_within(row)}"
    if row.peak_bytes is not None:
        first += " beyond the weights"
    if not alike:
        return first + "."
    plural = len(alike) > 1
    memory_note = ""
    if all(_peak(row) < _peak(other) for other in alike):
        more = f" and {'need' if plural else 'needs'} more memory"
        memory_note = more if choice.best is row else " and needs the least memory"
    return f"{first}; {in_one_interval(choice, _brief, lambda best: _result(best) + _within(best))}{memory_note}."


def in_one_interval(
    choice: Recommendation, brief: Callable[[MethodSummary], str], result: Callable[[MethodSummary], str]
) -> str:
    """Return the part of a sentence on the methods within the interval of the most accurate one.

    Args:
        choice: the method to use, and one other within the interval or more.
        brief: what is said of each other method in brackets.
        result: what is said of the most accurate method, if it is not the one to use.
    """
    others = [other for other in choice.alike if other is not choice.best]
    names = [f"{other.method} ({brief(other)})" for other in others[:3]]
    if len(others) > 3:
        names.append(count(len(others) - 3, "other"))
    is_are = "is" if len(others) == 1 else "are"
    if choice.best is choice.row:
        return f"{listed(names)} {is_are} within its interval"
    as_others = f", as {is_are} {listed(names)}" if names else ""
    return f"it is within the interval of the best, {choice.best.method}, with {result(choice.best)}{as_others}"


def advice(row: MethodSummary, is_sure: bool) -> str:
    """Return the beginning of the sentence on the best method: the advice to use it, or that it leads so far."""
    return f"Use {row.method}" if is_sure else f"So far {row.method} leads"


def _other_kind(choice: Recommendation, rows: list[MethodSummary], study: StudyRecord) -> str | None:
    """A sentence on the best method of the other kind (exact or estimated); None if the study has no such method."""
    row = choice.row
    others = [r for r in rows if r.estimator and r.exact is not row.exact]
    kind = "with an estimated gradient" if row.exact else "with the exact gradient"
    if not others:
        return None
    pool = candidates(others)
    if not pool:
        return f"No method {kind} {_absence(others, study)}."
    other = max(pool, key=lambda r: penalized_accuracy(r, study))
    near = _alike(pool, other, study)
    if len(near) > 1 and other not in choice.alike and row.accuracy:
        names = listed([f"{r.method} ({'; '.join(filter(None, (_brief(r), _missing_seeds(r))))})" for r in near])
        gap = _gap([row.accuracy.median - r.accuracy.median for r in near if r.accuracy])
        return f"The best methods {kind}, {names}, are alike and {gap}."
    result = f"{_result(other)}{_within(other)}"
    if row.ms is not None and other.ms is not None and not (row.doubt or other.doubt):
        result += f", {number(other.ms)} ms per step instead of {number(row.ms)}"
    if other in choice.alike:
        return f"The best method {kind} is {other.method}: {result}."
    gap = _gap([row.accuracy.median - other.accuracy.median if row.accuracy and other.accuracy else 0.0])
    return f"The best method {kind}, {other.method}, is {gap}: {result}."


def _gap(behind: list[float]) -> str:
    """How far methods are behind or ahead of the recommended one, such as: 10.5 to 11.5 points behind."""
    least, most = min(behind), max(behind)
    if least < -_SHOWN and most >= 0:
        return f"{points(-least)} ahead to {points(most)} behind"
    where = "behind"
    if most < 0:
        least, most, where = -most, -least, "ahead"
    if most - least <= _SHOWN:
        return f"{points(most)} {where}"
    return f"{f'{bare(least)} to' if least > _SHOWN else 'up to'} {points(most)} {where}"


def _within(row: MethodSummary) -> str:
    return "" if row.peak_bytes is None else f" in {size(row.peak_bytes)}"


def _brief(row: MethodSummary) -> str:
    """Accuracy and peak, such as: 97.1%, 64.5 KiB."""
    accuracy = percent(row.accuracy and row.accuracy.median)
    return accuracy if row.peak_bytes is None else f"{accuracy}, {size(row.peak_bytes)}"


def _no_choice(rows: list[MethodSummary], results: Results) -> str:
    """Why no method can be recommended."""
    if results.refused and not rows:
        first = results.refused[0]
        others = f" Nor can {count(len(results.refused) - 1, 'other')}." if len(results.refused) > 1 else ""
        return f"No method can be used here. {first.method}: {first.reason.rstrip('.')}.{others}"
    if not any(trial.phase == "final" for trial in results.trials):
        failed = [trial for trial in results.trials if trial.status == "failed"]
        if failed:
            reason = (failed[0].reason or "no reason was recorded").rstrip(".")
            return f"No method can be recommended: {count(len(failed), 'run')} failed. The first: {reason}."
        if any(trial.status == "finished" for trial in results.trials):
            return so_far(results.trials, results.study.metric)
    return f"No method can be recommended: none {_absence(rows, results.study)}."


def _absence(rows: list[MethodSummary], study: StudyRecord) -> str:
    """Why none of `rows` can be recommended; continues "none ..." or "no method ..."."""
    over = [row for row in rows if row.fits is False]
    if rows and len(over) == len(rows):
        least = min(over, key=_peak)
        return f"fits {size(study.memory)}; the smallest, {least.method}, needs {size(least.peak_bytes)}"
    diverged, failed = sum(r.diverged for r in rows), sum(r.failed for r in rows)
    that_fits = "that fits " if over else ""
    if any(row.seeds and row.accuracy is None for row in rows):
        return f"{that_fits}has an accuracy, because the finished runs are scored by their loss alone"
    if rows and all(row.tuned_away for row in rows):
        return f"{that_fits}can be trained, because every learning rate that was tried diverged"
    if diverged + failed == 0:
        return f"{that_fits}has finished yet; run the same command again to resume"
    failures = [f"{count(n, 'run')} {fate}" for n, fate in ((diverged, "diverged"), (failed, "failed")) if n]
    most = " on most of its seeds" if any(row.seeds for row in rows) else ""
    return f"{that_fits}finished{most} ({listed(failures)})"


def _result(row: MethodSummary) -> str:
    """Accuracy, interval and notes on missing seeds, such as: 97.1% test accuracy [96.2, 98.0]."""
    accuracy = row.accuracy
    if accuracy is None:
        return "no test accuracy"
    text = f"{percent(accuracy.median)} test accuracy"
    text += " (one seed, no interval)" if accuracy.n == 1 else f" {span(accuracy)}"
    return text + seeds_note(row)


def seeds_note(row: MethodSummary) -> str:
    """Return a note on diverged and missing seeds, such as " (1 of 6 seeds diverged)"; "" if there are none."""
    note = _missing_seeds(row)
    return f" ({note})" if note else ""


def _missing_seeds(row: MethodSummary) -> str:
    """Diverged and missing seeds, such as: 1 of 6 seeds diverged; "" if there are none."""
    missing = row.planned - row.seeds - row.diverged
    seeds = count(row.planned, "seed")
    notes = [f"{n} of {seeds} {fate}" for n, fate in ((row.diverged, "diverged"), (missing, "missing")) if n > 0]
    return listed(notes) if notes else ""


def _if_none(x: float | None, otherwise: float) -> float:
    return otherwise if x is None else x
