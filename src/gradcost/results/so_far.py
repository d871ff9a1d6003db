"""What is known about methods while a comparison still tunes them: no verdict, because nothing was tested."""

from __future__ import annotations

from collections.abc import Iterable

from gradcost.core.metric import Metric
from gradcost.results.records import TrialRecord
from gradcost.results.tuning import best, scores
from gradcost.results.wording import count


def so_far(trials: Iterable[TrialRecord], metric: Metric) -> str:
    """Return one sentence: the best validation score of each method in the tuning runs, the best method first.

    Args:
        trials: the tuning and confirming runs.
        metric: what ranks the runs.
    """
    trials = list(trials)
    rates = max((len(scores(trials, method)) for method in {trial.method for trial in trials}), default=0)
    found: list[tuple[float, str]] = []
    for method in dict.fromkeys(trial.method for trial in trials):
        known = scores(trials, method)
        top = best(known)
        score = known[top[0]][0] if top else float("-inf")
        found.append((score, f"{method} {metric.text(score)}" if top else f"{method} diverged"))
    ranked = ", ".join(text for _, text in sorted(found, key=lambda pair: -pair[0]))
    return f"So far, by validation {metric.name} at {count(rates, 'learning rate')} each: {ranked}. Not tested yet."
