"""The planned comparison of a study: the exact gradient against the best estimated gradient, tested once.

Both methods are chosen by their tuning runs. The final runs test them, on other seeds and on the test split, so the
test has no selection to correct for. More comparisons would need such a correction: with 13 of them, no p-value of
five seeds can be significant.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from gradcost.results.records import Results, TrialRecord
from gradcost.results.statistics import Interval, SignFlip, interval, probability_better, score_difference, sign_flip
from gradcost.results.targets import best_estimated, reference
from gradcost.results.tuning import final_runs


@dataclass(frozen=True)
class Contrast:
    """The difference of two methods on the test split.

    Args:
        exact: label of the method with the exact gradient.
        estimated: label of the method with an estimated gradient.
        difference: median of score(exact) - score(estimated), paired by seed, with its interval.
        better: P(A > B) + P(A = B) / 2 for the score A of `exact` and B of `estimated`: the effect size.
        test: the sign-flip test of the paired differences.
    """

    exact: str
    estimated: str
    difference: Interval
    better: float
    test: SignFlip


def planned_contrast(results: Results) -> Contrast | None:
    """Return the planned comparison; None if the study lacks one of the two kinds, or they share no tested seed."""
    exact, estimated = reference(results), best_estimated(results)
    if exact is None or estimated is None:
        return None
    one, other = _scores(results, exact), _scores(results, estimated)
    shared = [seed for seed in one if seed in other]
    if not shared:
        return None
    a, b = [one[seed] for seed in shared], [other[seed] for seed in shared]
    differences = [score_difference(x, y) for x, y in zip(a, b, strict=True)]
    return Contrast(exact, estimated, interval(differences), probability_better(a, b), sign_flip(a, b))


def _scores(results: Results, method: str) -> dict[int, float]:
    """The test score of each seed; -inf where the run diverged."""
    return {run.seed: value for run in final_runs(results, method) if (value := test_score(run)) is not None}


def test_score(run: TrialRecord) -> float | None:
    """Return the score of a run on the test split: -inf if it diverged, None if it was not tested."""
    if run.status == "diverged":
        return -inf
    if run.test is None:
        return None
    return run.test.accuracy if run.test.score is None else run.test.score  # old records have accuracies only
