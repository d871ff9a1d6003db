"""The verdict of a study, by its metric: the accuracy (`recommendation`), or any other."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import isfinite, isnan

from gradcost.core.metric import Metric
from gradcost.results import recommendation
from gradcost.results.contrast import planned_contrast
from gradcost.results.effort import training_efforts, unequal_training
from gradcost.results.recommendation import Recommendation, candidates, penalized_accuracy, seeds_note
from gradcost.results.records import Results, StudyRecord
from gradcost.results.summary import MethodSummary, metric_text, summarise
from gradcost.results.wording import number, size


def verdict(results: Results) -> str:
    """Recommend a method, and compare it with the best method of the other kind.

    The two kinds are methods with the exact gradient of a batch, and methods with an estimated gradient.

    Args:
        results: from `read`.
    Returns:
        One or more sentences; if no method can be recommended, the reason.
    """
    return " ".join(sentences(results))


def choose(results: Results) -> Recommendation | None:
    """Return the method to use, by the study's metric; None if no method can be recommended."""
    return recommendation.choose(*_by_score(results))


def is_sure(results: Results) -> bool:
    """Return whether the evidence allows a recommendation: several seeds, no edge of the rates, a loss that fell."""
    rows, study = _by_score(results)
    choice = recommendation.choose(rows, study)
    return choice is not None and recommendation.nothing_yet(choice, rows, results) is None


def sentences(results: Results) -> list[str]:
    """Return the sentences of the verdict. The last ones say if the runs are unequal (E106) or nothing was tuned."""
    unequal = [
        f"The final runs are not equally long: {method} was {sentence}."
        for method, sentence in unequal_training([*training_efforts(results)])
    ]
    return [*_sentences(results), *unequal, *_untuned(results)]


def _untuned(results: Results) -> list[str]:
    """Return a sentence if two or more methods were trained, and none was tuned with more than one learning rate."""
    trained = {run.method for run in results.trials if run.phase == "final"}
    if len(trained) < 2 or results.study.points > 1:
        return []
    return ["No learning rate was tuned: with other ones, the order of the methods may be another."]


def _sentences(results: Results) -> list[str]:
    metric = results.study.metric
    if metric.is_accuracy:
        return recommendation.sentences(results)
    rows, study = _by_score(results)
    choice = recommendation.choose(rows, study)
    if choice is None:
        return recommendation.sentences(results)
    row, doubt = choice.row, recommendation.nothing_yet(choice, rows, results)
    known = [*([] if doubt is None else [doubt]), _use(choice, metric, is_sure=doubt is None)]
    others = candidates(other for other in rows if other.exact is not row.exact)
    if others:
        known.append(_other(max(others, key=lambda other: penalized_accuracy(other, study)), choice, metric))
    test = recommendation.tested(planned_contrast(results))
    known += [] if test is None else [test]
    edges = recommendation.at_edge(other for other in rows if doubt is None or other is not row)
    return [*known, *([] if edges is None else [edges])]


def certainty(results: Results) -> list[str]:
    """Return sentences on the planned comparison: its test, the difference with its interval, and the effect size."""
    contrast, metric = planned_contrast(results), results.study.metric
    test = recommendation.tested(contrast)
    if contrast is None or test is None:
        return []
    factor, unit = (100, " points") if metric.is_accuracy else (metric.score(1), "")
    ends = [factor * x + 0.0 for x in (contrast.difference.low, contrast.difference.high)]
    diverged = "" if all(map(isfinite, ends)) else ", where a run that diverged is infinitely bad"
    middle = factor * contrast.difference.median + 0.0
    if isnan(middle):  # of two seeds, one run of each method diverged
        return [f"{test} On the test split their difference has no median{diverged}."]
    middle, low, high = map(number, (middle, min(ends), max(ends)))
    return [
        f"{test} On the test split {contrast.exact} less {contrast.estimated} is {middle} "
        f"[{low}, {high}]{unit} of {metric.name}{diverged}. A run of {contrast.exact} is better than one of "
        f"{contrast.estimated} with probability {contrast.better:.2f}."
    ]


def _by_score(results: Results) -> tuple[list[MethodSummary], StudyRecord]:
    """Return the rows with scores as accuracies, and the study. A diverged run is as bad as the worst other one."""
    rows, study = summarise(results), results.study
    if study.metric.is_accuracy:
        return rows, study
    worst = min((x for row in rows for x in row.scores if isfinite(x)), default=None)
    return [replace(row, accuracy=row.score, accuracies=row.scores) for row in rows], replace(study, chance=worst)


def _use(choice: Recommendation, metric: Metric, is_sure: bool) -> str:
    row = choice.row
    memory = "" if row.peak_bytes is None else f" in {size(row.peak_bytes)} beyond the weights"
    text = f"{recommendation.advice(row, is_sure)}: {_result(row, metric)}{memory}"
    if choice.alike:
        brief, result = (partial(each, metric=metric) for each in (_median, _result))
        text += f"; {recommendation.in_one_interval(choice, brief, result)}"
    return f"{text}."


def _other(row: MethodSummary, choice: Recommendation, metric: Metric) -> str:
    kind = "with the exact gradient" if row.exact else "with an estimated gradient"
    memory = "" if row.peak_bytes is None else f" in {size(row.peak_bytes)}"
    time = ""
    if row.ms is not None and choice.row.ms is not None and not (row.doubt or choice.row.doubt):
        time = f", {number(row.ms)} ms per step instead of {number(choice.row.ms)}"
    return f"The best method {kind} is {row.method}: {_result(row, metric)}{memory}{time}."


def _median(row: MethodSummary, metric: Metric) -> str:
    return metric.text(row.score.median) if row.score is not None else "no score"


def _result(row: MethodSummary, metric: Metric) -> str:
    """Such as: test perplexity 12.31 [12.1, 12.6] (1 of 6 seeds diverged)."""
    assert row.score is not None
    text = f"test {metric.name} {metric_text(row.score, metric)}"
    text += " (one seed, no interval)" if row.score.n == 1 else ""
    return text + seeds_note(row)
